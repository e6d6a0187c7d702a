package main

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/repository"
)

// commitEmpty makes a backup of a volume of zeros, as of a backend that is not configured.
func commitEmpty(t *testing.T, r *repository.Repository, volume, id string, at time.Time) string {
	t.Helper()
	w, err := r.NewWriter(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	x := w.NewIndex(r.ChunkSize())
	s, err := w.WriteZeroSegment(t.Context(), r.ChunkSize())
	if err == nil {
		err = x.Add(s)
	}
	if err != nil {
		t.Fatal(err)
	}
	image, err := x.Finish(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	v := adapters.VolumeID{Backend: "elsewhere", ID: volume}
	b, err := w.Commit(t.Context(), repository.Backup{
		ID: id, Volume: v, Snapshot: adapters.SnapshotID{Volume: v, Name: id}, Kind: repository.Full, Size: r.ChunkSize(),
		ChunkSize: r.ChunkSize(), Created: at, Started: at, Finished: at, Image: image,
	}, func(context.Context, *repository.Image) error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	return b.Handle.String()
}

func openRemote(t *testing.T, path, passphraseFile string) *repository.Repository {
	t.Helper()
	pass, err := os.ReadFile(passphraseFile)
	if err != nil {
		t.Fatal(err)
	}
	r, err := repository.Open(t.Context(), repository.Location{Path: path}, adapters.NewSecret(strings.TrimSpace(string(pass))), repository.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestForget(t *testing.T) {
	remote, passphrase := environment(t, t.TempDir())
	must(t, "remote", "init", "--chunk-size", "64")
	r := openRemote(t, remote, passphrase)
	var days []string
	for day := range 10 {
		days = append(days, commitEmpty(t, r, "a", fmt.Sprint("a", day), time.Date(2026, 3, 20-day, 12, 0, 0, 0, time.UTC)))
	}
	other := commitEmpty(t, r, "b", "b0", time.Date(2026, 1, 1, 12, 0, 0, 0, time.UTC))
	if err := r.MarkSuspect(t.Context(), "a1", "the backend lied"); err != nil {
		t.Fatal(err)
	}
	if err := r.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	listed := func() (all []string) {
		for _, b := range decode[struct{ Backup string }](t, must(t, "backups", "--json")) {
			all = append(all, b.Backup)
		}
		return all
	}

	refuses(t, 2, []string{"keeps nothing", "--keep-daily"}, "forget")
	refuses(t, 2, []string{"keeps nothing"}, "forget", "--dry-run")
	refuses(t, 2, []string{"not both"}, "forget", "--keep-last", "1", days[3])
	refuses(t, 2, []string{"never forgets", "name the backup"}, "forget", "--keep-last", "1", "--force")
	refuses(t, 2, []string{"14d"}, "forget", "--keep-within", "soon")
	refuses(t, 2, []string{"--time-zone"}, "forget", "--keep-last", "1", "--time-zone", "Nowhere")
	refuses(t, 4, []string{"is the newest of its volume", "cannot be asked", "--force"}, "forget", days[3], days[0])
	refuses(t, 3, []string{"backup:default/none"}, "forget", days[3], "backup:default/none")
	if n := len(listed()); n != 11 {
		t.Fatalf("%d backups after refusals, want 11", n)
	}

	// By name.
	if text := must(t, "forget", "--dry-run", days[9]); !strings.Contains(text, "would forget "+days[9]) {
		t.Errorf("dry run: %s", text)
	}
	if text := must(t, "forget", days[9], days[9]); text != "forgotten "+days[9]+"\n" {
		t.Errorf("forget: %q", text)
	}

	// By a policy: the table first, then what is done.
	args := []string{"forget", "--keep-daily", "2", "--keep-weekly", "2", "--time-zone", "UTC"}
	dry := must(t, append(args, "--dry-run")...)
	for _, want := range []string{"CREATED (UTC)", "daily: 2026-03-20, 1 of 2", "weekly: 2026-W11, 2 of 2", "no rule keeps it", "suspect, which counts for no rule: the backend lied", "would forget " + days[8]} {
		if !strings.Contains(dry, want) {
			t.Errorf("the table does not say %q:\n%s", want, dry)
		}
	}
	if n := len(listed()); n != 10 {
		t.Fatalf("%d backups after a dry run, want 10", n)
	}
	var judged, forgotten int
	for _, line := range decode[struct {
		Backup, Forgotten string
		Keep              bool
		Reasons           []string
	}](t, must(t, append(args, "--json")...)) {
		switch {
		case line.Forgotten != "":
			forgotten++
		case line.Backup == "" || len(line.Reasons) == 0:
			t.Errorf("a line of the policy: %+v", line)
		default:
			judged++
		}
	}
	// Kept of volume a: the 20th, which is also the newest of its week; the 18th, as the 19th is suspect; the 15th, the
	// newest of the week before. Of b its only one.
	if got, want := strings.Join(listed(), " "), strings.Join([]string{days[0], days[2], days[5], other}, " "); judged != 10 || forgotten != 6 || got != want {
		t.Errorf("%d judged, %d forgotten, left %s; want %s", judged, forgotten, got, want)
	}
	if text := must(t, append(args, "--volume", "elsewhere:a")...); strings.Contains(text, other) {
		t.Errorf("--volume: %s", text)
	}

	refuses(t, 3, []string{`"elsewhere" is not configured`}, append(args, "--volume", "elsewhere:c")...)

	// A base goes by force only.
	refuses(t, 4, []string{"--force"}, "forget", other)
	must(t, "forget", "--force", other)
	if n := len(listed()); n != 3 {
		t.Errorf("%d backups at the end, want 3", n)
	}
}
