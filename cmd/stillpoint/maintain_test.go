package main

import (
	"os"
	"strings"
	"testing"
	"time"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/repository"
)

func TestSpaceAndMaintenance(t *testing.T) {
	remote, passphrase := environment(t, t.TempDir())
	must(t, "remote", "init", "--chunk-size", "64")
	r := openRemote(t, remote, passphrase)
	one := commitEmpty(t, r, "a", "a0", time.Now().Add(-time.Hour))
	two := commitEmpty(t, r, "b", "b0", time.Now())
	if err := r.Close(t.Context()); err != nil {
		t.Fatal(err)
	}

	text := must(t, "space")
	for _, want := range []string{"elsewhere:a", one, two, "UNIQUE", "reclaimable"} {
		if !strings.Contains(text, want) {
			t.Errorf("space does not say %q:\n%s", want, text)
		}
	}
	lines := decode[map[string]any](t, must(t, "space", "--json"))
	if len(lines) != 5 || lines[0]["remote"] != "default" || lines[1]["volume"] != "elsewhere:a" || lines[2]["backup"] != one || lines[2]["shared_bytes"].(float64) <= 0 {
		t.Errorf("space --json: %v", lines)
	}
	refuses(t, 3, []string{`"elsewhere" is not configured`}, "space", "elsewhere:a")

	dry := decode[repository.Maintenance](t, must(t, "remote", "maintain", "--dry-run", "--json"))[0]
	if dry.Mode != "full" || !strings.HasPrefix(dry.Owner, "stillpoint@") || len(dry.Tasks) != 0 {
		t.Errorf("dry run: %+v", dry)
	}
	done := decode[repository.Maintenance](t, must(t, "remote", "maintain", "--json"))[0]
	if done.Mode != "full" || len(done.Tasks) == 0 || done.Before == 0 || done.After == 0 || !done.NextFull.After(time.Now()) {
		t.Errorf("maintain --json: %+v", done)
	}
	if text := must(t, "remote", "maintain"); !strings.Contains(text, "nothing is due") {
		t.Errorf("again: %s", text)
	}
	if text := must(t, "remote", "maintain", "--full"); !strings.Contains(text, "snapshot-gc") || !strings.Contains(text, "full cycle done") {
		t.Errorf("--full: %s", text)
	}

	// Another host is told whose it is.
	owner := done.Owner
	host, err := os.Hostname()
	if err != nil || owner != "stillpoint@"+host {
		t.Fatalf("owner %s, host %s: %v", owner, host, err)
	}
	giveAway(t, remote, passphrase, "stillpoint@other")
	refuses(t, 2, []string{"stillpoint@other", owner, "--take-over"}, "remote", "maintain")
	code, stdout, stderr := call("remote", "maintain", "--take-over", "--full")
	if code != 0 || !strings.Contains(stderr, "warning") || !strings.Contains(stdout, "done") {
		t.Errorf("--take-over: %d %s %s", code, stdout, stderr)
	}
	must(t, "remote", "maintain")
	if got := decode[map[string]any](t, must(t, "backups", "--json")); len(got) != 2 {
		t.Errorf("%d backups at the end", len(got))
	}
}

// giveAway makes another host the owner.
func giveAway(t *testing.T, remote, passphrase, owner string) {
	t.Helper()
	pass, err := os.ReadFile(passphrase)
	if err != nil {
		t.Fatal(err)
	}
	r, err := repository.Open(t.Context(), repository.Location{Path: remote}, adapters.NewSecret(strings.TrimSpace(string(pass))), repository.OpenOptions{Host: strings.TrimPrefix(owner, "stillpoint@"), Locks: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Maintain(t.Context(), repository.MaintainOptions{TakeOver: true}); err != nil {
		t.Fatal(err)
	}
	if err := r.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
}
