package vm

import (
	"crypto/rand"
	"encoding/xml"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/integration/lab"
)

// Thin volumes, as the tests that use this package need them: a pool, a mounted volume, two snapshots, and what changed
// between them.
func TestThin(t *testing.T) {
	if !Here(t, Config{Disks: []int64{2 << 30}}) {
		return
	}
	do := func(name string, args ...string) string {
		t.Helper()
		out, err := exec.CommandContext(t.Context(), name, args...).CombinedOutput()
		if err != nil {
			t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
		}
		return string(out)
	}
	do("vgcreate", "-q", "vm-test", Disks()[0])
	t.Cleanup(func() {
		if out, err := exec.Command("vgremove", "-qfy", "vm-test").CombinedOutput(); err != nil {
			t.Errorf("vgremove: %v\n%s", err, out)
		}
	})
	do("lvcreate", "-q", "--type", "thin-pool", "-L", "1G", "-c", "64k", "--poolmetadatasize", "16M", "-Zn", "-n", "pool", "vm-test")
	do("lvcreate", "-q", "-V", "1G", "--thinpool", "pool", "-n", "volume", "vm-test")
	if err := lab.Mkfs(t.Context(), "xfs", "/dev/vm-test/volume"); err != nil {
		t.Fatal(err)
	}
	mount := t.TempDir()
	if err := unix.Mount("/dev/vm-test/volume", mount, "xfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(mount, 0); err != nil {
			t.Error(err)
		}
	})
	f, err := os.Create(filepath.Join(mount, "file"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	data := make([]byte, 8<<20)
	rand.Read(data)
	if _, err := f.Write(data); err != nil {
		t.Fatal(err)
	}
	do("lvcreate", "-q", "-s", "-n", "first", "vm-test/volume")
	if _, err := f.WriteAt(data[:64<<10], 4<<20); err != nil {
		t.Fatal(err)
	}
	do("lvcreate", "-q", "-s", "-n", "second", "vm-test/volume")

	pool := "vm--test-pool-tpool"
	do("dmsetup", "message", pool, "0", "reserve_metadata_snap")
	text := do("thin_delta", "--metadata-snap", "--snap1", "2", "--snap2", "3", "/dev/mapper/vm--test-pool_tmeta")
	do("dmsetup", "message", pool, "0", "release_metadata_snap")
	type runs []struct {
		Length int64 `xml:"length,attr"`
	}
	var delta struct {
		Different runs `xml:"diff>different"`
		New       runs `xml:"diff>right_only"`
		Same      runs `xml:"diff>same"`
	}
	if err := xml.Unmarshal([]byte(text), &delta); err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	sum := func(all runs) (n int64) {
		for _, r := range all {
			n += r.Length
		}
		return n
	}
	// 64 KiB of the file lie in two blocks at most; the rest is the filesystem's own.
	if changed, same := sum(delta.Different)+sum(delta.New), sum(delta.Same); changed < 1 || changed > 12 || same < 8<<20/(64<<10)-2 {
		t.Errorf("%d blocks changed, %d did not:\n%s", changed, same, text)
	}
	do("lvchange", "-ay", "-K", "vm-test/first")
	before := t.TempDir()
	if err := unix.Mount("/dev/vm-test/first", before, "xfs", unix.MS_RDONLY, "nouuid,norecovery"); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(before, 0)
	if b, err := os.ReadFile(filepath.Join(before, "file")); err != nil || string(b) != string(data) {
		t.Errorf("the first snapshot does not have the file as it was: %d bytes, %v", len(b), err)
	}
}

// Where the machine has device-mapper no guest is made; a guest is such a machine.
func TestInPlace(t *testing.T) {
	if !Here(t, Config{Disks: []int64{64 << 20}}) {
		return
	}
	t.Setenv(envChoice, "")
	if kind, err := chosen(); kind != here || err != nil {
		t.Fatalf("chosen is %q, %v", kind, err)
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), exe, "-test.run=^TestThin$", "-test.v")
	cmd.Env = append(os.Environ(), envInside+"=", envChoice+"="+string(here))
	if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "--- PASS: TestThin") {
		t.Errorf("%v\n%s", err, out)
	}
}
