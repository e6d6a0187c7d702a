package loopdev

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/fault"
	"stillpoint.io/stillpoint/integration/lab"
)

// A device is found by its label, grows with its file, is not taken from who uses it, and not from somebody else at all.
func TestAttachAndDetach(t *testing.T) {
	l, ctx := lab.Test(t), t.Context()
	file := filepath.Join(l.Dir, "file")
	must(t, lab.Sparse(file, 1<<20))
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	must(t, err)
	defer f.Close()
	path, err := Attach(ctx, f, "stillpoint test")
	must(t, err)
	defer Detach(ctx, path, "stillpoint test")

	held, err := os.OpenFile(path, os.O_RDWR|unix.O_EXCL, 0)
	must(t, err)
	defer held.Close()
	if n, err := unix.IoctlGetInt(int(held.Fd()), unix.BLKSSZGET); err != nil || n != sector {
		t.Errorf("sectors of %d bytes, %v", n, err)
	}
	must(t, f.Truncate(3<<20))
	must(t, Resize(path))
	if end, err := held.Seek(0, 2); err != nil || end != 3<<20 {
		t.Errorf("%d bytes, %v", end, err)
	}
	if err := Detach(ctx, path, "stillpoint test"); !errors.Is(err, fault.Busy) {
		t.Errorf("a device in use: %v", err)
	}
	held.Close()
	must(t, Detach(ctx, path, "somebody else's"))
	if ours, err := bears(path, "stillpoint test"); err != nil || !ours {
		t.Errorf("somebody else's was detached: %v, %v", ours, err)
	}
	for range 2 {
		must(t, Detach(ctx, path, "stillpoint test"))
	}
	if ours, err := bears(path, "stillpoint test"); err != nil || ours {
		t.Errorf("not detached: %v, %v", ours, err)
	}
	if _, err := Attach(ctx, f, Label(make([]byte, 64))); err == nil {
		t.Error("a label that is too long")
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
