package fiemap

import (
	"context"
	"errors"
	"iter"
	"math"
	"os"
	"runtime"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/cbt"
	"stillpoint.io/stillpoint/fault"
)

// source is a file that is listed, as it was when it was first looked at.
type source struct {
	f          *os.File
	size       int64 // bytes
	block      int64 // the filesystem's block, bytes
	filesystem int64 // statfs(2) f_type
	device     uint64
	modified   unix.Timespec
}

// inspect looks at a file without asking for extents.
func inspect(f *os.File) (*source, error) {
	st, err := stat(f)
	if err != nil {
		return nil, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, fault.Errorf(fault.Invalid, "%s is not a regular file: only files have extents", f.Name())
	}
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &fs); err != nil {
		return nil, &os.PathError{Op: "statfs", Path: f.Name(), Err: err}
	}
	return &source{f: f, size: st.Size, block: max(fs.Bsize, 1), filesystem: fs.Type, device: st.Dev, modified: st.Mtim}, nil
}

// open inspects a file that is to be listed from an offset on, writes back what is dirty, and finds out whether its
// filesystem has FIEMAP.
func open(f *os.File, from int64) (*source, error) {
	s, err := inspect(f)
	if err != nil {
		return nil, err
	}
	if from < 0 || from > s.size {
		return nil, fault.Errorf(fault.Invalid, "%s: offset %d is outside the file of %d bytes", f.Name(), from, s.size)
	}
	_, err = s.count(0, 1, flagSync)
	return s, err
}

func stat(f *os.File) (st unix.Stat_t, err error) {
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return st, &os.PathError{Op: "stat", Path: f.Name(), Err: err}
	}
	return st, nil
}

// settled fails if the file was visibly written to since it was inspected.
func (s *source) settled() error {
	st, err := stat(s.f)
	if err != nil {
		return err
	}
	if st.Size != s.size || st.Mtim != s.modified {
		return fault.Errorf(fault.Busy, "%s was written to while its extents were listed: only a file that nobody writes to, such as a snapshot, has a settled answer", s.f.Name())
	}
	return nil
}

// count asks for the number of extents in a window.
func (s *source) count(from, length int64, flags uint32) (int, error) {
	h := header{start: uint64(from), length: uint64(length), flags: flags}
	if err := s.ioctl(&h); err != nil {
		return 0, err
	}
	return int(h.mapped), nil
}

// read fills b with the extents at from and behind it, up to the file's size.
func (s *source) read(from int64, b *batch) error {
	b.header = header{start: uint64(from), length: uint64(s.size - from), count: batchSize}
	b.records = b.records[:0]
	if err := s.ioctl(&b.header); err != nil {
		return err
	}
	end := uint64(from)
	for i, x := range b.raw[:min(b.mapped, batchSize)] {
		// A file may reach up to 2^63 - 1, and its last block one byte further.
		stop := x.logical + x.length
		if x.length == 0 || stop < x.logical || stop > 1<<63 || i > 0 && x.logical < end || stop <= end {
			return fault.Errorf(fault.Corrupt, "%s: the filesystem lists an extent of %d bytes at %d after one that ends at %d; check the filesystem", s.f.Name(), x.length, x.logical, end)
		}
		end = stop
		stop = min(stop, math.MaxInt64)
		b.records = append(b.records, Record{
			Logical:  int64(x.logical),
			Length:   int64(stop - x.logical),
			Physical: x.physical,
			Flags:    Flags(x.flags),
		})
	}
	return nil
}

// batches yields the file's extents from the one at from on, a batch at a time. A batch is good until the next.
func (s *source) batches(ctx context.Context, from int64) iter.Seq2[[]Record, error] {
	return func(yield func([]Record, error) bool) {
		b := new(batch)
		for from := from; from < s.size; {
			err := ctx.Err()
			if err == nil {
				err = s.read(from, b)
			}
			if err != nil {
				yield(nil, err)
				return
			}
			if len(b.records) == 0 || !yield(b.records, nil) {
				return
			}
			from = s.roundUp(b.records[len(b.records)-1].End())
		}
	}
}

// data yields the extents that may hold something, cut at the file's size.
func (s *source) data(ctx context.Context, from int64) cbt.Seq {
	return func(yield func(cbt.Extent, error) bool) {
		for records, err := range s.batches(ctx, from) {
			if err == nil {
				err = s.settled()
			}
			if err != nil {
				yield(cbt.Extent{}, err)
				return
			}
			for _, r := range records {
				if r.Flags.Zero() || r.Logical >= s.size {
					continue
				}
				if !yield(cbt.Extent{Offset: r.Logical, Length: min(r.End(), s.size) - r.Logical}, nil) {
					return
				}
			}
		}
	}
}

// roundUp returns the next multiple of the block, or the end of int64.
func (s *source) roundUp(n int64) int64 {
	if rest := n % s.block; rest != 0 {
		return n + min(s.block-rest, math.MaxInt64-n)
	}
	return n
}

