package reflink

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
	"stillpoint.io/stillpoint/integration/lab"
)

// bind mounts a folder or file a second time, until the test ends.
func bind(t testing.TB, from, to string) {
	t.Helper()
	must(t, unix.Mount(from, to, "", unix.MS_BIND, ""))
	t.Cleanup(func() { must(t, unix.Unmount(to, unix.MNT_DETACH)) })
}

// TestCanonical: however a volume is written, it is one volume.
func TestCanonical(t *testing.T) {
	onPools(t, func(t *testing.T, x fixture) {
		ctx := t.Context()
		x.Adapter = newAdapter(t)
		at, id := x.volume(t, "a/b/disk one.img", 8192)
		if want := typed(x.uuid(t) + "/a/b/disk one.img"); id != want {
			t.Fatalf("%v, want %v", id, want)
		}
		second, folder, single := filepath.Join(x.lab.Dir, "second"), filepath.Join(x.lab.Dir, "folder"), filepath.Join(x.lab.Dir, "single")
		for _, dir := range []string{second, folder} {
			must(t, os.Mkdir(dir, 0o755))
		}
		must(t, os.WriteFile(single, nil, 0o600))
		bind(t, x.fs.Mount, second)
		bind(t, filepath.Join(x.fs.Mount, "a/b"), folder)
		bind(t, at, single)
		bind(t, filepath.Join(x.fs.Mount, "a"), filepath.Join(x.fs.Mount, "a")) // onto itself: the way from the root is covered
		link := filepath.Join(x.lab.Dir, "link")
		must(t, os.Symlink(at, link))
		for _, other := range []string{at, second + "/a/b/disk one.img", folder + "/disk one.img", single, link, x.fs.Mount + "/a/../a//b/./disk one.img", id.ID} {
			v, err := x.Volume(ctx, typed(other))
			if err != nil || v.ID != id {
				t.Errorf("%s: %v, %v", other, v.ID, err)
			}
		}
		must(t, x.Stage(ctx, id, "s"))
		s := x.cut(t, id, "s")
		if got := x.list(t, adapters.Filter{Volume: id}); !slices.Equal(got, []string{"s"}) {
			t.Errorf("listed %v", got)
		}
		must(t, x.DeleteSnapshot(ctx, s.ID))

		hard := filepath.Join(x.fs.Mount, "hard")
		must(t, os.Link(filepath.Join(second, "a/b/disk one.img"), second+"/hard"))
		if v, err := x.Volume(ctx, typed(hard)); err != nil || v.ID == id {
			t.Errorf("a hard link: %v, %v", v.ID, err)
		}
	})
}

// TestPartialView: who sees only a part of the filesystem keeps the snapshots there, and who sees all of it finds them.
func TestPartialView(t *testing.T) {
	onPools(t, func(t *testing.T, x fixture) {
		ctx := t.Context()
		_, id := x.volume(t, "a/b/v", 8192)
		part := filepath.Join(x.lab.Dir, "part")
		must(t, os.Mkdir(part, 0o755))
		must(t, unix.Mount(x.fs.Mount+"/a", part, "", unix.MS_BIND, ""))
		narrow, err := Kind().Open(ctx, adapters.Config{Name: "r", Parameters: map[string]string{"pools": part}})
		must(t, err)
		defer narrow.Close()
		s, err := narrow.CreateSnapshot(ctx, id, "s")
		must(t, err)
		must(t, narrow.Publish(ctx, s.ID, adapters.Notes{}))
		must(t, unix.Unmount(part, 0))
		_, err = narrow.Snapshot(ctx, s.ID)
		want(t, "after unmounting", err, fault.Unavailable)
		want(t, "deleting after unmounting", narrow.DeleteSnapshot(ctx, s.ID), fault.Unavailable)
		again, err := x.CreateSnapshot(ctx, id, "s")
		if err != nil || !again.Created.Equal(s.Created) {
			t.Errorf("made another: %v, %v", again, err)
		}
		if got := x.list(t, adapters.Filter{Volume: id}); !slices.Equal(got, []string{"s"}) {
			t.Errorf("listed %v", got)
		}
		must(t, x.DeleteSnapshot(ctx, s.ID))
	})
}

