// Package mounts knows which filesystem sits on which block device and which file, stacked in what order.
//
// Words. A filesystem is one superblock, however often and in however many pieces it is mounted; its identity is the
// device number that mountinfo shows (stat(2) gives another one in each subvolume of btrfs). A mount is one place where
// it, or a folder of it, is to be seen. A member is a block device that a filesystem stands on. A block device stands
// on others (a partition on its disk, device-mapper and md on their slaves), or on a file (a loop device on its
// backing file, and so on a filesystem again). An overlay stands on the filesystems of its layers.
//
// Host reads all this into a Table, which is a value: a snapshot of the node's state, safe to share, that answers
// questions without any I/O, so that plans can be made and tested with tables that never existed. What may have changed
// since it was read, a caller checks on the descriptor that it opens.
//
// No path of a network, FUSE or autofs filesystem, or of one behind it, is ever opened or looked at: its server may
// never answer, and a call that waits for it cannot be interrupted.
//
// What cannot be seen from here: mounts of another mount namespace (Host.Hidden finds that somebody holds a device), and
// that another node has mounted a filesystem too.
package mounts

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/fault"
)

// Device is a Linux device number as stat(2) gives it in st_dev and st_rdev; 0 is none.
type Device uint64

// MakeDevice puts a device number together.
func MakeDevice(major, minor uint32) Device { return Device(unix.Mkdev(major, minor)) }

// String returns major:minor, as the kernel's files show it.
func (d Device) String() string {
	return fmt.Sprintf("%d:%d", unix.Major(uint64(d)), unix.Minor(uint64(d)))
}

// Mount is one line of mountinfo (proc_pid_mountinfo(5)), with its escapes undone.
type Mount struct {
	ID, Parent int
	// Filesystem is the superblock's identity; New fills it in.
	Filesystem Device
	// Root is the folder of the filesystem that is to be seen at Point: "/" for all of it.
	Root  string
	Point string // where it is to be seen: a folder, or a file if Root is one
	// ReadOnly is of this mount; the superblock may be writable through another one.
	ReadOnly bool
}

// Filesystem is a superblock that is mounted at least once.
type Filesystem struct {
	ID       Device
	Type     string // as mountinfo has it: "ext4", "overlay", "fuse.sshfs"
	Source   string // what was mounted, in the words of whoever did it; not to be relied upon
	ReadOnly bool   // the superblock itself
	Mounts   []Mount

	// Members are all the block devices that it stands on: every device of a btrfs or f2fs, an external journal, a log
	// and a realtime device included. None for what needs no device.
	Members []Device
	// Layers are the folders of an overlay.
	Layers []Layer
	// Stats are the numbers that stat(2) was seen to give for files of it besides ID: those of the subvolumes of a btrfs
	// that are mounted, or that hold the file of a loop device.
	Stats []Device
	// Unknown says in words what could not be found out about what it stands on; empty is the norm.
	Unknown string
	// Remote says that it is, or may be, served by something other than this kernel: its paths are never touched. New
	// tells it from Type and Layers.
	Remote bool
}

// String names the filesystem for people: its type and first mount point.
func (f Filesystem) String() string {
	if len(f.Mounts) == 0 {
		return f.Type + " " + f.ID.String()
	}
	return f.Type + " " + f.Mounts[0].Point
}

// Role is what an overlay uses a layer for.
type Role string

const (
	Upper Role = "upper" // all writes go here
	Work  Role = "work"  // on the same filesystem as Upper
	Lower Role = "lower" // only read
)

// Layer is a folder of an overlay. Filesystem is the one that it lies on, 0 if that is not known; New finds it from
// an absolute Path where it is 0 and the overlay's Unknown is empty.
type Layer struct {
	Role       Role
	Path       string
	Filesystem Device
}

// BlockDevice is a block device as sysfs shows it.
type BlockDevice struct {
	ID       Device
	Name     string // the kernel's: "sda1", "dm-3", "loop0"
	Size     int64  // bytes
	ReadOnly bool
	// Below are the devices that it stands on directly: a partition's disk, the slaves of device-mapper or md, the
	// device behind a loop device.
	Below []Device
	// Partition says that Below is the disk of which this is a part.
	Partition bool
	// Backing is the file behind a loop device, nil for everything else.
	Backing *Backing
	// Counted says that the kernel keeps write counters for it (queue/iostats).
	Counted bool
}

// Backing is the file behind a loop device. Device and Inode are the file's own as stat(2) gives them, asked of the
// loop device itself, so neither a rename nor another file under the same name changes them. They are 0 when they could
// not be asked, and when Path leads to a remote filesystem, which is then Filesystem.
type Backing struct {
	Path    string // as the kernel names it now; the last name it had if it is Deleted
	Deleted bool
	Device  Device
	Inode   uint64
	// Filesystem is where the file lies, 0 if that is not known: Unknown then says why.
	Filesystem Device
	Unknown    string
}

