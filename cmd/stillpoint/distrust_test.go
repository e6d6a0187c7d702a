package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"stillpoint.io/stillpoint/agent/repository"
	"stillpoint.io/stillpoint/fault"
	"stillpoint.io/stillpoint/integration/lab"
)

type scrubJSON struct {
	Volume, Backup, Snapshot, Healed string
	Bytes_scrubbed, Bytes_wrong      int64
	Oldest                           time.Time
	Suspect                          []string
}

// Distrust through the command line: a canary by hand and before backups, scrubs, what is suspect, and since when nobody
// looked.
func TestDistrust(t *testing.T) {
	l := lab.Test(t)
	programs(t)
	remote, passphrase := environment(t, l.Dir)
	t.Setenv(envRemote, "")
	pool, err := l.Pool(t.Context(), "pool", "xfs", 4<<30)
	if err != nil {
		t.Fatal(err)
	}
	canary := filepath.Join(pool.Mount, "canary.img")
	config := filepath.Join(l.Dir, "config.yaml")
	configure := func(canary string) {
		text := fmt.Sprintf("backends:\n  files: {adapter: reflink, parameters: {pools: %s}, canary: %q}\nremotes:\n  default: {path: %s, passphrase-file: %s}\n", pool.Mount, canary, remote, passphrase)
		if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	with := func(args ...string) []string { return append([]string{"--config", config}, args...) }
	configure(canary)
	file := filepath.Join(pool.Mount, "disk.img")
	if err := os.WriteFile(file, []byte(strings.Repeat("what a disk holds ", 1<<16)), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(file, 100<<20); err != nil {
		t.Fatal(err)
	}
	volume := "files:" + file

	if text := must(t, with("canary", "files:"+filepath.Join(pool.Mount, "other.img"), "--size", "64")...); !strings.Contains(text, "sings") {
		t.Errorf("canary: %s", text)
	}
	report := decode[struct {
		Verdict string
		Made    bool
		Size    int64
	}](t, must(t, with("canary", "--json", "files:"+canary)...))[0]
	if !report.Made || report.Size != 1<<30 || !strings.Contains(report.Verdict, "all of") {
		t.Errorf("canary --json: %+v", report)
	}
	refuses(t, 2, []string{"left alone"}, with("canary", volume)...)

	must(t, with("remote", "init")...)
	cut := func(name string) string {
		return decode[cutJSON](t, must(t, with("cut", "--name", name, "--allow-crash-consistent", "--json", volume)...))[0].Snapshots[0]
	}
	first := decode[backupJSON](t, must(t, with("backup", "--json", cut("one"))...))[0]
	second := decode[backupJSON](t, must(t, with("backup", "--json", cut("two"))...))[0]
	if second.Kind != "incremental" {
		t.Errorf("with a canary that sings: %+v", second)
	}
	if n := len(decode[map[string]any](t, must(t, with("snapshots", "--json", "files:"+canary)...))); n > 0 {
		t.Errorf("%d snapshots of the canary are left", n)
	}

	// A canary that is somebody's volume is a canary that fails.
	configure(file)
	code, stdout, stderr := call(with("backup", "--json", cut("three"))...)
	if code != 0 || !strings.Contains(stderr, "its canary failed") {
		t.Fatalf("exit code %d: %s", code, stderr)
	}
	if third := decode[backupJSON](t, stdout)[0]; third.Kind != "full" {
		t.Errorf("with a canary that fails: %+v", third)
	}
	configure("")

	if text := must(t, with("remote", "status")...); !strings.Contains(text, "unaudited   ") {
		t.Errorf("remote status: %s", text)
	}
	scrubbed := decode[scrubJSON](t, must(t, with("scrub", "--json", "--all", "--whole")...))
	if len(scrubbed) != 1 || scrubbed[0].Bytes_scrubbed != 100<<20 || scrubbed[0].Bytes_wrong != 0 {
		t.Errorf("scrub --json: %+v", scrubbed)
	}
	if text := must(t, with("scrub", volume, "--days", "7")...); !strings.Contains(text, "all right") {
		t.Errorf("scrub: %s", text)
	}
	if text := must(t, with("remote", "status")...); !strings.Contains(text, "unaudited   nothing") {
		t.Errorf("remote status after a whole scrub: %s", text)
	}
	refuses(t, 2, []string{"--all"}, with("scrub")...)
	refuses(t, 2, []string{"--days"}, with("scrub", "--all", "--days", "0")...)

	// A backup that is suspect is shown, not restored, and healed by the next scrub.
	h, err := repository.ParseHandle(scrubbed[0].Backup)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := readSecret(passphrase)
	if err != nil {
		t.Fatal(err)
	}
	r, err := repository.Open(t.Context(), repository.Location{Path: remote}, secret, repository.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(r.MarkSuspect(t.Context(), h.ID, "a test says so"), r.Close(context.Background())); err != nil {
		t.Fatal(err)
	}
	if text := must(t, with("backups", volume)...); strings.Count(text, "SUSPECT") != 1 || strings.Count(text, "never") != 3 {
		t.Errorf("backups: %s", text)
	}
	target := "files:" + filepath.Join(pool.Mount, "restored.img")
	refuses(t, 6, []string{"a test says so", "--suspect"}, with("restore", h.String(), target)...)
	must(t, with("restore", "--suspect", h.String(), target)...)
	code, stdout, _ = call(with("scrub", "--json", volume)...)
	healed := decode[scrubJSON](t, stdout)
	if code != exitCode(fault.Corrupt) || len(healed) != 1 || healed[0].Healed == "" || len(healed[0].Suspect) != 1 {
		t.Errorf("scrub of a suspect backup: exit code %d, %s", code, stdout)
	}
	must(t, with("verify", healed[0].Healed)...)

	// Without the snapshots there is nothing to compare with.
	for _, s := range []string{first.Snapshot, second.Snapshot, scrubbed[0].Snapshot} {
		must(t, with("delete", s)...)
	}
	refuses(t, 3, []string{"nothing to compare with"}, with("scrub", volume)...)
	if _, _, stderr := call(with("scrub", "--all")...); !strings.Contains(stderr, "nothing to compare with") {
		t.Errorf("scrub --all: %s", stderr)
	}
}
