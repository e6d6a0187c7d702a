package mounts

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/fault"
	"stillpoint.io/stillpoint/integration/lab"
)

const size = 400 << 20 // of a filesystem; mkfs.xfs refuses less than 300 MiB

func read(t testing.TB) Table {
	t.Helper()
	n, err := Host{}.Read(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// rdev is the number of a device node, dev the one that stat(2) gives for a path's filesystem.
func rdev(t testing.TB, path string) Device { return Device(stat(t, path).Rdev) }
func dev(t testing.TB, path string) Device  { return Device(stat(t, path).Dev) }

func stat(t testing.TB, path string) unix.Stat_t {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(path, err)
	}
	return st
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func run(t testing.TB, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %v: %v: %s", name, args, err, out)
	}
}

func volume(t testing.TB, l *lab.Lab, folder, name, fstype string) *lab.Filesystem {
	t.Helper()
	fs, err := l.Volume(t.Context(), folder, name, fstype, size)
	must(t, err)
	return fs
}

// mount mounts, in the lab's folder, where the lab unmounts it at the end.
func mount(t testing.TB, source, target, fstype string, flags uintptr, options string) {
	t.Helper()
	must(t, os.MkdirAll(target, 0o700))
	if err := unix.Mount(source, target, fstype, flags, options); err != nil {
		t.Fatalf("mounting %s on %s: %v", source, target, err)
	}
}

func TestLoopInALoopInALoop(t *testing.T) {
	l := lab.Test(t)
	pool, err := l.Pool(t.Context(), "pool", "xfs", 2<<30)
	must(t, err)
	a := volume(t, l, pool.Mount, "a", "ext4")
	must(t, os.Mkdir(a.Mount+"/in", 0o700))
	b, err := l.Volume(t.Context(), a.Mount+"/in", "b", "ext4", 64<<20)
	must(t, err)
	n := read(t)
	base, poolID, aID, bID := dev(t, l.Dir), rdev(t, pool.Device), rdev(t, a.Device), rdev(t, b.Device)
	if dev(t, pool.Mount) != poolID || dev(t, b.Mount) != bID {
		t.Fatal("these filesystems should have the numbers of their devices")
	}
	u, err := n.Under(bID)
	must(t, err)
	same(t, "filesystems under", u.Filesystems, []Device{aID, poolID, base})
	if u.Unknown != nil {
		t.Errorf("unknown: %v", u.Unknown)
	}
	order, err := n.Order(poolID, bID, aID)
	must(t, err)
	same(t, "order", ids(order), []Device{bID, aID, poolID})
	on, err := n.On(poolID)
	must(t, err)
	same(t, "on the pool's device", ids(on), []Device{bID, aID, poolID})
	same(t, "uncovered", n.Uncovered(bID, poolID), nil)
	d, _ := n.Device(bID)
	if st := stat(t, b.File); d.Backing.Path != b.File || d.Backing.Inode != st.Ino || d.Backing.Device != Device(st.Dev) || d.Size != 64<<20 || !d.Counted {
		t.Errorf("device: %+v %+v", d, d.Backing)
	}
	m, err := n.OpenAt(bID)
	must(t, err)
	if m.Point != b.Mount {
		t.Errorf("opened at %+v", m)
	}
	if m, _ := n.At(b.File); m.Filesystem != aID {
		t.Errorf("the file lies on %+v", m)
	}
	f, err := os.Open(b.Mount)
	must(t, err)
	defer f.Close()
	if fs, err := n.FilesystemOf(f); err != nil || fs.ID != bID {
		t.Errorf("open file: %v, %v", fs, err)
	}
	if hidden, err := (Host{}).Hidden(t.Context(), n, poolID, aID, bID); err != nil || hidden != nil {
		t.Errorf("hidden: %v, %v", hidden, err)
	}
}

func TestBackingFileRenamedDeletedReplacedAndBehindABind(t *testing.T) {
	l := lab.Test(t)
	for _, fstype := range []string{"xfs", "btrfs"} {
		t.Run(fstype, func(t *testing.T) {
			pool := volume(t, l, l.Dir, fstype, fstype)
			folder := pool.Mount + "/folder"
			if fstype == "btrfs" {
				run(t, "btrfs", "subvolume", "create", folder) // no mount shows its number
			} else {
				must(t, os.Mkdir(folder, 0o700))
			}
			path := folder + "/v.img"
			must(t, lab.Sparse(path, 64<<20))
			device, f, err := lab.Loop(path)
			must(t, err)
			defer f.Close()
			inode, id, poolID := stat(t, path).Ino, rdev(t, device), Device(0)
			if pool, ok := read(t).At(pool.Mount); ok {
				poolID = pool.Filesystem
			}
			check := func(what, path string, deleted bool) {
				t.Helper()
				d, _ := read(t).Device(id)
				if b := d.Backing; b == nil || b.Path != path || b.Deleted != deleted || b.Inode != inode || b.Filesystem != poolID {
					t.Errorf("%s: %+v", what, b)
				}
			}
			check("as made", path, false)
			if f, _ := read(t).Filesystem(dev(t, path)); f.ID != poolID {
				t.Errorf("by the number of the file's folder: %+v", f)
			}
			must(t, os.Rename(path, folder+"/w (deleted)"))
			check("renamed", folder+"/w (deleted)", false)
			must(t, os.Rename(folder+"/w (deleted)", path))

			// Another filesystem now covers the folder, and has a file of that name.
			mount(t, "tmpfs", folder, "tmpfs", 0, "")
			must(t, lab.Sparse(path, 1<<20))
			d, _ := read(t).Device(id)
			if fstype == "xfs" {
				check("covered", path, false)
			} else if d.Backing.Filesystem != 0 || d.Backing.Unknown == "" {
				t.Errorf("covered, in an unmounted subvolume: %+v", d.Backing)
			}
			must(t, unix.Unmount(folder, 0))

			must(t, os.Remove(path))
			check("deleted", path, true)
			must(t, lab.Sparse(path, 1<<20))
			check("replaced", path, true)
		})
	}
	// Attached through a bind mount that goes away: the kernel's path leads nowhere then.
	pool := volume(t, l, l.Dir, "bound", "ext4")
	must(t, lab.Sparse(pool.Mount+"/v.img", 1<<20))
	mount(t, pool.Mount, l.Dir+"/bind", "", unix.MS_BIND, "")
	device, f, err := lab.Loop(l.Dir + "/bind/v.img")
	must(t, err)
	defer f.Close()
	must(t, unix.Unmount(l.Dir+"/bind", unix.MNT_DETACH))
	d, _ := read(t).Device(rdev(t, device))
	if d.Backing.Filesystem != rdev(t, pool.Device) {
		t.Errorf("through a bind: %+v", d.Backing)
	}
}

func TestBtrfsSubvolumesOnTwoDevices(t *testing.T) {
	l := lab.Test(t)
	var nodes []string
	for i := range 2 {
		path := fmt.Sprint(l.Dir, "/disk", i)
		must(t, lab.Sparse(path, size))
		device, f, err := lab.Loop(path)
		must(t, err)
		defer f.Close()
		nodes = append(nodes, device)
	}
	run(t, "mkfs.btrfs", "-q", "-f", nodes[0], nodes[1])
	top := l.Dir + "/top"
	mount(t, nodes[1], top, "btrfs", 0, "device="+nodes[0])
	run(t, "btrfs", "subvolume", "create", top+"/s1")
	run(t, "btrfs", "subvolume", "create", top+"/s2")
	mount(t, nodes[0], l.Dir+"/s1", "btrfs", 0, "subvol=s1")
	mount(t, nodes[0], l.Dir+"/s2", "btrfs", unix.MS_RDONLY, "subvol=s2")
	n := read(t)
	numbers := []Device{dev(t, top), dev(t, l.Dir+"/s1"), dev(t, l.Dir+"/s2")}
	if numbers[1] == numbers[0] || numbers[2] == numbers[1] {
		t.Fatal("subvolumes should have numbers of their own:", numbers)
	}
	f, ok := n.Filesystem(numbers[0])
	if !ok || len(f.Mounts) != 3 || f.ReadOnly {
		t.Fatalf("got %+v", f)
	}
	for _, d := range numbers {
		if g, _ := n.Filesystem(d); g.ID != f.ID {
			t.Errorf("%s is %+v", d, g)
		}
	}
	members := []Device{rdev(t, nodes[0]), rdev(t, nodes[1])}
	slices.Sort(members)
	same(t, "members", slices.Sorted(slices.Values(f.Members)), members)
	same(t, "uncovered", n.Uncovered(f.ID, members[0]), members[1:])
	if m, err := n.OpenAt(f.ID); err != nil || m.Point != top {
		t.Errorf("opened at %+v, %v", m, err)
	}
	if hidden, err := (Host{}).Hidden(t.Context(), n, members...); err != nil || hidden != nil {
		t.Errorf("hidden: %v, %v", hidden, err)
	}
	// A path in a subvolume belongs to the filesystem, whatever number stat gives for it.
	if m, _ := n.At(top + "/s1/file"); m.Filesystem != f.ID {
		t.Errorf("in a subvolume: %+v", m)
	}
	file, err := os.Create(top + "/s1/file")
	must(t, err)
	defer file.Close()
	if g, err := n.FilesystemOf(file); err != nil || g.ID != f.ID {
		t.Errorf("open file in a subvolume: %v, %v", g, err)
	}
}

func TestLogsAndJournalsOnOtherDevices(t *testing.T) {
	l := lab.Test(t)
	node := map[string]string{}
	for _, name := range []string{"ext4", "journal", "xfs", "log"} {
		must(t, lab.Sparse(l.Dir+"/"+name, size))
		device, f, err := lab.Loop(l.Dir + "/" + name)
		must(t, err)
		defer f.Close()
		node[name] = device
	}
	run(t, "mke2fs", "-q", "-F", "-b", "4096", "-O", "journal_dev", node["journal"])
	run(t, "mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-J", "device="+node["journal"], node["ext4"])
	mount(t, node["ext4"], l.Dir+"/m-ext4", "ext4", 0, "")
	run(t, "mkfs.xfs", "-q", "-f", "-l", "logdev="+node["log"]+",size=64m", node["xfs"])
	mount(t, node["xfs"], l.Dir+"/m-xfs", "xfs", 0, "logdev="+node["log"])
	plain := volume(t, l, l.Dir, "plain", "ext4")

	n := read(t)
	for main, other := range map[string]string{"ext4": "journal", "xfs": "log"} {
		f, _ := n.Filesystem(rdev(t, node[main]))
		same(t, main, f.Members, []Device{rdev(t, node[main]), rdev(t, node[other])})
		if f.Unknown != "" {
			t.Errorf("%s: %s", main, f.Unknown)
		}
		on, err := n.On(rdev(t, node[other]))
		must(t, err)
		same(t, "on the "+other, ids(on), []Device{f.ID})
	}
	f, _ := n.Filesystem(rdev(t, plain.Device))
	same(t, "a journal of its own", f.Members, []Device{f.ID})
}

// This kernel need not have f2fs: the devices are read from the disk, as mkfs wrote them.
func TestF2FSOnTwoDevices(t *testing.T) {
	l := lab.Test(t)
	var nodes []string
	for i := range 3 {
		path := fmt.Sprint(l.Dir, "/disk", i)
		must(t, lab.Sparse(path, 100<<20))
		device, f, err := lab.Loop(path)
		must(t, err)
		defer f.Close()
		nodes = append(nodes, device)
	}
	run(t, "mkfs.f2fs", "-q", "-f", "-c", nodes[1], nodes[0])
	run(t, "mkfs.f2fs", "-q", "-f", nodes[2])
	devices, names, err := Host{}.blockDevices()
	must(t, err)
	r := reader{names: names, table: New(nil, devices)}
	several := Filesystem{ID: rdev(t, nodes[0]), Type: "f2fs"}
	r.complete(&several, "")
	same(t, "two devices", several.Members, []Device{rdev(t, nodes[0]), rdev(t, nodes[1])})
	one := Filesystem{ID: rdev(t, nodes[2]), Type: "f2fs"}
	r.complete(&one, "")
	same(t, "one device", one.Members, []Device{rdev(t, nodes[2])})
	if several.Unknown+one.Unknown != "" {
		t.Errorf("unknown: %s, %s", several.Unknown, one.Unknown)
	}
}

func TestOverlayOverAVolume(t *testing.T) {
	l := lab.Test(t)
	upper := volume(t, l, l.Dir, "upper", "ext4")
	lower := volume(t, l, l.Dir, "lower", "xfs")
	for _, d := range []string{upper.Mount + "/u,p", upper.Mount + "/work", lower.Mount + "/a:b"} {
		must(t, os.Mkdir(d, 0o700))
	}
	must(t, os.Symlink(upper.Mount, l.Dir+"/link"))
	merged := l.Dir + "/merged"
	mount(t, "overlay", merged, "overlay", 0, fmt.Sprintf(`lowerdir=%s/a\:b,upperdir=%s/u\,p,workdir=%s/work`, lower.Mount, l.Dir+"/link", upper.Mount))
	path := merged + "/v.img"
	must(t, lab.Sparse(path, 64<<20))
	must(t, lab.Mkfs(t.Context(), "ext4", path))
	device, f, err := lab.Loop(path)
	must(t, err)
	defer f.Close()
	mount(t, device, l.Dir+"/on-overlay", "ext4", 0, "")

	n := read(t)
	m, _ := n.At(merged)
	o, _ := n.Filesystem(m.Filesystem)
	want := []Layer{
		{Lower, lower.Mount + "/a:b", rdev(t, lower.Device)},
		{Upper, upper.Mount + "/u,p", rdev(t, upper.Device)},
		{Work, upper.Mount + "/work", rdev(t, upper.Device)},
	}
	if !slices.Equal(o.Layers, want) || o.Unknown != "" || o.Remote {
		t.Fatalf("overlay: %+v %q", o.Layers, o.Unknown)
	}
	order, err := n.On(rdev(t, upper.Device))
	must(t, err)
	same(t, "on the upper", ids(order), []Device{rdev(t, device), o.ID, rdev(t, upper.Device)})
}

// partitioned makes a loop device with two partitions of 32 MiB. They are added by hand, because a kernel may know no
// partition table, and go with the loop device.
func partitioned(t *testing.T, l *lab.Lab) (device string) {
	must(t, lab.Sparse(l.Dir+"/disk", 80<<20))
	device, loop, err := lab.Loop(l.Dir + "/disk")
	must(t, err)
	t.Cleanup(func() { loop.Close() })
	info, err := unix.IoctlLoopGetStatus64(int(loop.Fd()))
	must(t, err)
	info.Flags |= unix.LO_FLAGS_PARTSCAN
	must(t, unix.IoctlLoopSetStatus64(int(loop.Fd()), info))
	for i := range 2 {
		run(t, "addpart", device, fmt.Sprint(i+1), fmt.Sprint(2048+65536*i), "65536")
	}
	return device
}

func TestPartitions(t *testing.T) {
	l := lab.Test(t)
	device := partitioned(t, l)
	for _, p := range []string{"p1", "p2"} {
		must(t, lab.Mkfs(t.Context(), "ext4", device+p))
		mount(t, device+p, l.Dir+"/"+p, "ext4", 0, "")
	}
	n := read(t)
	disk, p1, p2 := rdev(t, device), rdev(t, device+"p1"), rdev(t, device+"p2")
	on, err := n.On(disk)
	must(t, err)
	same(t, "on the disk", ids(on), []Device{p1, p2})
	same(t, "devices", n.DevicesOn(disk), []Device{disk, p1, p2})
	same(t, "one is not the other", n.Uncovered(p1, p2), []Device{p1})
	same(t, "the disk covers it", n.Uncovered(p1, disk), nil)
	u, err := n.Under(p1)
	must(t, err)
	same(t, "under", u.Filesystems, []Device{dev(t, l.Dir)})
	before, err := Host{}.Counters(t.Context(), p1, p2, disk)
	must(t, err)
	if again, _ := (Host{}).Counters(t.Context(), p1, p2, disk); !before[0].Kept || before[0].Moved(again[0]) || before[1].Moved(again[1]) {
		t.Errorf("at rest: %+v %+v", before, again)
	}
	f, err := os.Create(l.Dir + "/p1/file")
	must(t, err)
	_, err = f.WriteString("x")
	must(t, errors.Join(err, f.Sync(), f.Close()))
	after, err := Host{}.Counters(t.Context(), p1, p2, disk)
	must(t, err)
	if !after[0].Moved(before[0]) || after[1].Moved(before[1]) || !after[2].Moved(before[2]) {
		t.Errorf("a write to the first: %+v, then %+v", before, after)
	}

	if hidden, err := (Host{}).Hidden(t.Context(), n, disk); err != nil || hidden != nil {
		t.Errorf("hidden: %v, %v", hidden, err)
	}
	held, err := os.Open(l.Dir + "/p1")
	must(t, err)
	defer held.Close()
	must(t, unix.Unmount(l.Dir+"/p1", unix.MNT_DETACH))
	n = read(t)
	hidden, err := Host{}.Hidden(t.Context(), n, disk)
	must(t, err)
	same(t, "held without a mount", hidden, []Device{p1})
	if g, err := n.FilesystemOf(held); !errors.Is(err, fault.NotFound) {
		t.Errorf("an open file there: %v, %v", g, err)
	}
	must(t, held.Close())
	for range 500 { // the kernel takes it down in the background
		if hidden, err = (Host{}).Hidden(t.Context(), n, disk); err != nil || hidden == nil {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if err != nil || hidden != nil {
		t.Errorf("released: %v, %v", hidden, err)
	}
	if _, err := (Host{}).Hidden(t.Context(), n, MakeDevice(7, 1<<19)); !errors.Is(err, fault.NotFound) {
		t.Errorf("no such device: %v", err)
	}
}

func TestDeviceHeldInAnotherMountNamespace(t *testing.T) {
	l := lab.Test(t)
	v := volume(t, l, l.Dir, "v", "ext4")
	id := rdev(t, v.Device)
	other := exec.CommandContext(t.Context(), "unshare", "--mount", "--kill-child", "sh", "-c", "echo ready; exec sleep 600")
	other.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	out, err := other.StdoutPipe()
	must(t, err)
	must(t, other.Start())
	_, err = out.Read(make([]byte, 1))
	must(t, err)
	must(t, unix.Unmount(v.Mount, 0))
	n := read(t)
	if on, err := n.On(id); err != nil || len(on) != 0 {
		t.Errorf("on the device: %v, %v", on, err)
	}
	hidden, err := Host{}.Hidden(t.Context(), n, id)
	must(t, err)
	same(t, "held by another namespace", hidden, []Device{id})
	must(t, other.Process.Kill())
	other.Wait()
}

func TestCoveredMountPoint(t *testing.T) {
	l := lab.Test(t)
	under := volume(t, l, l.Dir, "under", "ext4")
	over := volume(t, l, l.Dir, "over", "ext4")
	must(t, os.Mkdir(under.Mount+"/dir", 0o700))
	mount(t, over.Device, under.Mount, "ext4", 0, "")
	n := read(t)
	if _, err := n.OpenAt(rdev(t, under.Device)); !errors.Is(err, fault.Unsupported) {
		t.Errorf("a covered filesystem can be opened: %v", err)
	}
	if m, _ := n.At(under.Mount + "/dir"); m.Filesystem != rdev(t, over.Device) {
		t.Errorf("at the point: %+v", m)
	}
	must(t, unix.Unmount(under.Mount, 0))
	bind := l.Dir + "/bind with\\odd\tname"
	mount(t, under.Mount+"/dir", bind, "", unix.MS_BIND, "")
	mount(t, over.Device, under.Mount, "ext4", 0, "")
	m, err := read(t).OpenAt(rdev(t, under.Device))
	must(t, err)
	if m.Point != bind || m.Root != "/dir" || dev(t, m.Point) != rdev(t, under.Device) {
		t.Errorf("with a bind elsewhere: %+v", m)
	}
}

// silentFUSE mounts a FUSE filesystem whose server never answers: a process that touches it hangs.
func silentFUSE(t *testing.T, point string) {
	t.Helper()
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	must(t, err)
	must(t, os.MkdirAll(point, 0o700))
	if err := unix.Mount("silent", point, "fuse", 0, fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", fd)); err != nil {
		unix.Close(fd)
		t.Fatal(err)
	}
	t.Cleanup(func() {
		unix.Close(fd) // ends the connection: whoever waits gets an error
		unix.Unmount(point, unix.MNT_DETACH)
	})
}

func TestFUSEIsNeverTouched(t *testing.T) {
	l := lab.Test(t)
	v := volume(t, l, l.Dir, "v", "ext4")
	must(t, os.MkdirAll(v.Mount+"/covered", 0o700))
	b := volume(t, l, l.Dir, "b", "btrfs")
	must(t, os.MkdirAll(b.Mount+"/up", 0o700))
	must(t, os.MkdirAll(b.Mount+"/work", 0o700))
	must(t, lab.Sparse(b.Mount+"/up/v.img", 1<<20))
	device, f, err := lab.Loop(b.Mount + "/up/v.img")
	must(t, err)
	defer f.Close()
	mount(t, "overlay", l.Dir+"/merged", "overlay", 0, fmt.Sprintf("lowerdir=%s,upperdir=%s/up,workdir=%s/work", v.Mount, b.Mount, b.Mount))

	// Now FUSE covers the btrfs, where a loop device's file and an overlay's folders are, and a folder of the ext4.
	silentFUSE(t, b.Mount)
	silentFUSE(t, v.Mount+"/covered")

	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	type result struct {
		n        Table
		resolved string
		err      error
	}
	done := make(chan result, 1)
	go func() {
		var r result
		if r.n, r.err = (Host{}).Read(ctx); r.err == nil {
			r.resolved, r.err = Host{}.Resolve(r.n, v.Mount+"/covered/some/file")
		}
		done <- r
	}()
	var r result
	select {
	case r = <-done:
		must(t, r.err)
	case <-time.After(60 * time.Second):
		t.Fatal("waiting for a FUSE server that never answers")
	}
	m, _ := r.n.At(r.resolved)
	if fuse, _ := r.n.Filesystem(m.Filesystem); fuse.Type != "fuse" || !fuse.Remote {
		t.Errorf("at %s: %+v", r.resolved, fuse)
	}
	if _, err := r.n.OpenAt(m.Filesystem); !errors.Is(err, fault.Unsupported) {
		t.Errorf("to be opened: %v", err)
	}
	btrfs, _ := r.n.Filesystem(func() Device { // by its device, as its mount is covered
		on, err := r.n.On(rdev(t, b.Device))
		must(t, err)
		return on[len(on)-1].ID
	}())
	if btrfs.Type != "btrfs" || !strings.HasPrefix(btrfs.Source, "/dev/loop") {
		t.Errorf("covered: %+v", btrfs)
	}
	if _, err := r.n.OpenAt(btrfs.ID); !errors.Is(err, fault.Unsupported) {
		t.Errorf("to be opened: %v", err)
	}
	if d, _ := r.n.Device(rdev(t, device)); d.Backing == nil {
		t.Errorf("a loop device whose file is covered: %+v", d)
	}
	if m, err := r.n.OpenAt(rdev(t, v.Device)); err != nil || m.Point != v.Mount {
		t.Errorf("a filesystem with FUSE on one of its folders: %+v, %v", m, err)
	}
}

// A cut reads and verifies while its filesystems are frozen: nothing here may wait for the thaw.
func TestFrozenFilesystemsDoNotHoldUpAnything(t *testing.T) {
	l := lab.Test(t)
	for _, fstype := range []string{"xfs", "btrfs"} {
		pool := volume(t, l, l.Dir, "pool-"+fstype, fstype)
		v, err := l.Volume(t.Context(), pool.Mount, "v-"+fstype, "ext4", 64<<20)
		must(t, err)
		must(t, os.Symlink("/etc", v.Mount+"/link"))
		const fifreeze, fithaw = 0xC0045877, 0xC0045878 // linux/fs.h
		var frozen []*os.File
		for _, fs := range []*lab.Filesystem{v, pool} {
			f, err := os.Open(fs.Mount)
			must(t, err)
			must(t, unix.IoctlSetInt(int(f.Fd()), fifreeze, 0)) // the lab thaws if this test does not
			frozen = append(frozen, f)
		}
		id := rdev(t, v.Device)
		failed := make(chan error, 1)
		go func() {
			n, err := Host{}.Read(t.Context())
			if u, _ := n.Under(id); err == nil && (len(u.Filesystems) != 2 || u.Unknown != nil) {
				err = fmt.Errorf("under: %+v", u)
			}
			if path, resolveErr := (Host{}).Resolve(n, v.Mount+"/link"); err == nil && path != "/etc" {
				err = fmt.Errorf("resolved: %s, %w", path, resolveErr)
			}
			_, hiddenErr := Host{}.Hidden(t.Context(), n, id)
			_, countersErr := Host{}.Counters(t.Context(), id)
			failed <- errors.Join(err, hiddenErr, countersErr)
		}()
		select {
		case err := <-failed:
			must(t, err)
		case <-time.After(60 * time.Second):
			t.Error("waiting for the thaw")
		}
		for _, f := range slices.Backward(frozen) {
			must(t, errors.Join(unix.IoctlSetInt(int(f.Fd()), fithaw, 0), f.Close()))
		}
	}
}

func BenchmarkReadThisHost(b *testing.B) {
	for b.Loop() {
		if _, err := (Host{}).Read(b.Context()); err != nil {
			b.Fatal(err)
		}
	}
}
