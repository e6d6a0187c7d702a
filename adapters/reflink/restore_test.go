package reflink

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

// TestRestoreOverOldBytes: a target full of old bytes reads as what was written, and zeros elsewhere, aligned or not.
func TestRestoreOverOldBytes(t *testing.T) {
	onPools(t, func(t *testing.T, x fixture) {
		ctx := t.Context()
		const size = 1<<20 + 4096
		at := filepath.Join(x.fs.Mount, "old")
		old := bytes.Repeat([]byte{0xA5}, size+512)
		must(t, os.WriteFile(at, old, 0o600))
		spec := adapters.VolumeSpec{ID: typed(at), Size: size, Token: "t", Overwrite: true}
		target, err := x.Begin(ctx, spec)
		must(t, err)
		if target.ReadsZero() {
			t.Error("an old volume is said to read as zeros")
		}
		wanted := bytes.Clone(old)
		p := aligned(64 << 10)
		fill(p, random(1))
		for _, w := range []struct{ at, n int }{{0, 4096}, {8192, 64 << 10}, {100_001, 5000}, {size - 777, 777}} {
			must(t, target.WriteAt(ctx, p[:w.n], int64(w.at)))
			copy(wanted[w.at:], p[:w.n])
		}
		for _, z := range []struct{ at, n int }{{200_000, 1}, {204_800, 40_960}, {300_001, 100_000}, {4096, 4096}} {
			must(t, target.Zero(ctx, int64(z.at), int64(z.n)))
			clear(wanted[z.at : z.at+z.n])
		}
		for _, b := range [][2]int64{{-1, 1}, {size, 1}, {size - 1, 2}, {1 << 62, 1 << 62}} {
			want(t, "outside", target.Zero(ctx, b[0], b[1]), fault.Invalid)
		}
		want(t, "outside", target.WriteAt(ctx, p[:2], size-1), fault.Invalid)
		if _, err := x.Begin(ctx, spec); fault.KindOf(err) != fault.Busy {
			t.Errorf("a second restore onto it: %v", err)
		}
		v, err := target.Commit(ctx)
		must(t, err)
		if v.Size != size+512 {
			t.Errorf("size %d", v.Size)
		}
		if got, err := os.ReadFile(at); err != nil || !bytes.Equal(got, wanted) {
			t.Errorf("read something else, %v", err)
		}
	})
}

// TestRestoreLeavesNothing: what a new target is called is nobody's business but ours, and Abort removes it.
func TestRestoreLeavesNothing(t *testing.T) {
	onPools(t, func(t *testing.T, x fixture) {
		ctx := t.Context()
		spec := adapters.VolumeSpec{ID: typed(x.fs.Mount + "/dir/new"), Size: 1 << 20, Token: "t"}
		_, err := x.Begin(ctx, spec)
		want(t, "in a folder that is missing", err, fault.NotFound)
		must(t, os.Mkdir(x.fs.Mount+"/dir", 0o755))
		target, err := x.Begin(ctx, spec)
		must(t, err)
		_, err = x.Begin(ctx, spec)
		want(t, "the same restore twice at once", err, fault.Busy)
		must(t, target.WriteAt(ctx, []byte("kept"), 5))
		must(t, target.Close())

		smaller := spec
		smaller.Size--
		_, err = x.Begin(ctx, smaller)
		want(t, "another size", err, fault.Invalid)
		canonical := spec
		canonical.ID = typed(x.uuid(t) + "/dir/new")
		if target, err = x.Begin(ctx, canonical); err != nil {
			t.Fatal(err)
		}
		other := spec
		other.Token = "u"
		second, err := x.Begin(ctx, other)
		must(t, err)
		if v, err := target.Commit(ctx); err != nil || v.ID != canonical.ID {
			t.Errorf("committed %v, %v", v.ID, err)
		}
		if got, err := os.ReadFile(x.fs.Mount + "/dir/new"); err != nil || string(got[5:9]) != "kept" {
			t.Errorf("what the first one wrote is gone: %v", err)
		}
		if _, err := unix.Getxattr(x.fs.Mount+"/dir/new", restoreAttr, nil); err != unix.ENODATA {
			t.Errorf("the finished volume keeps the attribute of a restore: %v", err)
		}
		_, err = second.Commit(ctx)
		want(t, "another restore of the same volume that comes too late", err, fault.Busy)
		_, err = x.Begin(ctx, spec)
		want(t, "again, after it was finished", err, fault.Busy)
		must(t, os.Remove(x.fs.Mount+"/dir/new"))
		if second, err = x.Begin(ctx, other); err != nil {
			t.Fatal(err)
		}
		must(t, second.Abort(ctx))
		left, err := os.ReadDir(x.fs.Mount + "/dir")
		if err != nil || len(left) != 0 {
			t.Errorf("left: %v, %v", left, err)
		}

		at := x.fs.Mount + "/dir/" + targetPrefix + adapters.ShortName(canonical.ID.ID+"\x00t")
		must(t, os.WriteFile(at, []byte("a stranger's"), 0o600))
		_, err = x.Begin(ctx, spec)
		want(t, "a stranger's file under our temporary name", err, fault.Busy)
		must(t, os.Remove(at))
		must(t, os.Symlink("/etc/passwd", at))
		_, err = x.Begin(ctx, spec)
		want(t, "a link under our temporary name", err, fault.Invalid)
	})
}

