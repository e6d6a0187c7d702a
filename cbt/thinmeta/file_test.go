package thinmeta_test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/cbt/thinmeta"
	"stillpoint.io/stillpoint/cbt/thinmeta/thinmetatest"
	"stillpoint.io/stillpoint/integration/lab"
)

// TestDevice reads a metadata snapshot from a block device, past the page cache.
func TestDevice(t *testing.T) {
	l := lab.Test(t)
	p := thinmetatest.New(thinmetatest.Options{BlockSize: 64 << 10, DataBlocks: 1 << 17})
	p.Create(1)
	p.Fill(1, 0, 50_000, thinmetatest.MaxCapacity)
	p.Snapshot(2, 1)
	for b := uint64(0); b < 50_000; b += 100 {
		p.Write(1, b)
	}
	p.Reserve()
	p.Discard(1, 0)
	image, err := p.Image()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(l.Dir, "image")
	if err := os.WriteFile(path, image, 0o600); err != nil {
		t.Fatal(err)
	}
	device, hold, err := lab.Loop(path)
	if err != nil {
		t.Fatal(err)
	}
	defer hold.Close()
	f := openFile(t, device)
	if f.Size() != int64(len(image)) {
		t.Errorf("%d bytes, not %d", f.Size(), len(image))
	}
	if !direct(t, device) {
		t.Errorf("%s is not read with O_DIRECT", device)
	}
	want, _ := inMemory(t, p)
	held, err := thinmeta.OpenSnapshot(t.Context(), f, want.Superblock().Snapshot)
	if err != nil {
		t.Fatal(err)
	}
	const size = 50_000 * 64 << 10
	d, err := held.Changed(t.Context(), thinmeta.Volume{ID: 2, Size: size}, thinmeta.Volume{ID: 1, Size: size}, 0)
	if err != nil {
		t.Fatal(err)
	}
	reread, err := want.Changed(t.Context(), thinmeta.Volume{ID: 2, Size: size}, thinmeta.Volume{ID: 1, Size: size}, 64<<10)
	if err != nil {
		t.Fatal(err)
	}
	if got, live := collect(t, d.Extents), collect(t, reread.Extents); len(got) != 500 || got[0].Zero || !slices.Equal(got[1:], live) {
		t.Errorf("%v, not the first block and %v", got, live)
	}
	if err := held.Held(t.Context()); err != nil {
		t.Error(err)
	}
}

// direct reports whether one of our descriptors of a file has O_DIRECT.
func direct(t *testing.T, path string) bool {
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		if at, _ := os.Readlink("/proc/self/fd/" + fd.Name()); at != path {
			continue
		}
		info, err := os.ReadFile(fmt.Sprint("/proc/self/fdinfo/", fd.Name()))
		if err != nil {
			t.Fatal(err)
		}
		_, rest, _ := strings.Cut(string(info), "flags:")
		flags, err := strconv.ParseInt(strings.Fields(rest)[0], 8, 64)
		if err != nil {
			t.Fatal(err)
		}
		if flags&unix.O_DIRECT != 0 {
			return true
		}
	}
	return false
}
