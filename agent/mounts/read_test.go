package mounts

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/fault"
)

// fakeHost writes a host's files: path → content; one that ends in "→" is a link to its content.
func fakeHost(t testing.TB, files map[string]string) Host {
	t.Helper()
	h := Host{Root: t.TempDir()}
	if err := os.MkdirAll(h.Path("/sys/dev/block"), 0o700); err != nil {
		t.Fatal(err)
	}
	for path, content := range files {
		path, isLink := strings.CutSuffix(path, "→")
		if err := os.MkdirAll(filepath.Dir(h.Path(path)), 0o700); err != nil {
			t.Fatal(err)
		}
		var err error
		if isLink {
			err = os.Symlink(content, h.Path(path))
		} else {
			err = os.WriteFile(h.Path(path), []byte(content), 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return h
}

// disk adds a block device's files in sysfs; folder is relative to /sys/devices, more holds further ones.
func disk(files map[string]string, number, folder string, more map[string]string) {
	files["/sys/dev/block/"+number+"→"] = "../../devices/" + folder
	dir := "/sys/devices/" + folder
	files[dir+"/dev"], files[dir+"/size"], files[dir+"/ro"] = number+"\n", "2048\n", "0\n"
	files[dir+"/queue/iostats"] = "1\n"
	for name, content := range more {
		files[dir+"/"+name] = content
	}
	if _, ok := more["partition"]; ok {
		delete(files, dir+"/queue/iostats")
	}
}

// recorded is a node as a cluster has it: LVM over md over partitions, btrfs on two devices, an XFS with its log
// elsewhere, an ext4 with an external journal, a container's overlay, bind mounts, names with odd characters.
func recorded() map[string]string {
	files := map[string]string{
		"/proc/1/mountinfo": `27 1 254:1 / / rw,relatime shared:1 - ext4 /dev/root rw,discard
22 27 0:21 / /proc rw,relatime - proc proc rw
30 27 253:1 / /data\040with\011odd\134\043\012name rw,relatime shared:5 master:2 - xfs /dev/mapper/vg-data rw,attr2,logdev=/dev/sdc,noquota
31 27 0:40 /sub1 /b1 rw,relatime shared:6 - btrfs /dev/sdd rw,space_cache=v2,subvolid=256,subvol=/sub1
32 27 0:40 /sub2 /b2 ro,relatime shared:7 - btrfs /dev/sdd rw,space_cache=v2,subvolid=257,subvol=/sub2
33 27 8:80 / /ext rw,relatime - ext4 /dev/sdf rw
34 27 8:112 / /ext2 rw,relatime - ext4 /dev/sdh ro
35 27 0:50 / /merged rw,relatime - overlay overlay rw,lowerdir=/l\134:1:/l2::/data\040only,upperdir=/lnk/up\054per,workdir=/ext/work
36 27 0:51 / /merged2 rw,relatime - overlay  rw,lowerdir+=/ext2/a,upperdir=/ext/none,workdir=/ext/work
37 27 0:60 / /remote rw,relatime - nfs4 server:/export rw,vers=4.2
38 27 254:1 /var//deleted /gone rw,relatime - ext4 /dev/root rw
39 27 7:0 / /loop rw - ext4 /dev/loop0 rw
40 27 7:1 / /loop1 rw - ext4 /dev/loop1 rw
41 27 8:64 / /ntfs rw - fuseblk /dev/sde rw
`,
		"/lnk→":                     "/ext",
		"/ext/up,per/x":             "",
		"/dev/odd→":                 "../dev/sdc",
		"/proc/fs/jbd2/vda1-8/info": "", "/proc/fs/jbd2/sdh-8/info": "", "/proc/fs/jbd2/sdg/info": "", "/proc/fs/jbd2/loop0-8/info": "", "/proc/fs/jbd2/loop1-8/info": "",
		"/sys/fs/ext4/sdf/journal_task":       "77\n",
		"/proc/77/comm":                       "jbd2/sdg\n",
		"/sys/fs/btrfs/features/x":            "",
		"/sys/fs/btrfs/u1/devices/sdc":        "",
		"/sys/fs/btrfs/u2/devices/sdd":        "",
		"/sys/fs/btrfs/u2/devices/cciss!c0d0": "",
	}
	disk(files, "254:0", "pci/block/vda", nil)
	disk(files, "254:1", "pci/block/vda/vda1", map[string]string{"partition": "1\n"})
	for i, name := range strings.Split("sda sdb sdc sdd sde sdf sdg sdh", " ") {
		disk(files, fmt.Sprint("8:", 16*i), "pci/block/"+name, nil)
	}
	disk(files, "8:1", "pci/block/sda/sda1", map[string]string{"partition": "1\n"})
	disk(files, "104:0", "pci/block/cciss!c0d0", map[string]string{"queue/iostats": "0\n", "ro": "1\n"})
	disk(files, "9:0", "virtual/block/md0", map[string]string{"slaves/sda1": "", "slaves/sdb": ""})
	disk(files, "253:0", "virtual/block/dm-0", map[string]string{"slaves/md0": "", "dm/name": "vg-pool\n"})
	disk(files, "253:1", "virtual/block/dm-1", map[string]string{"slaves/dm-0": "", "dm/name": "vg-data\n"})
	disk(files, "7:0", "virtual/block/loop0", map[string]string{"loop/backing_file": "/remote/a.img\n"})
	disk(files, "7:1", "virtual/block/loop1", map[string]string{"loop/backing_file": "/ext/a.img\n"})
	disk(files, "7:2", "virtual/block/loop2", nil)
	return files
}

func TestReadARecordedNode(t *testing.T) {
	h := fakeHost(t, recorded())
	n, err := h.Read(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	fs := func(point string) Filesystem {
		m, _ := n.At(point)
		f, ok := n.Filesystem(m.Filesystem)
		if !ok {
			t.Fatalf("nothing at %s", point)
		}
		return f
	}
	sd := func(i uint32) Device { return MakeDevice(8, 16*i) }

	data := fs("/data with\todd\\#\nname")
	same(t, "xfs with a log elsewhere", data.Members, []Device{MakeDevice(253, 1), sd(2)})
	u, err := n.Under(data.ID)
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(u.Devices)
	same(t, "LVM over md over a partition", u.Devices, []Device{sd(0), MakeDevice(8, 1), sd(1), sd(2), MakeDevice(9, 0), MakeDevice(253, 0), MakeDevice(253, 1)})
	same(t, "covered by disks", n.Uncovered(data.ID, sd(0), sd(1)), []Device{sd(2)})

	b := fs("/b1")
	if fs("/b2").ID != b.ID || len(b.Mounts) != 2 || b.Mounts[0].Root != "/sub1" || !b.Mounts[1].ReadOnly || b.ReadOnly {
		t.Errorf("btrfs: %+v", b)
	}
	same(t, "btrfs", slices.Sorted(slices.Values(b.Members)), []Device{sd(3), MakeDevice(104, 0)})

	same(t, "ext4 with an external journal", fs("/ext").Members, []Device{sd(5), sd(6)})
	same(t, "ext4 with its own", fs("/ext2").Members, []Device{sd(7)})
	if !fs("/ext2").ReadOnly {
		t.Error("read-only superblock")
	}

	o := fs("/merged")
	want := []Layer{
		{Lower, "/l:1", MakeDevice(254, 1)}, {Lower, "/l2", MakeDevice(254, 1)}, {Lower, "/data only", MakeDevice(254, 1)},
		{Upper, "/ext/up,per", sd(5)}, {Work, "/ext/work", sd(5)},
	}
	if !slices.Equal(o.Layers, want) || o.Unknown != "" {
		t.Errorf("overlay: %+v, %s", o.Layers, o.Unknown)
	}
	if o2 := fs("/merged2"); o2.Unknown == "" || o2.Layers[0] != (Layer{Role: Lower, Path: "/ext2/a"}) {
		t.Errorf("an overlay of another namespace: %+v", o2)
	}
	if root := fs("/"); len(root.Mounts) != 2 || root.Mounts[1].Root != "/var//deleted" {
		t.Errorf("root: %+v", root)
	}

	if on, _ := n.On(sd(4)); len(on) != 1 || on[0].Type != "fuseblk" || !on[0].Remote {
		t.Errorf("a FUSE filesystem on a disk: %+v", on)
	}

	l := fs("/loop")
	if u, _ := n.Under(l.ID); !slices.Equal(u.Filesystems, []Device{MakeDevice(0, 60)}) {
		t.Errorf("a loop device on NFS: %+v", u)
	}
	if u, _ := n.Under(fs("/loop1").ID); len(u.Unknown) != 1 || len(u.Filesystems) != 0 {
		t.Errorf("a loop device that cannot be asked: %+v", u)
	}

	if d, _ := n.Device(MakeDevice(104, 0)); d.Name != "cciss!c0d0" || d.Counted || !d.ReadOnly || d.Size != 1<<20 {
		t.Errorf("disk: %+v", d)
	}
	if d, _ := n.Device(MakeDevice(8, 1)); !d.Partition || !d.Counted || !slices.Equal(d.Below, []Device{sd(0)}) {
		t.Errorf("partition: %+v", d)
	}
	if got := len(n.Devices()); got != 18 {
		t.Errorf("%d devices", got)
	}
}

func TestMembersThatCannotBeToldAreUnknown(t *testing.T) {
	for name, change := range map[string]func(files map[string]string){
		"/b1 no such source":         func(f map[string]string) { delete(f, "/sys/fs/btrfs/u2/devices/sdd") },
		"/b1 no device of that name": func(f map[string]string) { f["/sys/fs/btrfs/u2/devices/nvme9n1"] = "" },
		"/ext two external journals": func(f map[string]string) {
			f["/proc/fs/jbd2/sde/info"] = ""
			delete(f, "/proc/77/comm")
		},
		"/data log is gone": func(f map[string]string) {
			f["/proc/1/mountinfo"] = strings.Replace(f["/proc/1/mountinfo"], "logdev=/dev/sdc", `logdev=/dev/by\040path`, 1)
			f["/proc/1/mountinfo"] = strings.Replace(f["/proc/1/mountinfo"], `/data\040with\011odd\134\043\012name`, "/data", 1)
		},
	} {
		t.Run(name, func(t *testing.T) {
			files := recorded()
			change(files)
			n, err := fakeHost(t, files).Read(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			point, _, _ := strings.Cut(name, " ")
			m, _ := n.At(point)
			if f, _ := n.Filesystem(m.Filesystem); f.Unknown == "" {
				t.Errorf("got %+v", f)
			}
		})
	}
}

func TestOneExternalJournalNeedsNoThread(t *testing.T) {
	files := recorded()
	files["/sys/fs/ext4/sdf/journal_task"] = "0\n" // seen from another pid namespace
	n, err := fakeHost(t, files).Read(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	f, _ := n.Filesystem(MakeDevice(8, 80))
	same(t, "members", f.Members, []Device{MakeDevice(8, 80), MakeDevice(8, 96)})
}

func TestReadErrors(t *testing.T) {
	if _, err := (Host{Root: t.TempDir()}).Read(t.Context()); err == nil {
		t.Error("no /proc: read")
	}
	h := fakeHost(t, map[string]string{"/proc/1/mountinfo": "27 1 254:1 / /\n"})
	if _, err := h.Read(t.Context()); fault.KindOf(err) != fault.Internal {
		t.Errorf("a torn line: %v", err)
	}
}

func TestResolve(t *testing.T) {
	h := fakeHost(t, map[string]string{
		"/proc/1/mountinfo": "1 0 8:1 / / rw - ext4 /dev/sda1 rw\n2 1 0:9 / /nfs rw - nfs s:/ rw\n",
		"/a/file":           "", "/a/up→": "../b", "/b/abs→": "/a/file", "/b/dangling→": "/c/d", "/b/remote→": "/nfs/x",
		"/circle→": "circle", "/nfs/link→": "/a", "/b/self→": ".",
	})
	n, err := h.Read(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		"/": "/", "/a/file": "/a/file", "/a/up": "/b", "/a/up/abs": "/a/file", "/a/up/..": "/", "/b/dangling/e/../f": "/c/d/f",
		"/b/self/self/abs": "/a/file", "/a/file/not/a/folder": "/a/file/not/a/folder", "/none/x": "/none/x", "/../..//a/./file": "/a/file",
		"/nfs/link/x": "/nfs/link/x", "/a/up/remote/y": "/nfs/x/y", // links there are not looked at
	} {
		if got, err := h.Resolve(n, path); err != nil || got != want {
			t.Errorf("%s: got %s, %v; want %s", path, got, err, want)
		}
	}
	for _, path := range []string{"relative", "", "/circle"} {
		if _, err := h.Resolve(n, path); !errors.Is(err, fault.Invalid) {
			t.Errorf("%q: %v", path, err)
		}
	}
}

func TestCounters(t *testing.T) {
	const stat = "  10 0 80 1 21 2 168 3 0 4 5 6 7 48 8 9 10\n"
	files := map[string]string{}
	disk(files, "8:0", "block/sda", map[string]string{"stat": stat})
	disk(files, "8:1", "block/sda/sda1", map[string]string{"stat": "1 0 8 1 2 0 16 3 0 4 5\n", "partition": "1"}) // an old kernel's
	disk(files, "8:16", "block/sdb", map[string]string{"stat": stat, "queue/iostats": "0\n"})
	disk(files, "1:0", "block/ram0", map[string]string{"stat": "0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0\n"})
	h := fakeHost(t, files)
	got, err := h.Counters(t.Context(), MakeDevice(8, 0), MakeDevice(8, 1), MakeDevice(8, 16), MakeDevice(1, 0))
	if err != nil {
		t.Fatal(err)
	}
	want := []Counters{
		{MakeDevice(8, 0), true, 21, 168, 6, 48},
		{MakeDevice(8, 1), true, 2, 16, 0, 0},
		{MakeDevice(8, 16), false, 21, 168, 6, 48},
		{MakeDevice(1, 0), false, 0, 0, 0, 0},
	}
	if !slices.Equal(got, want) {
		t.Errorf("got %+v", got)
	}
	later := got[0]
	if later.Moved(got[0]) {
		t.Error("moved")
	}
	if later.SectorsDiscarded++; !later.Moved(got[0]) {
		t.Error("not moved")
	}
	if _, err := h.Counters(t.Context(), MakeDevice(8, 0), MakeDevice(9, 9)); !errors.Is(err, fault.NotFound) {
		t.Errorf("not there: %v", err)
	}
}

func TestUnescape(t *testing.T) {
	for in, want := range map[string]string{
		"plain": "plain", `a\040b`: "a b", `\134`: `\`, `\054\075`: ",=", `\04`: `\04`, `\08x1`: `\08x1`, `\377`: "\xff", `\777`: `\777`, `x\`: `x\`,
	} {
		if got := unescape(in); got != want {
			t.Errorf("%q: got %q, want %q", in, got, want)
		}
	}
	if got := splitFolders(`/a\:b:/c::/d\\e:`, true); !slices.Equal(got, []string{"/a:b", "/c", `/d\e`}) {
		t.Errorf("got %q", got)
	}
	if got := splitFolders(`/a\,b:c`, false); !slices.Equal(got, []string{"/a,b:c"}) {
		t.Errorf("got %q", got)
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(recorded()["/proc/1/mountinfo"]))
	f.Add([]byte("1 1 0:1 / / - - - - -\n2 3 0:1 / /a - - - - -\n3 2 0:2 / /a - - - - -\n"))
	f.Fuzz(func(t *testing.T, info []byte) {
		filesystems, options, err := parse(info)
		if err != nil {
			return
		}
		r := reader{Host: Host{Root: "/nonexistent"}, table: New(filesystems, nil)}
		for i := range filesystems {
			r.complete(&filesystems[i], options[i])
		}
		n := New(filesystems, nil)
		for _, f := range filesystems {
			for _, m := range f.Mounts {
				n.At(m.Point)
			}
			n.OpenAt(f.ID)
			n.Nested(f.ID)
			n.Order(f.ID)
		}
	})
}

// A node with a thousand mounts, of which 400 are overlays of ten layers and 300 binds.
func BenchmarkRead(b *testing.B) {
	for _, count := range []int{1000, 4000} {
		b.Run(fmt.Sprint(count), func(b *testing.B) {
			var info bytes.Buffer
			files := map[string]string{}
			info.WriteString("1 0 8:0 / / rw - ext4 /dev/sda rw\n")
			disk(files, "8:0", "block/sda", nil)
			for i := 2; i <= count; i++ {
				switch i % 10 {
				case 0, 1, 2, 3:
					fmt.Fprintf(&info, "%d 1 0:%d / /run/c/%d/rootfs rw - overlay overlay rw,lowerdir=%s,upperdir=/c/%d/u,workdir=/c/%d/w\n",
						i, i, i, strings.Repeat(":/var/lib/c/fs", 10)[1:], i, i)
				case 4, 5, 6:
					fmt.Fprintf(&info, "%d 1 8:0 /dir%d /pods/%d/volume rw - ext4 /dev/sda rw\n", i, i, i)
				default:
					fmt.Fprintf(&info, "%d 1 259:%d / /pods/%d/data rw - xfs /dev/nvme%d rw\n", i, i, i, i)
					disk(files, fmt.Sprint("259:", i), fmt.Sprint("block/nvme", i), nil)
				}
			}
			files["/proc/1/mountinfo"] = info.String()
			h := fakeHost(b, files)
			for b.Loop() {
				n, err := h.Read(b.Context())
				if err != nil {
					b.Fatal(err)
				}
				if _, err := n.On(MakeDevice(8, 0)); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(count), "ns/mount")
		})
	}
}

func TestLookRefusesRemotePaths(t *testing.T) {
	r := reader{table: stacked(at{"ext4", 0, "/"}, at{"fuse", 1, "/f"})}
	if _, err := r.look("/f/x"); !errors.Is(err, unix.EREMOTE) {
		t.Errorf("got %v", err)
	}
}

func TestADeviceThatNeverAnswersEndsWithTheContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		release := make(chan struct{})
		defer close(release)
		_, err := answer(ctx, "loop0", func() (int, error) { <-release; return 0, nil })
		if !errors.Is(err, fault.Unavailable) || !strings.HasPrefix(err.Error(), "loop0: ") {
			t.Errorf("got %v", err)
		}
	})
}

func TestACancelledReadIsUnavailable(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	h := fakeHost(t, recorded())
	if _, err := h.Read(ctx); !errors.Is(err, fault.Unavailable) {
		t.Errorf("reading: %v", err)
	}
	if _, err := h.Counters(ctx, MakeDevice(8, 0)); !errors.Is(err, fault.Unavailable) {
		t.Errorf("counting: %v", err)
	}
}
