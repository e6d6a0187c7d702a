package reflink

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/adapters/adaptertest"
	"stillpoint.io/stillpoint/integration/lab"
)

func TestConformance(t *testing.T) {
	onPools(t, func(t *testing.T, x fixture) {
		other, err := x.lab.Pool(t.Context(), "other", x.fs.Type, poolSize)
		must(t, err)
		var count atomic.Int64
		name := func() string { return fmt.Sprintf("vol-%d.img", count.Add(1)) }
		h := adaptertest.Harness{
			Backend: "r",
			Open: func(t testing.TB) adapters.Adapter {
				a, err := Kind().Open(t.Context(), adapters.Config{Name: "r", Parameters: map[string]string{"pools": x.fs.Mount + ", " + other.Mount}})
				must(t, err)
				return a
			},
			Provision: func(t testing.TB) adapters.Adapter {
				a, err := Kind().Open(t.Context(), adapters.Config{Name: "r", Parameters: map[string]string{"pools": x.fs.Mount, "volumes": x.fs.Mount}})
				must(t, err)
				return a
			},
			Create: func(t testing.TB, size int64) adaptertest.Volume {
				return newFile(t, filepath.Join(x.fs.Mount, name()), size)
			},
			Absent: func(t testing.TB) adapters.VolumeID {
				at := name()
				t.Cleanup(func() { os.Remove(filepath.Join(x.fs.Mount, at)) })
				return typed(x.uuid(t) + "/" + at)
			},
			Twin: func(t testing.TB, v adaptertest.Volume, size int64) adaptertest.Volume {
				return newFile(t, filepath.Join(other.Mount, filepath.Base(v.ID().ID)), size)
			},
			Unreachable: func(t testing.TB) adapters.VolumeID {
				return typed("01234567-89ab-cdef-0123-456789abcdef/disk.img")
			},
			Foreign: func(t testing.TB, v adaptertest.Volume, name string) {
				found, err := x.Volume(t.Context(), v.ID())
				must(t, err)
				at, err := x.locate(t.Context(), found.ID)
				must(t, err)
				folder, err := at.makeFolder()
				must(t, err)
				folder.Close()
				file := x.file(adapters.SnapshotID{Volume: found.ID, Name: name})
				must(t, os.WriteFile(file, nil, 0o600))
				t.Cleanup(func() { os.Remove(file) })
			},
			Use: func(t testing.TB, v adaptertest.Volume) func() {
				_, f, err := lab.Loop(v.ID().ID)
				must(t, err)
				return func() { f.Close() }
			},
			Wrong: []string{"", "relative/path", "/dev/null", x.fs.Mount, x.uuid(t), x.uuid(t) + "/", x.uuid(t) + "/../etc/passwd", x.uuid(t) + "/a//b",
				x.uuid(t) + "/" + folderName + "/x", strings.ToUpper(x.uuid(t)) + "/a", "/a\x00b"},
			Staged: func(t testing.TB, v adaptertest.Volume) int { return drafts(t, x.fs.Mount) },
		}
		if x.fs.Type == "btrfs" {
			h.CreateTree = func(t testing.TB) adaptertest.TreeVolume { return plantTree(t, x.fs.Mount, name()) }
			h.AbsentTree = func(t testing.TB) adapters.VolumeID {
				at := name()
				t.Cleanup(func() { removeTree(t, x.fs.Mount, at) })
				return typed(x.uuid(t) + "/" + at)
			}
		}
		adaptertest.Run(t, h)
	})
}

// file is a volume as its user sees it.
type file string

func newFile(t testing.TB, at string, size int64) file {
	must(t, lab.Sparse(at, size))
	t.Cleanup(func() { os.Remove(at) })
	return file(at)
}

func (f file) ID() adapters.VolumeID { return typed(string(f)) }

func (f file) open(do func(*os.File) error) error {
	g, err := os.OpenFile(string(f), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer g.Close()
	return do(g)
}

func (f file) WriteAt(p []byte, off int64) (n int, err error) {
	err = f.open(func(g *os.File) error {
		n, err = g.WriteAt(p, off)
		return err
	})
	return n, err
}

func (f file) Zero(off, length int64) error {
	return f.open(func(g *os.File) error {
		return unix.Fallocate(int(g.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, length)
	})
}

func (f file) Resize(size int64) error { return os.Truncate(string(f), size) }