// TestSubvolumes: paths start above the subvolumes, and a btrfs snapshot of a subvolume does not double ours.
func TestSubvolumes(t *testing.T) {
	x := newFixture(t, "btrfs")
	ctx := t.Context()
	command(t, "btrfs", "subvolume", "create", x.fs.Mount+"/@")
	command(t, "btrfs", "subvolume", "create", x.fs.Mount+"/@/inner")
	_, id := x.volume(t, "@/inner/v", 8192)
	if id.ID != x.uuid(t)+"/@/inner/v" {
		t.Fatal(id)
	}
	v, err := x.Volume(ctx, id)
	must(t, err)
	infos, err := mountinfo.GetMounts(mountinfo.SingleEntryFilter(x.fs.Mount))
	must(t, err)
	if v.WritesTo != adapters.Device(unix.Mkdev(uint32(infos[0].Major), uint32(infos[0].Minor))) {
		t.Errorf("writes to %d:%d, not to the device in mountinfo", unix.Major(uint64(v.WritesTo)), unix.Minor(uint64(v.WritesTo)))
	}
	sub := filepath.Join(x.lab.Dir, "sub")
	must(t, os.Mkdir(sub, 0o755))
	must(t, unix.Mount(x.fs.Device, sub, "btrfs", 0, "subvol=@"))
	if v, err := x.Volume(ctx, typed(sub+"/inner/v")); err != nil || v.ID != id {
		t.Errorf("through the mounted subvolume: %v, %v", v.ID, err)
	}
	narrow, err := Kind().Open(ctx, adapters.Config{Name: "r", Parameters: map[string]string{"pools": sub}})
	must(t, err)
	defer narrow.Close()
	s, err := narrow.CreateSnapshot(ctx, id, "s")
	must(t, err)
	must(t, narrow.Publish(ctx, s.ID, adapters.Notes{}))
	command(t, "btrfs", "subvolume", "snapshot", sub, x.fs.Mount+"/copy")
	copied := filepath.Join(x.lab.Dir, "copy")
	must(t, os.Mkdir(copied, 0o755))
	must(t, unix.Mount(x.fs.Device, copied, "btrfs", 0, "subvol=copy"))
	x.Adapter = newAdapter(t, x.fs.Mount, sub, copied)
	if got := x.list(t, adapters.Filter{}); !slices.Equal(got, []string{"s"}) {
		t.Errorf("listed %v", got)
	}
	target, err := x.Begin(ctx, adapters.VolumeSpec{ID: typed(x.fs.Mount + "/@/inner/new"), Size: 8192, Token: "t"})
	must(t, err)
	if _, err := target.Commit(ctx); err != nil {
		t.Errorf("a restore into a subvolume: %v", err)
	}
}

func command(t testing.TB, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
}

