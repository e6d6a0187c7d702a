package reflink

import (
	"context"
	"io"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/cbt"
	"stillpoint.io/stillpoint/cbt/fiemap"
	"stillpoint.io/stillpoint/fault"
)

// Allocated lists what a snapshot holds, from its extents.
func (a *Adapter) Allocated(ctx context.Context, id adapters.SnapshotID, from int64) (cbt.Delta, error) {
	_, f, err := a.openSnapshot(ctx, id)
	if err != nil {
		return cbt.Delta{}, err
	}
	delta, err := fiemap.Allocated(ctx, f, from)
	return closing(delta, err, id, f)
}

// Changed compares the extents of two snapshots.
func (a *Adapter) Changed(ctx context.Context, base, target adapters.SnapshotID, from int64) (cbt.Delta, error) {
	one, b, err := a.openSnapshot(ctx, base)
	if err != nil {
		return cbt.Delta{}, err
	}
	other, t, err := a.openSnapshot(ctx, target)
	if err == nil && one != other {
		err = fault.Errorf(fault.Invalid, "snapshots %s and %s are of different volumes", base, target)
		t.Close()
	}
	if err != nil {
		b.Close()
		return cbt.Delta{}, err
	}
	delta, err := fiemap.Changed(ctx, b, t, from)
	return closing(delta, err, target, b, t)
}

// closing makes a delta's stream close the files that it reads, and its errors name the snapshot. A stream that nobody
// ranges over leaves them to the garbage collector.
func closing(delta cbt.Delta, err error, id adapters.SnapshotID, files ...*os.File) (cbt.Delta, error) {
	done := func() {
		for _, f := range files {
			f.Close()
		}
	}
	if err != nil {
		done()
		return cbt.Delta{}, failed(err, "snapshot %s", id)
	}
	extents := delta.Extents
	delta.Extents = func(yield func(cbt.Extent, error) bool) {
		defer done()
		for e, err := range extents {
			if err != nil {
				err = failed(err, "snapshot %s", id)
			}
			if !yield(e, err) {
				return
			}
		}
	}
	return delta, nil
}

// openSnapshot opens a published snapshot's file and tells its volume.
func (a *Adapter) openSnapshot(ctx context.Context, id adapters.SnapshotID) (adapters.VolumeID, *os.File, error) {
	at, e, err := a.lookup(ctx, id)
	if err != nil {
		return at.id, nil, err
	}
	e.folder.Close()
	if e.record.Mark != adapters.Verified {
		e.file.Close()
		return at.id, nil, fault.Errorf(fault.Invalid, "snapshot %s is still cutting: nobody may read it before it is published", id)
	}
	return at.id, e.file, nil
}

// Open opens a snapshot. It goes on reading after the snapshot was deleted.
func (a *Adapter) Open(ctx context.Context, id adapters.SnapshotID) (adapters.Image, error) {
	_, f, err := a.openSnapshot(ctx, id)
	if err != nil {
		return nil, err
	}
	st, err := stat(f)
	if err != nil {
		f.Close()
		return nil, failed(err, "snapshot %s", id)
	}
	direct, err := reopen(f, os.O_RDONLY|unix.O_DIRECT|unix.O_NOATIME)
	if err != nil {
		f.Close()
		return nil, failed(err, "snapshot %s", id)
	}
	return &image{id: id, direct: direct, cached: f, size: st.Size}, nil
}

// reopen opens the file of a descriptor once more, with other flags.
func reopen(f *os.File, flags int) (*os.File, error) {
	g, err := os.OpenFile(procPath(f), flags|unix.O_CLOEXEC, 0)
	return g, errno(err)
}

// image reads a snapshot: past the page cache where the alignment allows, through it otherwise.
type image struct {
	id             adapters.SnapshotID
	direct, cached *os.File
	size           int64
}

// pieceMax is the most that is read or written between two looks at the context, in bytes.
const pieceMax = 4 << 20

func (i *image) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fault.Errorf(fault.Invalid, "snapshot %s: read at %d", i.id, off)
	}
	wanted := len(p)
	p = p[:max(0, min(int64(wanted), i.size-off))]
	n := 0
	for n < len(p) {
		if err := ctx.Err(); err != nil {
			return n, err
		}
		piece, direct := nextPiece(p[n:], off+int64(n))
		f := i.cached
		if direct {
			f = i.direct
		}
		m, err := f.ReadAt(piece, off+int64(n))
		n += m
		if err != nil {
			return n, failed(errno(err), "snapshot %s: reading %d bytes at %d", i.id, len(piece), off+int64(n))
		}
	}
	if n < wanted {
		return n, io.EOF
	}
	return n, nil
}

func (i *image) Size() int64 { return i.size }

func (i *image) Close() error {
	i.direct.Close()
	return errno(i.cached.Close())
}

// nextPiece is the start of p that is read or written at once at an offset, and whether directly: its whole aligned
// part, or what is left of it.
func nextPiece(p []byte, off int64) (piece []byte, direct bool) {
	p = p[:min(len(p), pieceMax)]
	if off%adapters.ImageAlign != 0 || uintptr(unsafe.Pointer(unsafe.SliceData(p)))%adapters.ImageAlign != 0 {
		return p, false
	}
	if whole := len(p) / adapters.ImageAlign * adapters.ImageAlign; whole > 0 {
		return p[:whole], true
	}
	return p, false
}