// TestInUse: every use of a volume that can be seen keeps a restore off.
func TestInUse(t *testing.T) {
	onPools(t, func(t *testing.T, x fixture) {
		ctx := t.Context()
		at, id := x.volume(t, "v", 1<<20)
		spec := adapters.VolumeSpec{ID: id, Size: 1 << 20, Token: "t", Overwrite: true}
		must(t, os.Link(at, at+"-link"))
		for what, flags := range map[string]int{"reading": os.O_RDONLY, "writing": os.O_RDWR} {
			f, err := os.OpenFile(at+"-link", flags, 0)
			must(t, err)
			_, err = x.Begin(ctx, spec)
			want(t, "open for "+what, err, fault.Busy)
			must(t, f.Close())
		}
		large := spec
		large.Size++
		_, err := x.Begin(ctx, large)
		want(t, "too small", err, fault.Invalid)
		missing := spec
		missing.ID.ID += "-missing"
		_, err = x.Begin(ctx, missing)
		want(t, "nothing to overwrite", err, fault.NotFound)
		f, err := os.Open(at)
		must(t, err)
		must(t, setFlag(f, flagImmutable, true))
		_, err = x.Begin(ctx, spec)
		want(t, "immutable", err, fault.Unsupported)
		if !strings.Contains(err.Error(), "chattr -i") {
			t.Errorf("the error names no remedy: %v", err)
		}
		s := x.cut(t, id, "s") // an immutable volume can be snapshotted
		must(t, x.DeleteSnapshot(ctx, s.ID))
		must(t, setFlag(f, flagImmutable, false))
		must(t, f.Close())
		must(t, x.Stage(ctx, id, "s")) // what is staged is not a use
		target, err := x.Begin(ctx, spec)
		must(t, err)
		must(t, target.Abort(ctx))
	})
}

// TestFull: a pool without room fails a restore and a snapshot, and keeps what it has. Half a clone is no snapshot.
func TestFull(t *testing.T) {
	onPools(t, func(t *testing.T, x fixture) {
		ctx := t.Context()
		scatter(t, x.fs.Mount+"/v", 8000)
		v, err := x.Volume(ctx, typed(x.fs.Mount+"/v"))
		must(t, err)
		_, err = x.Gate(ctx, ids(v.ID)) // makes the folder
		must(t, err)
		target, err := x.Begin(ctx, adapters.VolumeSpec{ID: typed(x.fs.Mount + "/new"), Size: 2 * poolSize, Token: "t"})
		must(t, err)
		// A file keeps room for inodes: the snapshot is to fail in the middle of its clone.
		must(t, os.WriteFile(filepath.Join(x.fs.Mount, folderName, "not-ours"), nil, 0o600))
		x.occupy(t, 1<<20)
		p := aligned(1 << 20)
		fill(p, random(1))
		for off := int64(0); err == nil && off < poolSize; off += int64(len(p)) {
			err = target.WriteAt(ctx, p, off)
		}
		want(t, "a full pool", err, fault.Exhausted)
		_, err = x.Gate(ctx, ids(v.ID))
		want(t, "a full pool: gate", err, fault.Exhausted)
		content, err := os.ReadFile(x.fs.Mount + "/v")
		must(t, err)
		n := 0
		for ; n < 5; n++ { // on XFS soon the metadata of the next clone does not fit
			s, err := x.CreateSnapshot(ctx, v.ID, fmt.Sprint(n))
			if err != nil {
				want(t, "a full pool: snapshot", err, fault.Exhausted)
				break
			}
			must(t, x.Publish(ctx, s.ID, adapters.Notes{}))
			if !bytes.Equal(x.read(t, s.ID), content) {
				t.Fatalf("snapshot %d is half a snapshot", n)
			}
		}
		if got := x.list(t, adapters.Filter{Cutting: true}); len(got) != n {
			t.Errorf("%d snapshots succeeded, listed are %v", n, got)
		}
		must(t, target.Abort(ctx))
		must(t, os.Remove(x.fs.Mount+"/full"))
		for i := range n {
			must(t, x.DeleteSnapshot(ctx, adapters.SnapshotID{Volume: v.ID, Name: fmt.Sprint(i)}))
		}
		if _, err := x.CreateSnapshot(ctx, v.ID, "s"); err != nil {
			t.Errorf("with room again: %v", err)
		}
	})
}

// occupy fills the pool with a file until less than free bytes are left.
func (x fixture) occupy(t testing.TB, free int64) {
	t.Helper()
	f, err := os.Create(x.fs.Mount + "/full")
	must(t, err)
	defer f.Close()
	for at := int64(0); ; {
		var fs unix.Statfs_t
		must(t, unix.Statfs(x.fs.Mount, &fs))
		left := int64(fs.Bavail) * fs.Bsize
		if left < free {
			return
		}
		n := max(64<<10, left/2)
		if err := unix.Fallocate(int(f.Fd()), 0, at, n); err == unix.ENOSPC {
			return
		}
		at += n
		must(t, f.Sync())
	}
}
