package backup

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/repository"
	"stillpoint.io/stillpoint/cbt"
	"stillpoint.io/stillpoint/fault"
)

// Source is what a restore reads: FromBackup or FromSnapshot.
type Source struct {
	repository *repository.Repository
	backup     string
	adapter    adapters.Adapter
	snapshot   adapters.SnapshotID
}

// FromBackup restores a backup, by its id in the repository. Every chunk is checked.
func FromBackup(r *repository.Repository, id string) Source {
	return Source{repository: r, backup: id}
}

// FromSnapshot restores straight from a snapshot that still exists in its backend.
func FromSnapshot(a adapters.Adapter, id adapters.SnapshotID) Source {
	return Source{adapter: a, snapshot: id}
}

// RestoreRequest asks for a source as a volume.
type RestoreRequest struct {
	Source    Source
	Target    adapters.Adapter // must be a Restorer, for a tree of files a TreeRestorer
	Volume    adapters.VolumeID
	Directory string // of a tree, instead of Target and Volume: a new directory on this machine
	Only      string // of a tree: the path in it to restore, instead of all of it
	Size      int64  // bytes; 0: the source's, or the existing volume's. What is beyond the source reads as zeros
	Overwrite bool   // write over an existing volume
	GiveUp    bool   // remove what an interrupted restore of this source left, and make nothing
	Budget    Budget
	Progress  *Progress // may be nil
}

// RestoreReport is what a restore did. Counts are bytes.
type RestoreReport struct {
	Source       string  `json:"source"` // handle of the backup or snapshot
	Volume       string  `json:"volume"` // handle of the volume that was made
	Path         string  `json:"path,omitempty"`
	Size         int64   `json:"size"`
	BytesWritten int64   `json:"bytes_written"`     // data
	BytesFound   int64   `json:"bytes_found"`       // data that the target had already, of an interrupted restore or of an overwritten volume
	BytesZeroed  int64   `json:"bytes_zeroed"`      // zeros written because the target might have held something
	Entries      int64   `json:"entries,omitempty"` // names that were made, of a tree
	Seconds      float64 `json:"seconds"`
}

// Restore makes the source into a volume, or writes it over one. Invalid: the volume would be smaller than the source.
// Corrupt: something in the repository is not what it must be; a new volume is then not made, an overwritten one is
// overwritten in part.
//
// A restore that was interrupted keeps what it wrote; the same restore again continues it. From a backup, whatever the
// target holds already is compared with the backup's digests and neither read from the repository nor written again;
// that goes for an overwritten volume too, so that only differences move.
func Restore(ctx context.Context, q RestoreRequest) (RestoreReport, error) {
	started := time.Now()
	if tree, err := q.Source.isTree(ctx); err != nil || tree {
		if err != nil {
			return RestoreReport{}, err
		}
		report, err := restoreTree(ctx, q)
		report.Seconds = time.Since(started).Seconds()
		return report, err
	}
	if q.Directory != "" || q.Only != "" {
		return RestoreReport{}, fault.Errorf(fault.Invalid, "the source is a disk image: it is restored whole, into a volume")
	}
	from, err := q.Source.open(ctx)
	if err != nil {
		return RestoreReport{}, err
	}
	report, err := restore(ctx, q, from)
	if err = errors.Join(err, from.image.Close()); err != nil {
		return RestoreReport{}, fmt.Errorf("restoring %s to %s: %w", from.handle, q.Volume, err)
	}
	report.Seconds = time.Since(started).Seconds()
	return report, nil
}

// opened is a source that can be read.
type opened struct {
	image   adapters.Image
	extents cbt.Seq // all of it, data and zero, without a gap
	handle  string
	token   string // the same for the same content
	chunk   int64  // what reads should be whole multiples of
}

func (s Source) open(ctx context.Context) (opened, error) {
	if s.repository != nil {
		b, err := s.repository.Backup(ctx, s.backup)
		if err != nil {
			return opened{}, err
		}
		image, err := s.repository.OpenImage(ctx, b)
		if err != nil {
			return opened{}, fmt.Errorf("backup %s: %w", b.Handle, err)
		}
		return opened{image, image.Extents(ctx), b.Handle.String(), b.Handle.String() + " " + b.Image.String(), s.repository.ChunkSize()}, nil
	}
	found, err := s.adapter.Snapshot(ctx, s.snapshot)
	if err != nil {
		return opened{}, err
	}
	opener, ok := adapters.As[adapters.Opener](s.adapter)
	if !ok {
		return opened{}, fault.Errorf(fault.Unsupported, "backend %s cannot open snapshots", found.ID.Volume.Backend)
	}
	image, err := opener.Open(ctx, found.ID)
	if err != nil {
		return opened{}, err
	}
	const chunk = 1 << 20
	extents, err := changes(ctx, s.adapter, Plan{Snapshot: found}, adapters.ImageAlign)
	if err != nil {
		return opened{}, errors.Join(err, image.Close())
	}
	handle := found.ID.String()
	return opened{image, extents, handle, found.ID.Full() + found.Created.String(), chunk}, nil
}

