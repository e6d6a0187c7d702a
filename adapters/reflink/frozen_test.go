package reflink

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/integration/lab"
)

// TestFrozen: while the filesystems on the volumes are frozen, snapshots of both are made, staged or not, and the
// frozen filesystems, which look like pools themselves, are in nobody's way.
func TestFrozen(t *testing.T) {
	onPools(t, func(t *testing.T, x fixture) {
		ctx := t.Context()
		var volumes []adapters.VolumeID
		var mounts []*lab.Filesystem
		for _, fstype := range []string{"ext4", "xfs", "btrfs"} {
			fs, err := x.lab.Volume(ctx, x.fs.Mount, fstype, fstype, 512<<20)
			must(t, err)
			v, err := x.Volume(ctx, typed(fs.File))
			must(t, err)
			var st unix.Stat_t
			must(t, unix.Stat(fs.Device, &st))
			if v.Device != adapters.Device(st.Rdev) || v.Path != fs.File {
				t.Errorf("%s is on %s, not %+v", fs.File, fs.Device, v)
			}
			volumes, mounts = append(volumes, v.ID), append(mounts, fs)
		}
		_, err := x.Gate(ctx, volumes)
		must(t, err)
		must(t, x.Stage(ctx, volumes[0], "s"))
		for _, fs := range mounts {
			must(t, os.WriteFile(filepath.Join(fs.Mount, "written"), []byte("before"), 0o600))
		}
		for _, fs := range mounts {
			must(t, os.WriteFile(filepath.Join(fs.Mount, "dirty"), make([]byte, 1<<20), 0o600))
			thaw := freeze(t, fs.Mount)
			defer thaw()
		}
		done := make(chan error, len(volumes))
		start := time.Now()
		for _, id := range volumes {
			go func() {
				_, err := x.CreateSnapshot(ctx, id, "s")
				done <- err
			}()
		}
		for range volumes {
			select {
			case err := <-done:
				if err != nil {
					t.Error(err)
				}
			case <-time.After(30 * time.Second):
				t.Fatal("a snapshot waits for a frozen filesystem")
			}
		}
		t.Logf("three snapshots in %v", time.Since(start))
	})
}

// freeze freezes a filesystem of the lab.
func freeze(t testing.TB, mount string) (thaw func()) {
	t.Helper()
	const fifreeze, fithaw = 0xC0045877, 0xC0045878 // linux/fs.h
	f, err := os.Open(mount)
	must(t, err)
	must(t, unix.IoctlSetInt(int(f.Fd()), fifreeze, 0))
	return func() {
		if err := unix.IoctlSetInt(int(f.Fd()), fithaw, 0); err != nil {
			t.Errorf("thawing %s: %v", mount, err)
		}
		f.Close()
	}
}

// TestEmpty: a file without bytes is a volume like others.
func TestEmpty(t *testing.T) {
	onPools(t, func(t *testing.T, x fixture) {
		ctx := t.Context()
		_, id := x.volume(t, "v", 0)
		_, err := x.Gate(ctx, []adapters.VolumeID{id})
		must(t, err)
		must(t, x.Stage(ctx, id, "b"))
		for _, name := range []string{"a", "b"} {
			if s := x.cut(t, id, name); len(x.read(t, s.ID)) != 0 {
				t.Error("bytes out of nothing")
			}
		}
		d, err := x.Changed(ctx, adapters.SnapshotID{Volume: id, Name: "a"}, adapters.SnapshotID{Volume: id, Name: "b"}, 0)
		must(t, err)
		for e, err := range d.Extents {
			t.Error(e, err)
		}
	})
}
