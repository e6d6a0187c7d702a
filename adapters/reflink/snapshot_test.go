package reflink

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

func TestLife(t *testing.T) {
	onPools(t, func(t *testing.T, x fixture) {
		ctx := t.Context()
		at, id := x.volume(t, "dir/a b@%.img", 1<<20)
		before, err := os.ReadFile(at)
		must(t, err)

		s, err := x.CreateSnapshot(ctx, id, "first")
		must(t, err)
		if s.Mark != adapters.Cutting || s.State != adapters.Ready || s.Size != 1<<20 || s.Wanted != "first" || s.ID.Volume != id {
			t.Fatalf("made %+v", s)
		}
		must(t, os.WriteFile(at, bytes.Repeat([]byte{7}, 2<<20), 0o600))
		again, err := x.CreateSnapshot(ctx, id, "first")
		must(t, err)
		if again.Size != s.Size || !again.Created.Equal(s.Created) {
			t.Errorf("the second call made another: %+v", again)
		}
		_, err = x.Open(ctx, s.ID)
		want(t, "opening a cutting snapshot", err, fault.Invalid)
		if got := x.list(t, adapters.Filter{}); len(got) != 0 {
			t.Errorf("a cutting snapshot is listed: %v", got)
		}

		for _, cut := range []string{"c1", "c2"} { // twice: the second notes win
			must(t, x.Publish(ctx, s.ID, adapters.Notes{Cut: cut, Unverified: []string{"é"}}))
		}
		got, err := x.Snapshot(ctx, s.ID)
		must(t, err)
		if got.Mark != adapters.Verified || got.Notes.Cut != "c2" || got.Notes.Unverified[0] != "é" {
			t.Errorf("published %+v", got)
		}
		if b := x.read(t, s.ID); !bytes.Equal(b, before) {
			t.Error("the snapshot is not the volume at its instant")
		}
		if f, err := os.OpenFile(x.file(s.ID), os.O_RDWR, 0); err == nil {
			f.Close()
			t.Error("a published snapshot can be opened for writing")
		}
		if st, err := os.Stat(x.file(s.ID)); err != nil || st.Mode() != 0o400 {
			t.Errorf("mode %v, %v", st.Mode(), err)
		}
		if got := x.list(t, adapters.Filter{Volume: id}); !slices.Equal(got, []string{"first"}) {
			t.Errorf("listed %v", got)
		}
		for range 2 {
			must(t, x.DeleteSnapshot(ctx, s.ID))
		}
		_, err = x.Snapshot(ctx, s.ID)
		want(t, "a deleted snapshot", err, fault.NotFound)
		want(t, "publishing a deleted snapshot", x.Publish(ctx, s.ID, adapters.Notes{}), fault.NotFound)
	})
}

func (x fixture) list(t testing.TB, f adapters.Filter) []string {
	t.Helper()
	var names []string
	for s, err := range x.Snapshots(t.Context(), f) {
		must(t, err)
		if strings.HasPrefix(s.ID.Volume.ID, x.uuid(t)) {
			names = append(names, s.Wanted)
		}
	}
	slices.Sort(names)
	return names
}

func (x fixture) uuid(t testing.TB) string {
	t.Helper()
	f, err := os.Open(x.fs.Mount)
	must(t, err)
	defer f.Close()
	p, err := identify(f, x.fs.Type)
	must(t, err)
	return p.uuid
}

// TestForeign: what does not bear our mark is invisible and safe.
func TestForeign(t *testing.T) {
	onPools(t, func(t *testing.T, x fixture) {
		ctx := t.Context()
		_, id := x.volume(t, "v", 1<<20)
		ours := x.cut(t, id, "ours")
		sid := adapters.SnapshotID{Volume: id, Name: "theirs"}
		for what, make := range map[string]func() error{
			"a file":               func() error { return os.WriteFile(x.file(sid), nil, 0o600) },
			"a folder":             func() error { return os.Mkdir(x.file(sid), 0o700) },
			"a symbolic link":      func() error { return os.Symlink(x.file(ours.ID), x.file(sid)) },
			"another's snapshot":   func() error { return copyWithRecord(x.file(ours.ID), x.file(sid)) },
			"a pipe":               func() error { return unix.Mkfifo(x.file(sid), 0o600) },
			"a nonsense attribute": func() error { return nonsense(x.file(sid)) },
		} {
			must(t, make())
			_, err := x.Snapshot(ctx, sid)
			want(t, what, err, fault.NotFound)
			_, err = x.CreateSnapshot(ctx, id, "theirs")
			want(t, what+": creating over it", err, fault.Busy)
			want(t, what+": deleting it", x.DeleteSnapshot(ctx, sid), fault.Invalid)
			want(t, what+": publishing it", x.Publish(ctx, sid, adapters.Notes{}), fault.NotFound)
			if got := x.list(t, adapters.Filter{Cutting: true}); !slices.Equal(got, []string{"ours"}) {
				t.Errorf("%s: listed %v", what, got)
			}
			must(t, os.Remove(x.file(sid)))
		}
	})
}

