package reflink

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/adapters/adaptertest"
	"stillpoint.io/stillpoint/fault"
	"stillpoint.io/stillpoint/integration/lab"
)

// grove is a live subvolume.
type grove struct{ lab.Tree }

func (g grove) ID() adapters.VolumeID { return typed(g.Dir) }

// plantTree makes an empty subvolume in a pool, and removes it at the end.
func plantTree(t testing.TB, pool, name string) grove {
	t.Helper()
	dir, err := os.Open(pool)
	must(t, err)
	defer dir.Close()
	must(t, makeSubvolume(dir, name))
	t.Cleanup(func() { removeTree(t, pool, name) })
	return grove{lab.Tree{Dir: filepath.Join(pool, name)}}
}

func removeTree(t testing.TB, pool, name string) {
	dir, err := os.Open(pool)
	must(t, err)
	defer dir.Close()
	must(t, destroySubvolume(dir, name))
}

func (x fixture) tree(t testing.TB, id adapters.SnapshotID, base *adapters.SnapshotID) adapters.Tree {
	t.Helper()
	tree, err := x.OpenTree(t.Context(), id, base)
	must(t, err)
	t.Cleanup(func() { must(t, tree.Close()) })
	return tree
}

// Random histories of a subvolume: whatever pair of its snapshots is compared, what is called unchanged is.
func TestTreeHistory(t *testing.T) {
	x := newFixture(t, "btrfs")
	for seed := range uint64(4) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			v := plantTree(t, x.fs.Mount, fmt.Sprint("grove-", seed))
			r := rand.New(rand.NewPCG(seed, 7))
			m := adaptertest.NewTreeModel(v)
			type moment struct {
				id    adapters.SnapshotID
				model *adaptertest.TreeModel
			}
			var all []moment
			must(t, m.Grow(r, 120))
			vol, err := x.Volume(t.Context(), v.ID())
			must(t, err)
			unchanged := 0
			for i := range 12 {
				must(t, m.Grow(r, r.IntN(9)))
				now := moment{x.cut(t, vol.ID, fmt.Sprint("m", i)).ID, m.Clone()}
				for _, base := range append(all, now) {
					tree, err := x.OpenTree(t.Context(), now.id, &base.id)
					must(t, err)
					n, err := now.model.Compare(t.Context(), tree, base.model)
					if err != nil {
						t.Fatalf("%s since %s: %v", now.id, base.id, err)
					}
					unchanged += n
					must(t, tree.Close())
				}
				all = append(all, now)
			}
			if unchanged < 500 {
				t.Errorf("only %d entries were called unchanged", unchanged)
			}
			for _, m := range all {
				must(t, x.DeleteSnapshot(t.Context(), m.id))
			}
		})
	}
}

// A change in one directory of a thousand leaves the others unchanged, and its cost does not follow their number.
func TestTreeOneChange(t *testing.T) {
	x := newFixture(t, "btrfs")
	v := plantTree(t, x.fs.Mount, "grove")
	for i := range 1000 {
		must(t, v.Mkdir(fmt.Sprintf("d%04d", i)))
		must(t, v.Write(fmt.Sprintf("d%04d/f", i), []byte("x"), 0))
	}
	base := x.cut(t, v.ID(), "base").ID
	must(t, v.Write("d0500/f", []byte("y"), 0))
	next := x.cut(t, v.ID(), "next").ID
	changed := 0
	for e, err := range x.tree(t, next, &base).Entries(t.Context(), "") {
		must(t, err)
		if !e.Unchanged {
			changed++
			if e.Name != "d0500" {
				t.Errorf("%s is called changed", e.Name)
			}
		}
	}
	if changed != 1 {
		t.Errorf("%d changed", changed)
	}
	for _, same := range [][2]adapters.SnapshotID{{base, base}, {next, next}} {
		e, err := x.tree(t, same[0], &same[1]).Stat(t.Context(), "")
		if err != nil || !e.Unchanged {
			t.Errorf("compared with itself: %+v, %v", e, err)
		}
	}
	if e, err := x.tree(t, base, &next).Stat(t.Context(), ""); err != nil || e.Unchanged {
		t.Errorf("the older since the younger: %+v, %v", e, err)
	}
}

