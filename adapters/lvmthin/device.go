package lvmthin

import (
	"context"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/adapters/direct"
)

// disk is an open block device, as package direct has it.
type disk struct {
	cached, direct *os.File
}

// openDisk opens a block device twice. flags are those of the access, and O_EXCL, which only one descriptor can have.
func openDisk(d adapters.Device, flags int) (*disk, error) {
	cached, err := openDevice(d, flags)
	if err != nil {
		return nil, err
	}
	bypass, err := openDevice(d, flags&^unix.O_EXCL|unix.O_DIRECT)
	if err != nil {
		cached.Close()
		return nil, err
	}
	return &disk{cached: cached, direct: bypass}, nil
}

func (d *disk) close() {
	d.direct.Close()
	d.cached.Close()
}

func (d *disk) readAt(ctx context.Context, p []byte, off int64) (int, error) {
	return d.move(ctx, p, off, (*os.File).ReadAt)
}

func (d *disk) writeAt(ctx context.Context, p []byte, off int64) (int, error) {
	return d.move(ctx, p, off, (*os.File).WriteAt)
}

func (d *disk) move(ctx context.Context, p []byte, off int64, do func(f *os.File, p []byte, off int64) (int, error)) (int, error) {
	n, err := direct.Move(ctx, d.cached, d.direct, p, off, do)
	return n, errno(err)
}

// zeroMost is the most that is zeroed between two looks at the context, in bytes.
const zeroMost = 1 << 30

// zero makes a range read as zeros. Whole chunks are discarded if chunk is not 0: a thin device unmaps exactly the
// whole chunks of a discard (get_bio_block_range in drivers/md/dm-thin.c), and what is not mapped reads as zeros. That
// is only for pools which zero a chunk before its first use, or a later write of a part would bring old bytes back. All
// else is written with zeros, by BLKZEROOUT, which keeps that promise on every device.
func (d *disk) zero(ctx context.Context, off, length, chunk int64) error {
	end := off + length
	const page = adapters.ImageAlign
	if inner, outer := (off+page-1)/page*page, end/page*page; inner < outer {
		if err := d.zeroPages(ctx, inner, outer, chunk); err != nil {
			return err
		}
		if err := d.writeZeros(ctx, off, inner); err != nil {
			return err
		}
		return d.writeZeros(ctx, outer, end)
	}
	return d.writeZeros(ctx, off, end)
}

func (d *disk) zeroPages(ctx context.Context, off, end, chunk int64) error {
	first, last := end, end
	if chunk > 0 {
		if a, b := (off+chunk-1)/chunk*chunk, end/chunk*chunk; a < b {
			first, last = a, b
		}
	}
	if err := d.overRange(ctx, unix.BLKZEROOUT, off, first); err != nil {
		return err
	}
	switch err := d.overRange(ctx, unix.BLKDISCARD, first, last); err {
	case nil:
	case unix.EOPNOTSUPP: // the pool's discards are ignored
		if err := d.overRange(ctx, unix.BLKZEROOUT, first, last); err != nil {
			return err
		}
	default:
		return err
	}
	return d.overRange(ctx, unix.BLKZEROOUT, last, end)
}

func (d *disk) overRange(ctx context.Context, request uint, off, end int64) error {
	for off < end {
		if err := ctx.Err(); err != nil {
			return err
		}
		span := [2]uint64{uint64(off), uint64(min(end-off, zeroMost))}
		_, _, e := unix.Syscall(unix.SYS_IOCTL, d.cached.Fd(), uintptr(request), uintptr(unsafe.Pointer(&span)))
		switch e {
		case 0:
			off += int64(span[1])
		case unix.EINTR:
		default:
			return e
		}
	}
	return nil
}

// writeZeros writes the few bytes at the edges.
func (d *disk) writeZeros(ctx context.Context, off, end int64) error {
	if off >= end {
		return nil
	}
	_, err := d.writeAt(ctx, make([]byte, end-off), off)
	return err
}
