package main

import (
	"crypto/rand"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"stillpoint.io/stillpoint/integration/lab"
)

// Rot in a remote, through the command line: found, named, planned, repaired from the snapshot, and recorded.
func TestVerifyAndRepair(t *testing.T) {
	l := lab.Test(t)
	programs(t)
	remote, _ := environment(t, l.Dir)
	pool, err := l.Pool(t.Context(), "pool", "xfs", 1<<30)
	if err != nil {
		t.Fatal(err)
	}
	v, err := l.Volume(t.Context(), pool.Mount, "v", "ext4", 64<<20)
	if err != nil {
		t.Fatal(err)
	}
	noise := make([]byte, 6<<20)
	rand.Read(noise)
	if err := os.WriteFile(filepath.Join(v.Mount, "noise"), noise, 0o600); err != nil {
		t.Fatal(err)
	}
	volume := "reflink:" + v.File
	must(t, "remote", "init", "--chunk-size", "64")
	one := decode[cutJSON](t, must(t, "cut", "--name", "one", "--json", volume))[0].Snapshots[0]
	first := decode[backupJSON](t, must(t, "backup", "--json", one))[0].Backup
	if err := os.WriteFile(filepath.Join(v.Mount, "more"), noise[:100<<10], 0o600); err != nil {
		t.Fatal(err)
	}
	two := decode[cutJSON](t, must(t, "cut", "--name", "two", "--json", volume))[0].Snapshots[0]
	second := decode[backupJSON](t, must(t, "backup", "--json", two))[0].Backup

	if text := must(t, "backups"); !strings.Contains(text, "VERIFIED") || strings.Count(text, "never") != 2 {
		t.Errorf("backups:\n%s", text)
	}
	type status struct {
		Unverified     string
		Never_verified int
		Suspect        int
	}
	if s := decode[status](t, must(t, "remote", "status", "--json"))[0]; s.Unverified != first || s.Never_verified != 2 {
		t.Errorf("status: %+v", s)
	}
	if text := must(t, "verify", "--quick", "--all"); strings.Count(text, "everything is there") != 2 {
		t.Errorf("verify --quick: %s", text)
	}
	if text := must(t, "verify", "--all"); strings.Count(text, "is sound") != 2 || !strings.Contains(text, "2 backups and all else in default are sound") {
		t.Errorf("verify --all: %s", text)
	}
	if text := must(t, "backups"); strings.Contains(text, "never") || strings.Count(text, "s ago") != 2 {
		t.Errorf("backups:\n%s", text)
	}
	if text := must(t, "remote", "status"); !strings.Contains(text, "unverified  for ") || !strings.Contains(text, "suspect     0") {
		t.Errorf("status:\n%s", text)
	}
	if text := must(t, "verify", "--all", "--older-than", "30d"); strings.Contains(text, "backup:") {
		t.Errorf("verified lately, yet again: %s", text)
	}
	if text := must(t, "verify", "--against", two, second); !strings.Contains(text, "the same as "+two) {
		t.Errorf("verify --against: %s", text)
	}
	code, text, errs := call("verify", "--against", one, second)
	if code != 6 || !strings.Contains(text, "the backup has content") || !strings.Contains(text, "is not the snapshot that") {
		t.Errorf("against another: %d, %s%s", code, text, errs)
	}

	rot(t, remote, second)
	code, text, errs = call("verify", second)
	if code != 6 || !strings.Contains(text, "bad: "+second+": 65536 bytes at ") || !strings.Contains(errs, "stillpoint repair "+second) {
		t.Errorf("rot: %d, %s%s", code, text, errs)
	}
	if text := must(t, "repair", "--dry-run", second); strings.Count(text, "can be made whole") != 2 || !strings.Contains(text, first) {
		t.Errorf("repair --dry-run: %s", text)
	}
	if code, _, _ := call("verify", second); code != 6 {
		t.Error("a dry run has repaired it")
	}
	if text := must(t, "repair", second); strings.Count(text, "is whole again") != 2 || !strings.Contains(text, "1 contents stored again") {
		t.Errorf("repair: %s", text)
	}
	must(t, "verify", "--all")
	if text := must(t, "repair", "--all"); !strings.Contains(text, "nothing is wrong") {
		t.Errorf("repair: %s", text)
	}

	// The index of a backup's contents is gone: nothing would be listed.
	filepath.WalkDir(filepath.Join(remote, "x"), func(path string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			err = os.Remove(path)
		}
		return err
	})
	refuses(t, 6, []string{"is damaged", "stillpoint repair --all"}, "backups")
	if text := must(t, "repair", "--all", "--dry-run"); !strings.Contains(text, "an index blob is missing") {
		t.Errorf("repair --dry-run: %s", text)
	}
	must(t, "repair", "--all")
	if text := must(t, "backups"); strings.Count(text, "backup:default/") != 2 {
		t.Errorf("backups:\n%s", text)
	}
	must(t, "verify", "--all", "--json")
}

func TestAges(t *testing.T) {
	for s, want := range map[string]time.Duration{"30d": 720 * time.Hour, "2w": 336 * time.Hour, "36h": 36 * time.Hour, "0": 0} {
		var f ageFlag
		if err := f.Set(s); err != nil || time.Duration(f) != want {
			t.Errorf("%q: %v, %v", s, time.Duration(f), err)
		}
	}
	for _, s := range []string{"", "d", "-1d", "1.5d", "soon", "-3h", "999999999d"} {
		var f ageFlag
		if err := f.Set(s); err == nil {
			t.Errorf("%q: taken as %v", s, time.Duration(f))
		}
	}
	for d, want := range map[time.Duration]string{0: "0s", 59 * time.Second: "59s", 90 * time.Minute: "1h", 47 * time.Hour: "47h", 72 * time.Hour: "3d"} {
		if got := age(d); got != want {
			t.Errorf("%v: %q", d, got)
		}
	}
}

// rot changes a bit in the largest pack of data, near its middle and where it hurts a backup: what lies at a place of a
// pack differs from run to run.
func rot(t *testing.T, remote, backup string) {
	t.Helper()
	var largest string
	var size int64
	err := filepath.WalkDir(filepath.Join(remote, "p"), func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if err == nil && info.Size() > size {
			largest, size = path, info.Size()
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	p, err := os.ReadFile(largest)
	if err != nil {
		t.Fatal(err)
	}
	const step = 256 << 10
	for n := range len(p) / step {
		at := (len(p)/2 + n*step) % len(p)
		p[at] ^= 1
		if err := os.WriteFile(largest, p, 0o600); err != nil {
			t.Fatal(err)
		}
		if code, _, _ := call("verify", backup); code == 6 {
			return
		}
		p[at] ^= 1
	}
	t.Fatalf("nothing of %s is in %s", backup, largest)
}
