package treefs

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
	"stillpoint.io/stillpoint/integration/lab"
)

func reader(t *testing.T, dir string, o Options) *Reader {
	t.Helper()
	f, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	r := NewReader(f, o)
	t.Cleanup(func() { r.Close() })
	return r
}

func begin(t *testing.T, parent, name string) (*Target, error) {
	t.Helper()
	f, err := os.Open(parent)
	if err != nil {
		t.Fatal(err)
	}
	return Begin(Directory("test", f, name, ".unfinished-"+name))
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// Links that lead out, dot-dot, and absolute paths read nothing outside of the tree.
func TestReaderStaysInside(t *testing.T) {
	dir := t.TempDir()
	must(t, os.WriteFile(filepath.Join(dir, "secret"), []byte("secret"), 0o600))
	root := filepath.Join(dir, "root")
	must(t, os.Mkdir(root, 0o755))
	must(t, os.Symlink("..", filepath.Join(root, "up")))
	must(t, os.Symlink("/etc", filepath.Join(root, "etc")))
	must(t, os.Symlink("../secret", filepath.Join(root, "link")))
	r := reader(t, root, Options{})
	for _, path := range []string{"up/secret", "../secret", "etc/passwd", "/etc/passwd", "link", "./up", "up//secret", "up/../../secret", "a\x00b"} {
		if f, err := r.OpenFile(t.Context(), path); err == nil {
			f.Close()
			t.Errorf("%q was opened", path)
		}
		if path != "link" {
			if e, err := r.Stat(t.Context(), path); err == nil {
				t.Errorf("%q is %+v", path, e)
			}
		}
		for e, err := range r.Entries(t.Context(), path) {
			if err == nil {
				t.Errorf("%q has %+v", path, e)
			}
		}
	}
	if e, err := r.Stat(t.Context(), "link"); err != nil || e.Type != adapters.Symlink || e.Target != "../secret" {
		t.Errorf("%+v, %v", e, err)
	}
}

// Names and links that reach out make nothing outside of the tree, in whatever order they come.
func TestTargetStaysInside(t *testing.T) {
	dir := lab.Test(t).Dir
	must(t, os.Mkdir(filepath.Join(dir, "outside"), 0o755))
	must(t, os.WriteFile(filepath.Join(dir, "outside", "kept"), []byte("kept"), 0o644))
	x, err := begin(t, dir, "new")
	must(t, err)
	ctx := t.Context()
	must(t, x.Symlink(ctx, "out", "../outside"))
	must(t, x.Symlink(ctx, "file", "../outside/kept"))
	must(t, x.Mkdir(ctx, "d"))
	for what, err := range map[string]error{
		"mkdir through a link":    x.Mkdir(ctx, "out/evil"),
		"mkdir over a link":       x.Mkdir(ctx, "out"),
		"mkdir dot-dot":           x.Mkdir(ctx, "../outside/evil"),
		"mkdir inner dot-dot":     x.Mkdir(ctx, "d/../../outside/evil"),
		"mkdir absolute":          x.Mkdir(ctx, filepath.Join(dir, "outside/evil")),
		"mkdir the root":          x.Mkdir(ctx, ""),
		"mkdir twice":             x.Mkdir(ctx, "d"),
		"mkdir with an empty":     x.Mkdir(ctx, "d//e"),
		"mkdir too long":          x.Mkdir(ctx, strings.Repeat("n", 300)),
		"symlink through a link":  x.Symlink(ctx, "out/evil", "x"),
		"symlink of nothing":      x.Symlink(ctx, "empty", ""),
		"special through a link":  x.Special(ctx, "out/evil", adapters.Fifo, 0),
		"special that is none":    x.Special(ctx, "evil", adapters.RegularFile, 0),
		"link from outside":       x.Link(ctx, "out/kept", "stolen"),
		"link to outside":         x.Link(ctx, "file", "out/evil"),
		"link from dot-dot":       x.Link(ctx, "../outside/kept", "stolen"),
		"link to a name with NUL": x.Link(ctx, "file", "a\x00b"),
		"describe through a link": x.Describe(ctx, "out/kept", adapters.Entry{Mode: 0}),
		"create over a link":      create(x, "file"),
		"create through a link":   create(x, "out/evil"),
		"create dot-dot":          create(x, ".."),
	} {
		if err == nil {
			t.Errorf("%s succeeded", what)
		} else if k := fault.KindOf(err); k != fault.Invalid && k != fault.NotFound && k != fault.Busy {
			t.Errorf("%s: %v (%v)", what, err, k)
		}
	}
	must(t, x.Describe(ctx, "file", adapters.Entry{Type: adapters.Symlink, UID: 12, GID: 13, Modified: time.Unix(5, 0)}))
	must(t, x.Finish(ctx))
	entries, err := os.ReadDir(filepath.Join(dir, "outside"))
	if err != nil || len(entries) != 1 {
		t.Errorf("outside there is %v, %v", entries, err)
	}
	info, err := os.Stat(filepath.Join(dir, "outside", "kept"))
	if err != nil || info.Mode() != 0o644 || info.ModTime().Unix() == 5 {
		t.Errorf("outside changed: %v, %v", info, err)
	}
}

func create(x *Target, path string) error {
	f, err := x.Create(context.Background(), path, 1)
	if err == nil {
		f.Close()
	}
	return err
}

// A path of any length is read and made.
func TestDeep(t *testing.T) {
	dir := t.TempDir()
	x, err := begin(t, dir, "new")
	must(t, err)
	path := ""
	for range 60 {
		path = join(path, strings.Repeat("d", 200))
		must(t, x.Mkdir(t.Context(), path))
	}
	must(t, create(x, join(path, "f")))
	must(t, x.Describe(t.Context(), join(path, "f"), adapters.Entry{Mode: 0o644, UID: uint32(os.Getuid()), GID: uint32(os.Getgid())}))
	must(t, x.Finish(t.Context()))
	r := reader(t, filepath.Join(dir, "new"), Options{})
	e, err := r.Stat(t.Context(), join(path, "f"))
	if err != nil || e.Size != 1 || len(path) < 12000 {
		t.Errorf("%+v, %v", e, err)
	}
	for e, err := range r.Entries(t.Context(), path) {
		if err != nil || e.Name != "f" {
			t.Errorf("%+v, %v", e, err)
		}
	}
}

// Directories come first, then the rest, each by the bytes of their names, over many batches.
func TestOrder(t *testing.T) {
	dir := t.TempDir()
	var want []string
	for i := range 3*batch + 7 {
		n := fmt.Sprintf("n%c%d", byte(0x80+i%100), i*7919%10007)
		if i%3 == 0 {
			must(t, os.Mkdir(filepath.Join(dir, n), 0o700))
			n = "\x00" + n
		} else {
			must(t, os.WriteFile(filepath.Join(dir, n), nil, 0o600))
		}
		want = append(want, n)
	}
	slices.Sort(want)
	var got []string
	for e, err := range reader(t, dir, Options{}).Entries(t.Context(), "") {
		must(t, err)
		if e.Type == adapters.Directory {
			e.Name = "\x00" + e.Name
		}
		got = append(got, e.Name)
	}
	if !slices.Equal(got, want) {
		t.Errorf("%q", got)
	}
}

// What a dead process left is removed; what a living one has is Busy.
func TestBegin(t *testing.T) {
	dir := t.TempDir()
	x, err := begin(t, dir, "new")
	must(t, err)
	must(t, x.Mkdir(t.Context(), "old"))
	if _, err := begin(t, dir, "new"); fault.KindOf(err) != fault.Busy {
		t.Errorf("twice: %v", err)
	}
	must(t, x.Close()) // as the death of its process does
	x, err = begin(t, dir, "new")
	must(t, err)
	must(t, x.Mkdir(t.Context(), "old"))
	must(t, x.Finish(t.Context()))
	if _, err := begin(t, dir, "new"); fault.KindOf(err) != fault.Busy {
		t.Errorf("over what exists: %v", err)
	}
	x, err = begin(t, dir, "other")
	must(t, err)
	must(t, x.Mkdir(t.Context(), "d"))
	must(t, x.Abort(t.Context()))
	if err := x.Mkdir(t.Context(), "e"); fault.KindOf(err) != fault.Invalid {
		t.Errorf("after Abort: %v", err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 || entries[0].Name() != "new" {
		t.Errorf("left: %v, %v", entries, err)
	}
}

// Attributes come back as they were, and those that a directory would hand down are gone.
func TestAttributes(t *testing.T) {
	dir := lab.Test(t).Dir
	acl := []byte{2, 0, 0, 0, 1, 0, 7, 0, 255, 255, 255, 255, 2, 0, 6, 0, 232, 3, 0, 0, 4, 0, 5, 0, 255, 255, 255, 255, 16, 0, 7, 0, 255, 255, 255, 255, 32, 0, 5, 0, 255, 255, 255, 255}
	must(t, unix.Setxattr(dir, "system.posix_acl_default", acl, 0))
	x, err := begin(t, dir, "new")
	must(t, err)
	must(t, create(x, "f"))
	attributes := []adapters.Attribute{{Name: "user.a", Value: []byte{0, 1, 255}}, {Name: "user.big", Value: bytes.Repeat([]byte("b"), 2000)}, {Name: "user.empty", Value: []byte{}}}
	e := adapters.Entry{Name: "f", Mode: 0o4755, Size: 1, UID: 7, GID: 8, Modified: time.Date(1905, 1, 2, 3, 4, 5, 6, time.UTC), Attributes: attributes}
	must(t, x.Describe(t.Context(), "f", e))
	must(t, x.Describe(t.Context(), "", adapters.Entry{Type: adapters.Directory, Mode: 0o1777, Modified: time.Unix(9, 9)}))
	must(t, x.Finish(t.Context()))
	r := reader(t, filepath.Join(dir, "new"), Options{})
	got, err := r.Stat(t.Context(), "f")
	must(t, err)
	if fmt.Sprintf("%+v", got) != fmt.Sprintf("%+v", e) {
		t.Errorf("%+v\n%+v", got, e)
	}
	root, err := r.Stat(t.Context(), "")
	if err != nil || root.Mode != 0o1777 || len(root.Attributes) > 0 || !root.Modified.Equal(time.Unix(9, 9)) {
		t.Errorf("%+v, %v", root, err)
	}
}
