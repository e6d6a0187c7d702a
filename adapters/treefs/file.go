package treefs

import (
	"context"
	"errors"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/cbt"
	"stillpoint.io/stillpoint/fault"
)

// OpenFile opens a regular file. It is read through the page cache, which a large file leaves when it is closed.
func (r *Reader) OpenFile(ctx context.Context, path string) (adapters.File, error) {
	parent, name, err := r.enter(ctx, path)
	if err != nil {
		return nil, r.failed(err, path)
	}
	defer parent.Close()
	var st unix.Stat_t // before it is opened: to open a device or a pipe would have effects
	if err := unix.Fstatat(int(parent.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW|unix.AT_EMPTY_PATH); err != nil {
		return nil, r.failed(err, path)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, fault.Errorf(fault.Invalid, "%s: %q is not a regular file", r.o.What, path)
	}
	f, err := OpenBeneath(parent, name, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_NOATIME)
	if err != nil {
		return nil, r.failed(err, path)
	}
	return &file{r, path, f, st.Size}, nil
}

type file struct {
	r    *Reader
	path string
	f    *os.File
	size int64
}

// pieceMax is the most that is read or written between two looks at the context, in bytes.
const pieceMax = 4 << 20

func (f *file) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fault.Errorf(fault.Invalid, "%s: %q: read at %d", f.r.o.What, f.path, off)
	}
	wanted, n := len(p), 0
	p = p[:max(0, min(int64(wanted), f.size-off))]
	for n < len(p) {
		if err := ctx.Err(); err != nil {
			return n, err
		}
		m, err := f.f.ReadAt(p[n:min(len(p), n+pieceMax)], off+int64(n))
		n += m
		if err != nil {
			return n, f.r.failed(err, f.path)
		}
	}
	if n < wanted {
		return n, io.EOF
	}
	return n, nil
}

func (f *file) Size() int64 { return f.size }

// cacheMax is how large a file may be, in bytes, to stay in the page cache.
const cacheMax = 1 << 20

func (f *file) Close() error {
	if f.size > cacheMax {
		unix.Fadvise(int(f.f.Fd()), 0, 0, unix.FADV_DONTNEED) // advice: nothing depends on it
	}
	return f.f.Close()
}

// Extents asks the filesystem for holes (lseek(2), SEEK_DATA and SEEK_HOLE).
func (f *file) Extents(ctx context.Context) cbt.Seq {
	return func(yield func(cbt.Extent, error) bool) {
		for at := int64(0); at < f.size; {
			if err := ctx.Err(); err != nil {
				yield(cbt.Extent{}, err)
				return
			}
			data, err := unix.Seek(int(f.f.Fd()), at, unix.SEEK_DATA)
			switch {
			case errors.Is(err, unix.ENXIO):
				data, err = f.size, nil
			case errors.Is(err, unix.EINVAL):
				data, err = at, nil // it knows of no holes
			}
			end := f.size
			if err == nil && data < f.size {
				end, err = unix.Seek(int(f.f.Fd()), data, unix.SEEK_HOLE)
				if errors.Is(err, unix.EINVAL) {
					end, err = f.size, nil
				}
			}
			if err != nil {
				yield(cbt.Extent{}, f.r.failed(err, f.path))
				return
			}
			data, end = min(data, f.size), min(end, f.size)
			if data > at && !yield(cbt.Extent{Offset: at, Length: data - at, Zero: true}, nil) {
				return
			}
			if end > data && !yield(cbt.Extent{Offset: data, Length: end - data}, nil) {
				return
			}
			at = max(end, data)
		}
	}
}