// Table is the state of a node's mounts and block devices at one moment. It does not change, and neither may what it
// answers be changed: the slices are its own. Copies are cheap.
type Table struct {
	filesystems []Filesystem // as first mounted
	devices     []BlockDevice
	byID        map[Device]int // filesystems, by ID
	byStat      map[Device]int // filesystems, by Stats
	byDevice    map[Device]int
	mounts      map[int]Mount   // by mount ID
	children    map[place]int   // the mount (ID) on top of a place
	above       map[node][]node // what stands on what, upwards
	root        int             // ID of the mount where every path begins, 0 if there is none
}

// place is a point in a mount, where another mount may sit.
type place struct {
	mount int
	point string
}

// New makes a table of filesystems, in the order in which they were mounted, and block devices. It completes what
// follows from the rest: Mount.Filesystem, Layer.Filesystem, Remote, and as the one member of a filesystem without
// Members the block device that has its ID.
func New(filesystems []Filesystem, devices []BlockDevice) Table {
	t := Table{
		filesystems: slices.Clone(filesystems), devices: slices.Clone(devices),
		byID: map[Device]int{}, byStat: map[Device]int{}, byDevice: map[Device]int{},
		mounts: map[int]Mount{}, children: map[place]int{}, above: map[node][]node{},
	}
	slices.SortFunc(t.devices, func(a, b BlockDevice) int { return cmp.Compare(a.ID, b.ID) })
	for i, d := range t.devices {
		t.byDevice[d.ID] = i
	}
	for i := range t.filesystems {
		f := &t.filesystems[i]
		t.byID[f.ID] = i
		for _, d := range f.Stats {
			t.byStat[d] = i
		}
		f.Remote = remote(f.Type)
		if _, ok := t.byDevice[f.ID]; ok && len(f.Members) == 0 {
			f.Members = []Device{f.ID}
		}
		f.Mounts = slices.Clone(f.Mounts)
		for j := range f.Mounts {
			f.Mounts[j].Filesystem = f.ID
		}
	}
	t.indexMounts()
	t.indexLayers()
	t.indexStack()
	return t
}

// Filesystems returns all of them in the order in which they were first mounted.
func (t Table) Filesystems() []Filesystem { return slices.Clone(t.filesystems) }

// Devices returns all block devices by number.
func (t Table) Devices() []BlockDevice { return slices.Clone(t.devices) }

// Filesystem finds a filesystem by its ID, or by a number that stat(2) gave for a file of it.
func (t Table) Filesystem(id Device) (Filesystem, bool) {
	i, ok := t.byID[id]
	if !ok {
		i, ok = t.byStat[id]
	}
	if !ok {
		return Filesystem{}, false
	}
	return t.filesystems[i], true
}

// Device finds a block device.
func (t Table) Device(id Device) (BlockDevice, bool) {
	i, ok := t.byDevice[id]
	if !ok {
		return BlockDevice{}, false
	}
	return t.devices[i], true
}

// Root returns the filesystem at "/".
func (t Table) Root() (Filesystem, bool) {
	m, ok := t.At("/")
	if !ok {
		return Filesystem{}, false
	}
	return t.Filesystem(m.Filesystem)
}

// find is Filesystem for what must be there.
func (t Table) find(id Device) (Filesystem, error) {
	f, ok := t.Filesystem(id)
	if !ok {
		return f, fault.Errorf(fault.NotFound, "filesystem %s: not mounted here", id)
	}
	return f, nil
}

// locals are the types of filesystems that this kernel serves by itself. What is not listed counts as remote: a type
// that nobody has heard of is not one to be stuck on. Missing on purpose is all that asks a server or a process (nfs,
// cifs, ceph, 9p, virtiofs, fuse, fuseblk, autofs, …).
var locals = strings.Fields(`
	bcachefs btrfs erofs exfat ext2 ext3 ext4 f2fs hfs hfsplus iso9660 jfs minix msdos nilfs2 ntfs ntfs3 reiserfs
	squashfs udf ufs vfat xfs zfs zonefs
	aufs overlay ramfs rootfs tmpfs devtmpfs
	bdev binder binfmt_misc bpf cgroup cgroup2 configfs cpuset debugfs devpts efivarfs fusectl hugetlbfs mqueue nfsd
	nsfs pipefs proc pstore resctrl rpc_pipefs securityfs selinuxfs smackfs sockfs sysfs tracefs`)

// remote tells from a type whether touching a path may wait for somebody.
func remote(fstype string) bool { return !slices.Contains(locals, fstype) }
