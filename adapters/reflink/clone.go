package reflink

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/fault"
)

// cloneRange makes length bytes of to, at offset, share the blocks of from at the same offset; holes come along. Offset,
// and the end unless it is the end of from, are multiples of the filesystem's block.
//
// The length is always given: when a clone without one is cut short (XFS runs out of space half-way) the ioctl reports
// success, with one it reports EINVAL. Source: fs/ioctl.c, ioctl_file_clone; fs/xfs/xfs_file.c, xfs_file_remap_range.
func cloneRange(to, from *os.File, offset, length int64) error {
	if length == 0 {
		return nil
	}
	before, err := blocks(to)
	if err != nil {
		return err
	}
	r := unix.FileCloneRange{Src_fd: int64(from.Fd()), Src_offset: uint64(offset), Src_length: uint64(length), Dest_offset: uint64(offset)}
	err = unix.IoctlFileCloneRange(int(to.Fd()), &r)
	if err != unix.EINVAL {
		return err
	}
	if after, err := blocks(to); err == nil && after > before {
		return fmt.Errorf("cut short: %w", unix.ENOSPC)
	}
	return fault.Errorf(fault.Unsupported, "%w; the filesystem cannot share blocks with a file of this kind (on a realtime or DAX device, a swap file, or on btrfs without checksums by a mount option)", err)
}

func blocks(f *os.File) (int64, error) {
	var st unix.Stat_t
	err := unix.Fstat(int(f.Fd()), &st)
	return st.Blocks, err
}

const (
	flagImmutable = 0x00000010 // linux/fs.h: FS_IMMUTABLE_FL
	flagNoCOW     = 0x00800000 // linux/fs.h: FS_NOCOW_FL
)

// setFlag sets or clears an inode flag.
func setFlag(f *os.File, flag uint32, on bool) error {
	have, err := unix.IoctlGetUint32(int(f.Fd()), unix.FS_IOC_GETFLAGS)
	if err != nil {
		return err
	}
	want := have &^ flag
	if on {
		want |= flag
	}
	if want == have {
		return nil
	}
	return unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, int(want))
}

// likeSource prepares an empty file to be a clone of source: btrfs shares blocks only between two files with checksums
// or two without, and chattr +C, usual for disk images, takes them away.
func likeSource(f, source *os.File) error {
	flags, err := unix.IoctlGetUint32(int(source.Fd()), unix.FS_IOC_GETFLAGS)
	if err != nil {
		return err
	}
	return setFlag(f, flagNoCOW, flags&flagNoCOW != 0)
}
