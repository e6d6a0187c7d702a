package reflink

import (
	"context"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/adapters/direct"
	"stillpoint.io/stillpoint/cbt"
	"stillpoint.io/stillpoint/cbt/fiemap"
	"stillpoint.io/stillpoint/fault"
)

// Allocated lists what a snapshot holds, from its extents.
func (a *Adapter) Allocated(ctx context.Context, id adapters.SnapshotID, from int64) (cbt.Delta, error) {
	return onDemand(id, func() (cbt.Delta, []*os.File, error) {
		_, f, err := a.openSnapshot(ctx, id)
		if err != nil {
			return cbt.Delta{}, nil, err
		}
		delta, err := fiemap.Allocated(ctx, f, from)
		return delta, []*os.File{f}, err
	})
}

// Changed compares the extents of two snapshots.
func (a *Adapter) Changed(ctx context.Context, base, target adapters.SnapshotID, from int64) (cbt.Delta, error) {
	return onDemand(target, func() (cbt.Delta, []*os.File, error) {
		one, b, err := a.openSnapshot(ctx, base)
		if err != nil {
			return cbt.Delta{}, nil, err
		}
		other, t, err := a.openSnapshot(ctx, target)
		if err != nil {
			return cbt.Delta{}, []*os.File{b}, err
		}
		if one != other {
			return cbt.Delta{}, []*os.File{b, t}, fault.Errorf(fault.Invalid, "snapshots %s and %s are of different volumes", base, target)
		}
		delta, err := fiemap.Changed(ctx, b, t, from)
		return delta, []*os.File{b, t}, err
	})
}

// onDemand gives a delta whose stream opens the files that it reads when it is ranged over, and closes them at its end:
// an answer that nobody reads holds nothing. Errors name the snapshot.
func onDemand(id adapters.SnapshotID, open func() (cbt.Delta, []*os.File, error)) (cbt.Delta, error) {
	begin := func() (cbt.Delta, func(), error) {
		delta, files, err := open()
		done := func() {
			for _, f := range files {
				f.Close()
			}
		}
		if err != nil {
			done()
			return cbt.Delta{}, nil, failed(err, "snapshot %s", id)
		}
		return delta, done, nil
	}
	delta, done, err := begin()
	if err != nil {
		return cbt.Delta{}, err
	}
	done()
	delta.Extents = func(yield func(cbt.Extent, error) bool) {
		delta, done, err := begin()
		if err != nil {
			yield(cbt.Extent{}, err)
			return
		}
		defer done()
		for e, err := range delta.Extents {
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
	if e.record.Tree {
		e.file.Close()
		return at.id, nil, fault.Errorf(fault.Unsupported, "snapshot %s is a tree of files and has no image", id)
	}
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

func (i *image) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fault.Errorf(fault.Invalid, "snapshot %s: read at %d", i.id, off)
	}
	wanted := len(p)
	p = p[:max(0, min(int64(wanted), i.size-off))]
	n, err := direct.Move(ctx, i.cached, i.direct, p, off, (*os.File).ReadAt)
	if err != nil && err != ctx.Err() {
		return n, failed(errno(err), "snapshot %s: reading %d bytes at %d", i.id, len(p)-n, off+int64(n))
	} else if err != nil {
		return n, err
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