// TestRefused: wrong volumes, by kind.
func TestRefused(t *testing.T) {
	x := newFixture(t, "xfs")
	ctx := t.Context()
	at, id := x.volume(t, "v", 8192)
	ext4, err := x.lab.Pool(ctx, "ext4", "ext4", 64<<20)
	must(t, err)
	must(t, os.WriteFile(ext4.Mount+"/v", nil, 0o600))
	old := filepath.Join(x.lab.Dir, "old.img")
	must(t, lab.Sparse(old, 512<<20))
	command(t, "mkfs.xfs", "-q", "-m", "reflink=0", old)
	noReflink := &lab.Filesystem{File: old, Mount: filepath.Join(x.lab.Dir, "old"), Type: "xfs"}
	must(t, noReflink.Up())
	must(t, os.WriteFile(noReflink.Mount+"/v", nil, 0o600))
	x.Adapter = newAdapter(t, x.fs.Mount, noReflink.Mount)
	shm, err := os.CreateTemp("/dev/shm", "stillpoint-test")
	must(t, err)
	defer os.Remove(shm.Name())
	defer shm.Close()
	must(t, os.Symlink("loop", filepath.Join(x.lab.Dir, "loop")))
	must(t, os.Symlink("v", x.fs.Mount+"/link"))
	must(t, os.Symlink(".", x.fs.Mount+"/here"))
	must(t, unix.Mkfifo(x.fs.Mount+"/fifo", 0o600))
	must(t, os.WriteFile(x.fs.Mount+"/new\nline", nil, 0o600))
	uuid := x.uuid(t)
	for _, c := range []struct {
		id   string
		kind fault.Kind
	}{
		{ext4.Mount + "/v", fault.Unsupported},
		{noReflink.Mount + "/v", fault.Unsupported},
		{shm.Name(), fault.Unsupported},
		{"/proc/version", fault.Unsupported},
		{x.fs.Mount, fault.Invalid},
		{"/dev/null", fault.Invalid},
		{x.fs.Mount + "/fifo", fault.Invalid},
		{x.fs.Mount + "/new\nline", fault.Invalid},
		{filepath.Join(x.lab.Dir, "loop"), fault.Invalid},
		{strings.Repeat("/a", 3000), fault.Invalid},
		{"v", fault.Invalid},
		{uuid + "/../v", fault.Invalid},
		{uuid + "/link", fault.Invalid},
		{uuid + "/here/v", fault.Invalid},
		{uuid + "/fifo", fault.Invalid},
		{uuid + "/" + folderName + "/v", fault.Invalid},
		{uuid + "/missing", fault.NotFound},
		{uuid + "/v/below", fault.NotFound},
		{x.fs.Mount + "/missing", fault.NotFound},
		{at + "/below", fault.NotFound},
		{strings.Repeat("0", 8) + uuid[8:] + "/v", fault.Unavailable},
	} {
		_, err := x.Volume(ctx, typed(c.id))
		want(t, c.id, err, c.kind)
	}
	_, err = x.Volume(ctx, adapters.VolumeID{Backend: "other", ID: id.ID})
	want(t, "another backend's", err, fault.Invalid)
	for _, name := range []string{"", "a\xff", strings.Repeat("a", 2000)} {
		_, err := x.CreateSnapshot(ctx, id, name)
		want(t, fmt.Sprintf("the snapshot name %.9q", name), err, fault.Invalid)
	}
	_, err = x.Snapshot(ctx, adapters.SnapshotID{Volume: id, Name: "../v"})
	want(t, "a snapshot name with a path", err, fault.Invalid)
	want(t, "deleting by a name with a path", x.DeleteSnapshot(ctx, adapters.SnapshotID{Volume: id, Name: "../../v"}), fault.Invalid)
	for _, p := range []map[string]string{{"pool": "/a"}, {"pools": "a"}, {"pools": ""}} {
		_, err := Kind().Open(ctx, adapters.Config{Name: "r", Parameters: p})
		want(t, fmt.Sprint(p), err, fault.Invalid)
	}

	must(t, x.fs.Down())
	_, err = x.CreateSnapshot(ctx, id, "s")
	want(t, "the pool was unmounted", err, fault.Unavailable)
	want(t, "the pool was unmounted: delete", x.DeleteSnapshot(ctx, adapters.SnapshotID{Volume: id, Name: "s"}), fault.Unavailable)
}

// TestTwins: two mounted filesystems with one UUID, a pool and a block copy of it, are ambiguous. The copy is mounted
// where only this test sees it.
func TestTwins(t *testing.T) {
	x := newFixture(t, "xfs")
	_, id := x.volume(t, "v", 8192)
	x.cut(t, id, "s")
	must(t, x.fs.Down())
	file, at := filepath.Join(x.lab.Dir, "copied.img"), filepath.Join(x.lab.Dir, "copied")
	command(t, "cp", "--sparse=always", x.fs.File, file)
	must(t, x.fs.Up())
	device, f, err := lab.Loop(file)
	must(t, err)
	defer f.Close()
	must(t, os.Mkdir(at, 0o755))
	a := newAdapter(t, x.fs.Mount, at)
	var look, list error
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread and its mounts go with the goroutine
		err := unix.Unshare(unix.CLONE_NEWNS)
		if err == nil {
			err = unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
		}
		if err == nil {
			err = unix.Mount(device, at, "xfs", 0, "nouuid")
		}
		if err == nil {
			_, look = a.Volume(background, id)
			for _, list = range a.Snapshots(background, adapters.Filter{}) {
			}
			err = unix.Unmount(at, 0)
		}
		done <- err
	}()
	must(t, <-done)
	want(t, "looking up", look, fault.Invalid)
	want(t, "listing", list, fault.Invalid)
	if v, err := x.Volume(t.Context(), id); err != nil || v.ID != id {
		t.Errorf("without the copy: %v, %v", v.ID, err)
	}
}