func restore(ctx context.Context, q RestoreRequest, from opened) (RestoreReport, error) {
	restorer, ok := adapters.As[adapters.Restorer](q.Target)
	if !ok {
		return RestoreReport{}, fault.Errorf(fault.Unsupported, "backend %s cannot make volumes", q.Volume.Backend)
	}
	spec := adapters.VolumeSpec{ID: q.Volume, Size: cmp.Or(q.Size, from.image.Size()), Overwrite: q.Overwrite}
	if q.Overwrite {
		v, err := q.Target.Volume(ctx, q.Volume)
		if err != nil {
			return RestoreReport{}, err
		}
		if q.Size == 0 || v.Size < q.Size {
			spec.Size = v.Size
		}
	}
	if spec.Size < from.image.Size() {
		return RestoreReport{}, fault.Errorf(fault.Invalid, "the volume has %d bytes, the source %d; choose a larger one", spec.Size, from.image.Size())
	}
	spec.Token = adapters.ShortName(from.token)
	target, err := restorer.Begin(ctx, spec)
	if err != nil {
		return RestoreReport{}, err
	}
	if q.GiveUp {
		return RestoreReport{Source: from.handle, Volume: q.Volume.String(), Size: spec.Size}, target.Abort(ctx)
	}
	f := &filler{from: from, to: target, progress: q.Progress, pool: readPool(q.Budget, from.chunk)}
	defer f.pool.Close()
	if f.progress == nil {
		f.progress = new(Progress)
	}
	if !target.Fresh() {
		f.digests, _ = from.image.(*repository.Image)
	}
	if err := f.run(ctx, spec.Size); fault.KindOf(err) == fault.Corrupt {
		return RestoreReport{}, errors.Join(err, target.Abort(context.WithoutCancel(ctx)))
	} else if err != nil {
		return RestoreReport{}, errors.Join(err, target.Close())
	}
	v, err := target.Commit(ctx)
	if err != nil {
		return RestoreReport{}, err
	}
	return RestoreReport{
		Source: from.handle, Volume: v.ID.String(), Path: v.Path, Size: v.Size,
		BytesWritten: f.written.Load(), BytesFound: f.found.Load(), BytesZeroed: f.zeroed.Load(),
	}, nil
}

// filler writes a source into a target.
type filler struct {
	from     opened
	to       adapters.Target
	progress *Progress
	pool     *Pool
	digests  *repository.Image // what the target may hold already; nil: nothing

	written, found, zeroed atomic.Int64
}

// run copies all of the source and zeroes the rest up to size.
func (f *filler) run(ctx context.Context, size int64) error {
	g, ctx := errgroup.WithContext(ctx)
	jobs := make(chan cbt.Extent, f.pool.workers())
	g.Go(func() error {
		defer close(jobs)
		for e, err := range f.from.extents {
			if err != nil {
				return err
			}
			if err := f.feed(ctx, jobs, e); err != nil {
				return err
			}
		}
		if rest := size - f.from.image.Size(); rest > 0 {
			return f.feed(ctx, jobs, cbt.Extent{Offset: f.from.image.Size(), Length: rest, Zero: true})
		}
		return nil
	})
	for range f.pool.workers() {
		g.Go(func() error {
			b, err := f.pool.take(ctx)
			if err != nil {
				return err
			}
			defer f.pool.give(b)
			for e := range jobs {
				if err := f.work(ctx, e, b.p); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return g.Wait()
}

// feed cuts an extent into jobs that end on multiples of the buffer. Zeros go in larger pieces.
func (f *filler) feed(ctx context.Context, jobs chan<- cbt.Extent, e cbt.Extent) error {
	unit := f.pool.size
	if e.Zero {
		if f.to.ReadsZero() {
			return nil
		}
		unit = 1 << 30
	}
	f.progress.Total.Add(e.Length)
	for e.Length > 0 {
		part := min(e.Length, unit-e.Offset%unit)
		select {
		case jobs <- cbt.Extent{Offset: e.Offset, Length: part, Zero: e.Zero}:
		case <-ctx.Done():
			return ctx.Err()
		}
		e.Offset, e.Length = e.Offset+part, e.Length-part
	}
	return nil
}

func (f *filler) work(ctx context.Context, e cbt.Extent, p []byte) error {
	defer f.progress.Done.Add(e.Length)
	if !e.Zero {
		if found, err := f.there(ctx, e, p); found || err != nil {
			return err
		}
		if err := f.pool.throttle(ctx, e.Length); err != nil {
			return err
		}
		if err := readFull(ctx, f.from.image, p, e.Offset, e.Length); err != nil {
			return err
		}
		if !repository.IsZero(p[:e.Length]) {
			f.written.Add(e.Length)
			return f.to.WriteAt(ctx, p[:e.Length], e.Offset)
		}
		if f.to.ReadsZero() {
			return nil
		}
	}
	f.zeroed.Add(e.Length)
	return f.to.Zero(ctx, e.Offset, e.Length)
}

// there says that the target holds an extent of whole chunks already.
func (f *filler) there(ctx context.Context, e cbt.Extent, p []byte) (bool, error) {
	if f.digests == nil {
		return false, nil
	}
	if err := f.to.ReadAt(ctx, p[:e.Length], e.Offset); fault.KindOf(err) == fault.Unsupported {
		return false, nil
	} else if err != nil {
		return false, err
	}
	same, err := f.digests.Holds(ctx, p[:e.Length], e.Offset)
	if same {
		f.found.Add(e.Length)
	}
	return same, err
}