// What was only read is unchanged, though btrfs notes when that was; what was written and has its old size and times is
// not.
func TestTreeTouched(t *testing.T) {
	x := newFixture(t, "btrfs")
	v := plantTree(t, x.fs.Mount, "grove")
	for i := range 300 {
		must(t, v.Mkdir(fmt.Sprint("d", i)))
		for _, size := range []int{10, 3000, 100_000} {
			must(t, v.Write(fmt.Sprintf("d%d/f%d", i, size), make([]byte, size), 0))
		}
	}
	at := func(path string) unix.Stat_t {
		var st unix.Stat_t
		must(t, unix.Lstat(filepath.Join(v.Dir, path), &st))
		return st
	}
	before := at("d7/f100000")
	base := x.cut(t, v.ID(), "base").ID
	now := []unix.Timespec{{Nsec: unix.UTIME_NOW}, {Nsec: unix.UTIME_OMIT}}
	for i := range 300 {
		for _, name := range []string{"", "/f10", "/f3000", "/f100000"} {
			must(t, unix.UtimesNanoAt(unix.AT_FDCWD, filepath.Join(v.Dir, fmt.Sprint("d", i)+name), now, 0))
		}
	}
	for _, f := range []string{"d5/f10", "d6/f3000", "d7/f100000"} {
		st := at(f)
		must(t, v.Write(f, []byte{1}, 5))
		must(t, unix.UtimesNanoAt(unix.AT_FDCWD, filepath.Join(v.Dir, f), []unix.Timespec{st.Atim, st.Mtim}, 0))
	}
	if after := at("d7/f100000"); after.Size != before.Size || after.Mtim != before.Mtim || after.Blocks != before.Blocks {
		t.Fatalf("%+v was %+v", after, before)
	}
	next := x.cut(t, v.ID(), "next").ID
	tree := x.tree(t, next, &base)
	for e, err := range tree.Entries(t.Context(), "") {
		must(t, err)
		if changed := e.Name == "d5" || e.Name == "d6" || e.Name == "d7"; e.Unchanged == changed {
			t.Errorf("%s: unchanged %v", e.Name, e.Unchanged)
		}
	}
	for path, unchanged := range map[string]bool{"d5/f10": false, "d5/f3000": true, "d6/f3000": false, "d6/f10": true, "d7/f100000": false, "d7/f10": true} {
		if e, err := tree.Stat(t.Context(), path); err != nil || e.Unchanged != unchanged {
			t.Errorf("%s: %+v, %v", path, e, err)
		}
	}
}

// A subvolume that takes another's place has its inodes' numbers, and generations older than the base: nothing of it is
// called unchanged.
func TestTreeRollback(t *testing.T) {
	x := newFixture(t, "btrfs")
	v := plantTree(t, x.fs.Mount, "grove")
	must(t, v.Write("f", []byte("one"), 0))
	pool, err := os.Open(x.fs.Mount)
	must(t, err)
	defer pool.Close()
	live, err := os.Open(v.Dir)
	must(t, err)
	must(t, snapshotSubvolume(pool, "kept", live))
	defer removeTree(t, x.fs.Mount, "kept")
	must(t, v.Write("f", []byte("two"), 0))
	base := x.cut(t, v.ID(), "base").ID
	must(t, live.Close())
	must(t, destroySubvolume(pool, "grove"))
	kept, err := os.Open(filepath.Join(x.fs.Mount, "kept"))
	must(t, err)
	defer kept.Close()
	must(t, snapshotSubvolume(pool, "grove", kept)) // read-only, which is as good here
	next := x.cut(t, v.ID(), "next").ID
	tree := x.tree(t, next, &base)
	for _, path := range []string{"", "f"} {
		if e, err := tree.Stat(t.Context(), path); err != nil || e.Unchanged {
			t.Errorf("%q: %+v, %v", path, e, err)
		}
	}
}