// sameSpace fails if an address in one file need not mean the same block as in the other. It reports whether the
// filesystem may move extents of files that nobody writes to.
func sameSpace(a, b *source) (moves bool, err error) {
	apart := fault.Errorf(fault.Invalid, "%s and %s do not lie on one filesystem, so they share no extents", a.f.Name(), b.f.Name())
	if a.filesystem != b.filesystem {
		return false, apart
	}
	switch a.filesystem {
	case unix.XFS_SUPER_MAGIC:
		if a.device != b.device {
			return false, apart
		}
		// The realtime device has addresses of its own, and moves extents if it is zoned.
		ra, errA := a.realtime()
		rb, errB := b.realtime()
		if err := errors.Join(errA, errB); err != nil {
			return false, err
		}
		if ra != rb {
			return false, fault.Errorf(fault.Unsupported, "%s and %s: one of them lies on the filesystem's realtime device, so their addresses cannot be compared", a.f.Name(), b.f.Name())
		}
		return ra, nil
	case unix.BTRFS_SUPER_MAGIC:
		if a.device == b.device {
			return true, nil
		}
		// Each subvolume has a device number of its own.
		ua, errA := a.btrfs()
		ub, errB := b.btrfs()
		if err := errors.Join(errA, errB); err != nil {
			return false, err
		}
		if ua != ub {
			return false, apart
		}
		return true, nil
	default:
		return false, fault.Errorf(fault.Unsupported, "%s: addresses of extents prove equality only on XFS and btrfs, not on this filesystem (type %#x)", b.f.Name(), b.filesystem)
	}
}

// realtime reports whether an XFS file lies on the realtime device (linux/fs.h: struct fsxattr, FS_XFLAG_REALTIME).
func (s *source) realtime() (bool, error) {
	var x struct {
		flags, extsize, extents, project, cowsize uint32
		_                                         [8]byte
	}
	if err := ioctl(s.f, 0x801C581F, unsafe.Pointer(&x)); err != nil { // FS_IOC_FSGETXATTR
		return false, &os.PathError{Op: "FS_IOC_FSGETXATTR", Path: s.f.Name(), Err: err}
	}
	return x.flags&1 != 0, nil
}

// btrfs returns the UUID of the btrfs that a file lies on (linux/btrfs.h: struct btrfs_ioctl_fs_info_args).
func (s *source) btrfs() ([16]byte, error) {
	var x struct {
		devices, highest uint64
		uuid             [16]byte
		_                [992]byte
	}
	if err := ioctl(s.f, 0x8400941F, unsafe.Pointer(&x)); err != nil { // BTRFS_IOC_FS_INFO
		return x.uuid, &os.PathError{Op: "BTRFS_IOC_FS_INFO", Path: s.f.Name(), Err: err}
	}
	return x.uuid, nil
}

const (
	fiemap   = 0xC020660B // linux/fs.h: FS_IOC_FIEMAP
	flagSync = 1          // FIEMAP_FLAG_SYNC
	// batchSize is how many extents one request asks for: 56 bytes each here, 32 more as records.
	batchSize = 1024
)

// header is linux/fiemap.h's struct fiemap.
type header struct {
	start, length uint64
	flags         uint32
	mapped        uint32
	count         uint32
	_             uint32
}

// extent is linux/fiemap.h's struct fiemap_extent.
type extent struct {
	logical, physical, length uint64
	_                         [2]uint64
	flags                     uint32
	_                         [3]uint32
}

// batch is one request, its answer as it came, and what was read from it.
type batch struct {
	header
	raw     [batchSize]extent
	records []Record
}

// turns makes the listings of one filesystem take turns, request by request: two at once hinder each other on XFS, and
// together need five times as long (they wait for each other's hold of an allocation group). One lock a filesystem.
var turns sync.Map // device uint64 → *sync.Mutex

func (s *source) ioctl(h *header) error {
	if h.flags&flagSync == 0 { // writing back may take long, and hinders nobody
		turn, _ := turns.LoadOrStore(s.device, new(sync.Mutex))
		turn.(*sync.Mutex).Lock()
		defer turn.(*sync.Mutex).Unlock()
	}
	err := ioctl(s.f, fiemap, unsafe.Pointer(h))
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOTTY), errors.Is(err, unix.EBADR):
		return fault.Errorf(fault.Unsupported, "%s: its filesystem (type %#x) does not list extents (FIEMAP)", s.f.Name(), s.filesystem)
	case errors.Is(err, unix.EUCLEAN):
		return fault.Errorf(fault.Corrupt, "%s: listing extents: %w; check the filesystem", s.f.Name(), err)
	default:
		return &os.PathError{Op: "FIEMAP", Path: s.f.Name(), Err: err}
	}
}

func ioctl(f *os.File, request uintptr, arg unsafe.Pointer) error {
	for {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), request, uintptr(arg))
		runtime.KeepAlive(f)
		switch errno {
		case 0:
			return nil
		case unix.EINTR:
		default:
			return errno
		}
	}
}
