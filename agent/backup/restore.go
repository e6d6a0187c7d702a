package backup

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

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
	Directory string          // of a tree, instead of Target and Volume: a new directory on this machine
	Only      string          // of a tree: the path in it to restore, instead of all of it
	Size      int64           // bytes; 0: the source's, or the existing volume's. What is beyond the source reads as zeros
	Overwrite bool            // write over an existing volume
	Suspect   bool            // restore a backup even if it is suspect
	Copy      bool            // copy a snapshot even where its backend could make a volume that shares its blocks
	GiveUp    bool            // remove what an interrupted restore of this source left, and make nothing
	Origin    adapters.Origin // of a new volume that is made for somebody
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
	Cloned       bool    `json:"cloned,omitempty"`  // nothing was copied: the volume shares the snapshot's blocks
	Entries      int64   `json:"entries,omitempty"` // names that were made, of a tree
	Seconds      float64 `json:"seconds"`
}

// Restore makes the source into a volume, or writes it over one. Invalid: the volume would be smaller than the source.
// Corrupt: the backup is suspect, or something in the repository is not what it must be; a new volume is then not made,
// an overwritten one is overwritten in part.
//
// A snapshot becomes a new volume of its own backend without being copied, where the backend is a Cloner.
//
// A restore that was interrupted keeps what it wrote; the same restore again continues it. From a backup, whatever the
// target holds already is compared with the backup's digests and neither read from the repository nor written again;
// that goes for an overwritten volume too, so that only differences move.
func Restore(ctx context.Context, q RestoreRequest) (RestoreReport, error) {
	started := time.Now()
	ctx, end := repository.Operation(ctx)
	defer end()
	if tree, err := q.Source.isTree(ctx); err != nil || tree {
		if err != nil {
			return RestoreReport{}, err
		}
		report, err := restoreTree(ctx, q)
		err = errors.Join(err, q.Source.noteDamage(ctx, err))
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
	var report RestoreReport
	if err = suspected(from.suspect, q.Suspect || q.GiveUp); err == nil {
		report, err = restore(ctx, q, from)
	}
	if err = errors.Join(err, from.image.Close()); err != nil {
		err = errors.Join(err, q.Source.noteDamage(ctx, err))
		return RestoreReport{}, fmt.Errorf("restoring %s to %s: %w", from.handle, q.Volume, err)
	}
	report.Seconds = time.Since(started).Seconds()
	return report, nil
}

// suspected refuses a backup that is suspect, for a reason, unless somebody insists.
func suspected(why string, insist bool) error {
	if why == "" || insist {
		return nil
	}
	return fault.Errorf(fault.Corrupt, "the backup is suspect: %s; restore another, or insist on this one (--suspect)", why)
}

// noteDamage records what a restore found to be damaged, where the repository can be written.
func (s Source) noteDamage(ctx context.Context, found error) error {
	if s.repository == nil || fault.KindOf(found) != fault.Corrupt {
		return nil
	}
	if err := s.repository.NoteDamageOf(context.WithoutCancel(ctx), found); fault.KindOf(err) != fault.Invalid {
		return err
	}
	return nil
}

// opened is a source that can be read.
type opened struct {
	image   adapters.Image
	extents cbt.Seq // all of it, data and zero, without a gap
	handle  string
	token   string // the same for the same content
	pool    func(Budget) *Pool
	suspect string // why it may be wrong, of a backup that is suspect
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
		return opened{image, image.Extents(ctx), b.Handle.String(), b.Handle.String() + " " + b.Image.String(), func(b Budget) *Pool { return readPool(b, s.repository) }, b.Suspect}, nil
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
	extents, err := changes(ctx, s.adapter, Plan{Snapshot: found}, adapters.ImageAlign)
	if err != nil {
		return opened{}, errors.Join(err, image.Close())
	}
	handle := found.ID.String()
	return opened{image, extents, handle, found.ID.Full() + found.Created.String(), copyPool, ""}, nil
}

func restore(ctx context.Context, q RestoreRequest, from opened) (RestoreReport, error) {
	restorer, ok := adapters.As[adapters.Restorer](q.Target)
	if !ok {
		return RestoreReport{}, fault.Errorf(fault.Unsupported, "backend %s cannot make volumes", q.Volume.Backend)
	}
	spec := adapters.VolumeSpec{ID: q.Volume, Size: cmp.Or(q.Size, from.image.Size()), Overwrite: q.Overwrite, Origin: q.Origin}
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
	report := RestoreReport{Source: from.handle}
	target, err := q.beginClone(ctx, spec)
	if report.Cloned = err == nil; fault.KindOf(err) == fault.Unsupported {
		target, err = restorer.Begin(ctx, spec)
	}
	if err != nil {
		return RestoreReport{}, err
	}
	if q.GiveUp {
		report.Volume, report.Size = q.Volume.String(), spec.Size
		return report, target.Abort(ctx)
	}
	if report.Cloned {
		return report.commit(ctx, target)
	}
	f := newFiller(q, from, target)
	defer f.pool.Close()
	if err := f.run(ctx, spec.Size); fault.KindOf(err) == fault.Corrupt {
		return RestoreReport{}, errors.Join(err, target.Abort(context.WithoutCancel(ctx)))
	} else if err != nil {
		return RestoreReport{}, errors.Join(err, target.Close())
	}
	report.BytesWritten, report.BytesFound, report.BytesZeroed = f.written.Load(), f.found.Load(), f.zeroed.Load()
	return report.commit(ctx, target)
}

// beginClone begins a new volume that shares the snapshot's blocks. Unsupported: it is to be copied.
func (q RestoreRequest) beginClone(ctx context.Context, spec adapters.VolumeSpec) (adapters.Target, error) {
	cloner, ok := adapters.As[adapters.Cloner](q.Target)
	if !ok || q.Copy || q.Overwrite || q.Source.adapter == nil || q.Source.snapshot.Volume.Backend != q.Volume.Backend {
		return nil, fault.Errorf(fault.Unsupported, "it is to be copied")
	}
	spec.Token = adapters.ShortName(spec.Token + " as a clone")
	return cloner.BeginClone(ctx, q.Source.snapshot, spec)
}

// commit makes the target a volume, and completes the report of that.
func (r RestoreReport) commit(ctx context.Context, target adapters.Target) (RestoreReport, error) {
	v, err := target.Commit(ctx)
	r.Volume, r.Path, r.Size = v.ID.String(), v.Path, v.Size
	return r, err
}
