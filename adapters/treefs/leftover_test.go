package treefs

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/cbt"
	"stillpoint.io/stillpoint/integration/lab"
)

// A file that was left gives its bytes, however often the restore was interrupted, and nothing else: not its attributes,
// mode and other names. What is zeroed in it becomes a hole.
func TestLeftover(t *testing.T) {
	dir := lab.Test(t).Dir
	const size = 5*4096 + 7
	data := bytes.Repeat([]byte("d"), size)
	x, err := begin(t, dir, "new")
	must(t, err)
	must(t, x.Mkdir(t.Context(), "d"))
	f, err := x.Create(t.Context(), "d/f", size)
	must(t, err)
	must(t, f.WriteAt(t.Context(), data, 0))
	must(t, f.Close())
	must(t, x.Link(t.Context(), "d/f", "d/g"))
	attributes := []adapters.Attribute{{Name: "security.other", Value: []byte("x")}, {Name: "user.other", Value: []byte("x")}}
	must(t, x.Describe(t.Context(), "d/f", adapters.Entry{Mode: 0o4751, UID: 7, GID: 8, Attributes: attributes}))
	must(t, x.Close())
	for i := range 3 { // the last one finds what the others left, each in another place
		x, err = begin(t, dir, "new")
		must(t, err)
		must(t, x.Mkdir(t.Context(), fmt.Sprint(leftPrefix, i))) // a name that a tree may have
		must(t, x.Close())
	}
	x, err = begin(t, dir, "new")
	must(t, err)
	must(t, x.Mkdir(t.Context(), "d"))
	f, err = x.Create(t.Context(), "d/f", size)
	must(t, err)
	got := make([]byte, size)
	must(t, f.ReadAt(t.Context(), got, 0))
	if f.Fresh() || !bytes.Equal(got, data) {
		t.Errorf("what was left is not there: fresh %v, %.20q", f.Fresh(), got)
	}
	must(t, f.Zero(t.Context(), 4096, 4096))
	must(t, f.Zero(t.Context(), 5*4096, 7))
	must(t, f.Close())
	g, err := x.Create(t.Context(), "d/g", size)
	must(t, err)
	if !g.Fresh() {
		t.Error("another name of a file that was taken was taken too")
	}
	must(t, g.Close())
	e := adapters.Entry{Name: "f", Mode: 0o640, Size: size, UID: uint32(os.Getuid()), GID: uint32(os.Getgid()), Modified: time.Unix(3, 3)}
	must(t, x.Describe(t.Context(), "d/f", e))
	must(t, x.Finish(t.Context()))

	r := reader(t, filepath.Join(dir, "new"), Options{})
	found, err := r.Stat(t.Context(), "d/f")
	if err != nil || fmt.Sprintf("%+v", found) != fmt.Sprintf("%+v", e) {
		t.Errorf("%+v, %v\n%+v", found, err, e)
	}
	file, err := r.OpenFile(t.Context(), "d/f")
	must(t, err)
	defer file.Close()
	var holes []cbt.Extent
	for x, err := range file.Extents(t.Context()) {
		must(t, err)
		if x.Zero {
			holes = append(holes, x)
		}
	}
	if want := []cbt.Extent{{Offset: 4096, Length: 4096, Zero: true}, {Offset: 5 * 4096, Length: 7, Zero: true}}; fmt.Sprint(holes) != fmt.Sprint(want) {
		t.Errorf("holes: %v, want %v", holes, want)
	}
	names, err := os.ReadDir(filepath.Join(dir, "new"))
	if err != nil || len(names) != 1 {
		t.Errorf("left: %v, %v", names, err)
	}
}

// What is no file any more is neither opened nor taken, and what others may have come into goes as a whole.
func TestLeftoverForeign(t *testing.T) {
	dir := t.TempDir()
	x, err := begin(t, dir, "new")
	must(t, err)
	must(t, os.WriteFile(filepath.Join(dir, "outside"), []byte("o"), 0o600))
	must(t, x.Symlink(t.Context(), "link", "../outside"))
	must(t, x.Symlink(t.Context(), "out", ".."))
	must(t, x.Special(t.Context(), "pipe", adapters.Fifo, 0)) // to open it would never end
	must(t, create(x, "file"))
	must(t, x.Close())
	x, err = begin(t, dir, "new")
	must(t, err)
	must(t, x.Mkdir(t.Context(), "out"))
	for _, path := range []string{"link", "pipe", "out/outside"} {
		f, err := x.Create(t.Context(), path, 1)
		must(t, err)
		if !f.Fresh() {
			t.Errorf("%s was taken over", path)
		}
		must(t, f.WriteAt(t.Context(), []byte("n"), 0))
		must(t, f.Close())
	}
	if text, err := os.ReadFile(filepath.Join(dir, "outside")); err != nil || string(text) != "o" {
		t.Errorf("outside: %q, %v", text, err)
	}
	must(t, x.Describe(t.Context(), "", adapters.Entry{Type: adapters.Directory, Mode: 0o755, UID: uint32(os.Getuid()), GID: uint32(os.Getgid())}))
	if !isPrivate(x.root) {
		t.Error("the root is described before the end")
	}
	must(t, unix.Fchmod(int(x.root.Fd()), 0o755))
	must(t, x.Close())
	x, err = begin(t, dir, "new")
	must(t, err)
	if f, err := x.Create(t.Context(), "file", 1); err != nil || !f.Fresh() || f.Close() != nil {
		t.Errorf("taken from where others were: %v", err)
	}
	must(t, x.Abort(t.Context()))
}
