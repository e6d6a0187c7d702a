package reflink

import (
	"encoding/binary"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The calls of btrfs on subvolumes: include/uapi/linux/btrfs.h.
const (
	iocSubvolCreate  = 0x5000940e // BTRFS_IOC_SUBVOL_CREATE
	iocSnapDestroy   = 0x5000940f // BTRFS_IOC_SNAP_DESTROY
	iocSnapCreateV2  = 0x50009417 // BTRFS_IOC_SNAP_CREATE_V2
	iocGetSubvolInfo = 0x81f8943c // BTRFS_IOC_GET_SUBVOL_INFO
	iocTreeSearchV2  = 0xc0709411 // BTRFS_IOC_TREE_SEARCH_V2

	subvolReadOnly = 1 << 1 // BTRFS_SUBVOL_RDONLY, of vol_args_v2
	rootReadOnly   = 1 << 0 // BTRFS_ROOT_SUBVOL_RDONLY, of a root
	subvolRoot     = 256    // BTRFS_FIRST_FREE_OBJECTID: the inode number of every subvolume's root
	emptySubvol    = 2      // BTRFS_EMPTY_SUBVOL_DIR_OBJECTID: what stands in a snapshot for a subvolume in its original
)

// isSubvolume reports whether an open file is the root of a subvolume.
func isSubvolume(f *os.File) (bool, error) {
	st, err := stat(f)
	if err != nil || st.Mode&unix.S_IFMT != unix.S_IFDIR || st.Ino != subvolRoot {
		return false, err
	}
	return isBtrfs(f)
}

func isBtrfs(f *os.File) (bool, error) {
	var fs unix.Statfs_t
	err := unix.Fstatfs(int(f.Fd()), &fs)
	return fs.Type == unix.BTRFS_SUPER_MAGIC, err
}

// makeSubvolume makes an empty subvolume in a directory.
func makeSubvolume(dir *os.File, name string) error {
	return volumeArgs(dir, iocSubvolCreate, name)
}

// destroySubvolume removes a subvolume from a directory, with all that is in it and in one step. One that is not there
// is success.
func destroySubvolume(dir *os.File, name string) error {
	err := volumeArgs(dir, iocSnapDestroy, name)
	if err == unix.ENOENT {
		return nil
	}
	return err
}

// volumeArgs makes a call with struct btrfs_ioctl_vol_args: a descriptor that is not used, and a name.
func volumeArgs(dir *os.File, request uintptr, name string) error {
	var args [4096]byte
	if len(name) > unix.NAME_MAX {
		return unix.ENAMETOOLONG
	}
	copy(args[8:], name)
	return query(dir, request, unsafe.Pointer(&args))
}

// snapshotSubvolume makes a read-only snapshot of a subvolume in a directory. When it returns, the snapshot and all data
// in it are on the disk: the call flushes the subvolume and commits the transaction.
func snapshotSubvolume(dir *os.File, name string, source *os.File) error {
	var args [4096]byte // struct btrfs_ioctl_vol_args_v2
	binary.NativeEndian.PutUint64(args[0:], uint64(source.Fd()))
	binary.NativeEndian.PutUint64(args[16:], subvolReadOnly)
	copy(args[56:], name)
	return query(dir, iocSnapCreateV2, unsafe.Pointer(&args))
}

// subvolume is what btrfs says about one.
type subvolume struct {
	generation uint64   // the transaction that last changed it
	created    uint64   // the transaction that made it
	parent     [16]byte // the UUID of the subvolume that it is a snapshot of
	readOnly   bool
}

func subvolumeOf(f *os.File) (subvolume, error) {
	var args [504]byte // struct btrfs_ioctl_get_subvol_info_args
	if err := query(f, iocGetSubvolInfo, unsafe.Pointer(&args)); err != nil {
		return subvolume{}, err
	}
	at := func(offset int) uint64 { return binary.NativeEndian.Uint64(args[offset:]) }
	return subvolume{generation: at(280), created: at(352), parent: [16]byte(args[312:]), readOnly: at(288)&rootReadOnly != 0}, nil
}
