package thinmeta

import (
	"context"
	"os"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/fault"
)

// File is a Source: an image of metadata in a regular file, or a block device, which is read past the page cache
// (O_DIRECT), because the kernel's pool writes to it past the page cache too.
type File struct {
	f    *os.File
	size int64
}

// OpenFile opens an image or a block device for reading. Errors: NotFound, Invalid for anything else.
func OpenFile(path string) (*File, error) {
	// Without O_NONBLOCK, opening a FIFO would wait for a writer.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if os.IsNotExist(err) {
		return nil, fault.Errorf(fault.NotFound, "metadata: %w", err)
	}
	if err != nil {
		return nil, err
	}
	size, err := prepare(f)
	if err != nil {
		f.Close()
		return nil, err
	}
	return &File{f: f, size: size}, nil
}

// prepare makes reads of a block device direct, and returns the size in bytes.
func prepare(f *os.File) (int64, error) {
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	switch mode := info.Mode(); {
	case mode.IsRegular():
		return info.Size(), nil
	case mode&os.ModeDevice != 0 && mode&os.ModeCharDevice == 0:
		if _, err := unix.FcntlInt(f.Fd(), unix.F_SETFL, unix.O_DIRECT); err != nil {
			return 0, &os.PathError{Op: "O_DIRECT", Path: f.Name(), Err: err}
		}
		return f.Seek(0, 2)
	default:
		return 0, fault.Errorf(fault.Invalid, "%s is neither an image in a regular file nor a block device", f.Name())
	}
}

// ReadAt is part of Source.
func (f *File) ReadAt(ctx context.Context, p []byte, offset int64) (int, error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	return f.f.ReadAt(p, offset)
}

// Size is part of Source.
func (f *File) Size() int64 { return f.size }

// Close closes it.
func (f *File) Close() error { return f.f.Close() }