// Subvolumes in a subvolume are not part of its snapshots, and what stands there for them does not change by itself.
func TestTreeNested(t *testing.T) {
	x := newFixture(t, "btrfs")
	v := plantTree(t, x.fs.Mount, "grove")
	must(t, v.Mkdir("d"))
	inner := plantTree(t, filepath.Join(v.Dir, "d"), "inner")
	must(t, inner.Write("f", []byte("x"), 0))
	base := x.cut(t, v.ID(), "base").ID
	must(t, inner.Write("f", []byte("y"), 0))
	next := x.cut(t, v.ID(), "next").ID
	tree := x.tree(t, next, &base)
	var first adapters.Entry
	for range 2 {
		e, err := tree.Stat(t.Context(), "d/inner")
		must(t, err)
		if e.Type != adapters.Directory || e.Modified.Unix() != 0 {
			t.Errorf("%+v", e)
		}
		if first = e; first.Modified != e.Modified {
			t.Errorf("%+v", e)
		}
		for e, err := range tree.Entries(t.Context(), "d/inner") {
			t.Errorf("in it there is %+v, %v", e, err)
		}
	}
	// Mounted by itself, a subvolume has its snapshots in its own root, and they are no part of it.
	at := filepath.Join(x.lab.Dir, "alone")
	must(t, os.Mkdir(at, 0o700))
	must(t, unix.Mount(x.fs.Device, at, "btrfs", 0, "subvol=grove"))
	alone := fixture{newAdapter(t, at), x.fs, x.lab}
	s := alone.cut(t, typed(at), "alone")
	names := 0
	for e, err := range alone.tree(t, s.ID, nil).Entries(t.Context(), "") {
		must(t, err)
		names++
		if e.Name != "d" {
			t.Errorf("%+v", e)
		}
	}
	if _, err := os.Stat(filepath.Join(at, folderName)); err != nil || names != 1 {
		t.Errorf("%d names, %v", names, err)
	}
	must(t, alone.DeleteSnapshot(t.Context(), s.ID))
	must(t, os.Remove(filepath.Join(at, folderName)))
}

// A process that dies while it makes or deletes a snapshot of a subvolume leaves a record that nobody takes for one.
func TestTreeHalf(t *testing.T) {
	x := newFixture(t, "btrfs")
	v := plantTree(t, x.fs.Mount, "grove")
	must(t, v.Write("f", []byte("x"), 0))
	s := x.cut(t, v.ID(), "s")
	folder, err := os.Open(filepath.Join(x.fs.Mount, folderName))
	must(t, err)
	defer folder.Close()
	half := func() { must(t, destroySubvolume(folder, treeName(filepath.Base(x.file(s.ID))))) }
	half()
	_, err = x.Snapshot(t.Context(), s.ID)
	want(t, "half a snapshot", err, fault.NotFound)
	for s, err := range x.Snapshots(t.Context(), adapters.Filter{Cutting: true}) {
		t.Errorf("listed: %+v, %v", s, err)
	}
	again := x.cut(t, v.ID(), "s")
	if again.Created.Equal(s.Created) {
		t.Error("half a snapshot was taken for one")
	}
	half()
	must(t, x.DeleteSnapshot(t.Context(), s.ID))
	if _, err := os.Lstat(x.file(s.ID)); !os.IsNotExist(err) {
		t.Errorf("left: %v", err)
	}
	_, err = x.BeginTree(context.Background(), adapters.TreeSpec{ID: again.ID.Volume, Token: "t"})
	want(t, "over a volume", err, fault.Busy)
}

// On XFS there are no subvolumes.
func TestTreeXFS(t *testing.T) {
	x := newFixture(t, "xfs")
	_, err := x.BeginTree(t.Context(), adapters.TreeSpec{ID: typed(filepath.Join(x.fs.Mount, "new")), Token: "t"})
	want(t, "a tree on XFS", err, fault.Unsupported)
	must(t, os.Mkdir(filepath.Join(x.fs.Mount, "dir"), 0o700))
	_, err = x.Volume(t.Context(), typed(filepath.Join(x.fs.Mount, "dir")))
	want(t, "a directory", err, fault.Invalid)
}