func copyWithRecord(from, to string) error {
	b := make([]byte, 4096)
	n, err := unix.Getxattr(from, snapshotAttr, b)
	if err == nil {
		err = os.WriteFile(to, nil, 0o600)
	}
	if err == nil {
		err = unix.Setxattr(to, snapshotAttr, b[:n], 0)
	}
	return err
}

func nonsense(at string) error {
	if err := os.WriteFile(at, nil, 0o600); err != nil {
		return err
	}
	return unix.Setxattr(at, snapshotAttr, []byte("{{"), 0)
}

// TestFolder: a snapshot folder that somebody replaced is not trusted, and deletion does not claim success.
func TestFolder(t *testing.T) {
	onPools(t, func(t *testing.T, x fixture) {
		ctx := t.Context()
		_, id := x.volume(t, "v", 1<<20)
		s := x.cut(t, id, "s")
		folder, away := filepath.Join(x.fs.Mount, folderName), filepath.Join(x.fs.Mount, "away")
		must(t, os.Rename(folder, away))
		for what, make := range map[string]func() error{
			"a link":           func() error { return os.Symlink("away", folder) },
			"open to everyone": func() error { must(t, os.Mkdir(folder, 0o700)); return os.Chmod(folder, 0o755) },
			"another user's":   func() error { must(t, os.Mkdir(folder, 0o700)); return os.Chown(folder, 1000, 1000) },
		} {
			must(t, make())
			_, err := x.CreateSnapshot(ctx, id, "s")
			want(t, what+": create", err, fault.Invalid)
			want(t, what+": delete", x.DeleteSnapshot(ctx, s.ID), fault.Invalid)
			_, err = x.Gate(ctx, []adapters.VolumeID{id})
			want(t, what+": gate", err, fault.Invalid)
			must(t, os.Remove(folder))
		}
		must(t, os.WriteFile(folder, nil, 0o600))
		_, err := x.CreateSnapshot(ctx, id, "s")
		want(t, "a file: create", err, fault.Invalid)
		must(t, os.Remove(folder))
		must(t, os.Rename(away, folder))
		must(t, x.DeleteSnapshot(ctx, s.ID))
	})
}

// TestConcurrentSnapshots: of many at once, from several adapters, one snapshot comes, and everybody gets that one.
func TestConcurrentSnapshots(t *testing.T) {
	onPools(t, func(t *testing.T, x fixture) {
		ctx := t.Context()
		_, id := x.volume(t, "v", 1<<20)
		var wg sync.WaitGroup
		made := make([]adapters.Snapshot, 8)
		for i := range made {
			a := newAdapter(t)
			wg.Go(func() {
				var err error
				if made[i], err = a.CreateSnapshot(ctx, id, "one"); err != nil {
					t.Error(err)
				}
				if err := a.Publish(ctx, made[i].ID, adapters.Notes{Cut: "c"}); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		for _, s := range made {
			if !s.Created.Equal(made[0].Created) {
				t.Errorf("two snapshots: %v and %v", s.Created, made[0].Created)
			}
		}
		for range 20 { // everything at once: nothing but the kinds that may be
			for _, f := range []func() error{
				func() error { _, err := x.CreateSnapshot(ctx, id, "one"); return err },
				func() error { return x.Publish(ctx, made[0].ID, adapters.Notes{}) },
				func() error { return x.DeleteSnapshot(ctx, made[0].ID) },
				func() error { _, err := x.Snapshot(ctx, made[0].ID); return err },
				func() error { return x.Stage(ctx, id, "one") },
			} {
				wg.Go(func() {
					if err := f(); err != nil && fault.KindOf(err) != fault.NotFound {
						t.Error(err)
					}
				})
			}
		}
		wg.Wait()
		must(t, x.DeleteSnapshot(ctx, made[0].ID))
		left, err := os.ReadDir(filepath.Join(x.fs.Mount, folderName))
		if err != nil || len(left) != 0 {
			t.Errorf("left: %v, %v", left, err)
		}
	})
}

// TestNoCOW: chattr +C, usual for disk images on btrfs, does not hinder snapshots; nor does it on the folder's side.
func TestNoCOW(t *testing.T) {
	x := newFixture(t, "btrfs")
	for _, name := range []string{"volume", "pool"} {
		at := filepath.Join(x.fs.Mount, name)
		f, err := os.Create(at)
		must(t, err)
		must(t, setFlag(f, flagNoCOW, name == "volume"))
		_, err = f.Write(bytes.Repeat([]byte{5}, 1<<20))
		must(t, err)
		must(t, f.Close())
		v, err := x.Volume(t.Context(), typed(at))
		must(t, err)
		s := x.cut(t, v.ID, "s")
		if b := x.read(t, s.ID); !bytes.Equal(b, bytes.Repeat([]byte{5}, 1<<20)) {
			t.Errorf("%s: read something else", name)
		}
		folder, err := os.Open(filepath.Join(x.fs.Mount, folderName))
		must(t, err)
		must(t, setFlag(folder, flagNoCOW, true)) // for the second round: new files there would be +C
		must(t, folder.Close())
	}
}