// TestLoops: the device that carries a volume is found however it was attached.
func TestLoops(t *testing.T) {
	onPools(t, func(t *testing.T, x fixture) {
		ctx := t.Context()
		at, id := x.volume(t, "v", 1<<20)
		device := func() string {
			v, err := x.Volume(ctx, id)
			must(t, err)
			return fmt.Sprintf("/dev/loop%d", unix.Minor(uint64(v.Device)))
		}
		if v, err := x.Volume(ctx, id); err != nil || v.Device != 0 {
			t.Errorf("not attached: %v, %v", v.Device, err)
		}
		other := filepath.Join(x.lab.Dir, "other")
		must(t, os.Mkdir(other, 0o755))
		bind(t, x.fs.Mount, other)
		name, f, err := lab.Loop(other + "/v")
		must(t, err)
		defer f.Close()
		if got := device(); got != name {
			t.Errorf("attached through a bind mount: %s, want %s", got, name)
		}
		found := 0
		for v, err := range x.Volumes(ctx) {
			must(t, err)
			if v.ID == id {
				found++
			}
		}
		if found != 1 {
			t.Errorf("listed %d times", found)
		}
		// The name goes, another link to the file stays.
		must(t, os.Link(at, at+"-kept"))
		must(t, os.Remove(at))
		must(t, os.Rename(at+"-kept", at))
		if got := device(); got != name {
			t.Errorf("attached by a link that is gone: %s, want %s", got, name)
		}
		target, err := x.Begin(ctx, adapters.VolumeSpec{ID: id, Size: 4096, Token: "t", Overwrite: true})
		want(t, "overwriting it", err, fault.Busy)
		if err == nil {
			target.Close()
		}
	})
	loops := []loop{
		{device: 5, fileDev: 1, fileIno: 1, offset: 4096}, {device: 6, fileDev: 1, fileIno: 1, readOnly: true},
		{device: 8, fileDev: 1, fileIno: 1}, {device: 7, fileDev: 1, fileIno: 1}, {device: 1, fileDev: 2, fileIno: 1},
	}
	for n, want := range []adapters.Device{7, 8, 6, 5, 0} {
		if got := carrier(loops, 1, 1); got != want {
			t.Errorf("step %d: %d, want %d", n, got, want)
		}
		loops = slices.DeleteFunc(loops, func(l loop) bool { return l.device == want })
	}
}

func TestRemote(t *testing.T) {
	mounts := []*mountinfo.Info{{Mountpoint: "/", FSType: "ext4"}, {Mountpoint: "/net", FSType: "nfs4"}, {Mountpoint: "/net/local", FSType: "xfs"}, {Mountpoint: "/ssh", FSType: "fuse.sshfs"}}
	for at, want := range map[string]bool{"/a": false, "/net/a": true, "/network": false, "/net/local/a": false, "/ssh/a": true} {
		if remote(mounts, at) != want {
			t.Errorf("%s: remote is %v", at, !want)
		}
	}
}

// TestImage: reads of every alignment, in parallel with nothing allocated, and after the deletion.
func TestImage(t *testing.T) {
	onPools(t, func(t *testing.T, x fixture) {
		ctx := t.Context()
		at, id := x.volume(t, "v", 3<<20+777)
		whole, err := os.ReadFile(at)
		must(t, err)
		s := x.cut(t, id, "s")
		i, err := x.Open(ctx, s.ID)
		must(t, err)
		defer i.Close()
		if got := readAll(t, i, random(1)); !bytes.Equal(got, whole) {
			t.Error("read something else")
		}
		p := aligned(1 << 20)
		if n := testing.AllocsPerRun(20, func() { i.ReadAt(ctx, p, 1<<20) }); n != 0 {
			t.Errorf("%v allocations a read", n)
		}
		must(t, x.DeleteSnapshot(ctx, s.ID))
		if got := readAll(t, i, random(2)); !bytes.Equal(got, whole) {
			t.Error("read something else after the deletion")
		}
		cancelled, cancel := context.WithCancel(ctx)
		cancel()
		if _, err := i.ReadAt(cancelled, p, 0); err != context.Canceled {
			t.Errorf("cancelled: %v", err)
		}
		_, err = i.ReadAt(ctx, p, -1)
		want(t, "a negative offset", err, fault.Invalid)
	})
}
