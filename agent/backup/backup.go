// Package backup makes backups of snapshots, and volumes of backups.
//
// A backup is planned first, by a pure function over what the backend and the repository have, then run: the changed
// extents become aligned chunks, chunks are read in parallel, all-zero ones are recognised, the others are hashed,
// compressed, encrypted and packed by kopia, and the indexes are written in order behind them. The backup exists once
// its manifest is committed, and that is last.
//
// What the backend calls unchanged or empty is distrusted, as package cbt/audit lays down. Sources with known faults are
// not asked. Some of what is not listed is read as well and compared with the base. Before the commit, random places of
// the whole image are read back from the repository and compared with the snapshot. A backend that is caught makes a full
// backup that reads every byte. Scrub looks at everything in time, whatever was listed; Canary asks the backend about
// writes of our own. A backup that turns out to be wrong is marked suspect, is never a base again, and a new one is made
// where its snapshot still exists.
//
// A run that fails, is cancelled or is killed leaves a repository that is as good as before, with some data in it
// that the next run finds and need not store again if it was flushed. Backups of different ids may run at the same
// time, also of one volume; of two with the same id one is kept.
//
// Memory follows the Budget and not the volume, except for two bits for each chunk of a volume while a backup runs and,
// of an incremental, 36 bytes for each 64 MiB of its base: 14 MiB for 16 TiB in chunks of 1 MiB.
package backup

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync/atomic"
	"time"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/repository"
	"stillpoint.io/stillpoint/cbt"
	"stillpoint.io/stillpoint/cbt/audit"
	"stillpoint.io/stillpoint/fault"
)

// Progress is what a running backup, restore or verification has done so far; whoever shows it polls. All are bytes.
type Progress struct {
	Total atomic.Int64 // to do, as far as known: grows while the changed blocks are listed
	Done  atomic.Int64 // of Total
}

// Request asks for a backup of a snapshot.
type Request struct {
	Adapter    adapters.Adapter // must be an Opener, without being a Differ it reads everything; for trees of files a Trees
	Snapshot   adapters.SnapshotID
	Repository *repository.Repository
	ID         string // the backup's id; empty: derived from the snapshot, so that a repetition finds it
	Full       bool   // reuse no index
	Whole      bool   // Full, and read every byte, also what the backend says is empty
	Distrust   string // why the backend's changed blocks are not to be used, if they are not; makes a full backup
	Budget     Budget
	Pool       *Pool     // of StorePool, when several backups share one; nil: one of the Budget for this backup alone
	Progress   *Progress // may be nil
	Pace       Pace      // of checkpoints

	chance rand.Source // of the audit; nil: one that nobody knows
}

// Report is what a backup did. Counts are bytes. New and reused are of the data that is not all zero; of an
// incremental, everything that the base had is reused.
type Report struct {
	Backup       string          `json:"backup"`         // its handle
	Snapshot     string          `json:"snapshot"`       // its handle
	Kind         repository.Kind `json:"kind"`           // full or incremental
	Base         string          `json:"base"`           // handle of the backup that an incremental reuses
	Reason       string          `json:"reason"`         // why it is full or incremental
	Size         int64           `json:"size"`           // of the volume
	BytesResumed int64           `json:"bytes_resumed"`  // of the image, that an interrupted run had done
	BytesRead    int64           `json:"bytes_read"`     // from the snapshot, for the changed chunks
	BytesAudited int64           `json:"bytes_audited"`  // from the snapshot, to distrust the changed blocks
	BytesChecked int64           `json:"bytes_checked"`  // read back from the repository and compared with the snapshot
	BytesNew     int64           `json:"bytes_new"`      // in chunks that the repository did not have
	BytesReused  int64           `json:"bytes_reused"`   // in chunks that it had
	BytesStored  int64           `json:"bytes_stored"`   // written to the repository, compressed, with indexes
	Tree         *TreeReport     `json:"tree,omitempty"` // of a tree of files
	Seconds      float64         `json:"seconds"`
	Existed      bool            `json:"existed,omitempty"`    // the backup was there already, nothing was done
	Distrusted   bool            `json:"distrusted,omitempty"` // it was to be incremental, and had to be made again as a full one
	Warnings     []string        `json:"warnings,omitempty"`
	Suspect      []string        `json:"suspect,omitempty"` // handles of older backups that turned out to be wrong, or may be
}

// Run makes the backup, or continues one that was interrupted. NotFound: no such snapshot. Busy: it is not ready yet, or
// another backup of the volume is under way. Invalid: it is not verified, or the id belongs to a backup of something
// else. Exhausted: the repository is full. Corrupt: what was stored does not come back as what the snapshot has, or the
// backup of that id is suspect.
func Run(ctx context.Context, q Request) (_ Report, err error) {
	started := time.Now()
	ctx, end := repository.Operation(ctx)
	defer end()
	release, err := q.Repository.Lock(q.Snapshot.Volume)
	if err != nil {
		return Report{}, err
	}
	defer func() { err = errors.Join(err, release()) }()
	if q.Pool == nil {
		q.Pool = StorePool(q.Budget, q.Repository)
		defer q.Pool.Close()
	}
	p, err := Prepare(ctx, q)
	if err != nil {
		return Report{}, err
	}
	report := Report{Snapshot: p.Snapshot.ID.String(), Kind: p.Kind, Reason: p.Reason, Size: p.Snapshot.Size}
	if p.Existing != nil {
		report.Existed, report.Backup = true, p.Existing.Handle.String()
		if p.Existing.Base != "" {
			report.Base = repository.Handle{Remote: q.Repository.Remote(), ID: p.Existing.Base}.String()
		}
		report.BytesReused = p.Existing.Data
		report.Seconds = time.Since(started).Seconds()
		return report, nil
	}
	report.Warnings = p.Warnings
	for _, w := range p.Warnings {
		slog.WarnContext(ctx, w, "snapshot", p.Snapshot.ID.String())
	}
	made, err := run(ctx, q, p, started, &report)
	var distrusted *distrustError
	if errors.As(err, &distrusted) {
		warning := fmt.Sprintf("%v; the backup is made again as a full one", distrusted)
		slog.ErrorContext(ctx, warning, "snapshot", p.Snapshot.ID.String(), "plan", p.Reason)
		report.Warnings, report.Distrusted = append(report.Warnings, warning), true
		if p.Base != nil && distrusted.lied {
			if report.Suspect, err = doubt(ctx, q, *p.Base, distrusted); err != nil {
				return Report{}, fmt.Errorf("backing up %s: looking whether its base is right: %w", p.Snapshot.ID, err)
			}
		}
		if err := q.Repository.GiveUp(ctx, p.ID); err != nil { // what was believed must not be continued
			return Report{}, err
		}
		p.Kind, p.Base, p.Unfinished, p.Resume = repository.Full, nil, nil, nil
		p.Whole, p.Reason = p.Whole || distrusted.lied, "the changed blocks since the base cannot be trusted"
		if q.Progress != nil {
			q.Progress.Total.Store(0)
			q.Progress.Done.Store(0)
		}
		made, err = run(ctx, q, p, started, &report)
	}
	if fault.KindOf(err) == fault.Corrupt { // what was done may be what is wrong
		err = errors.Join(err, q.Repository.GiveUp(context.WithoutCancel(ctx), p.ID))
	}
	if err != nil {
		return Report{}, fmt.Errorf("backing up %s: %w", p.Snapshot.ID, err)
	}
	report.Backup, report.Kind, report.Reason, report.Size = made.Handle.String(), made.Kind, p.Reason, made.Size
	if p.Base != nil {
		report.Base = p.Base.Handle.String()
	}
	report.BytesReused = max(0, made.Data-report.BytesNew)
	report.Seconds = time.Since(started).Seconds()
	return report, nil
}

// run makes the backup as planned. It fails with a distrustError when what the backend says turns out to be worth
// nothing.
func run(ctx context.Context, q Request, p Plan, started time.Time, report *Report) (made repository.Backup, err error) {
	if p.Snapshot.Form == adapters.TreeForm {
		return runTree(ctx, q, p, started, report)
	}
	opener, ok := adapters.As[adapters.Opener](q.Adapter)
	if !ok {
		return made, fault.Errorf(fault.Unsupported, "backend %s cannot open snapshots", p.Snapshot.ID.Volume.Backend)
	}
	source, err := opener.Open(ctx, p.Snapshot.ID)
	if err != nil {
		return made, err
	}
	defer func() { err = errors.Join(err, source.Close()) }()
	if source.Size() != p.Snapshot.Size {
		return made, fault.Errorf(fault.Corrupt, "snapshot %s: opens with %d bytes and is said to have %d", p.Snapshot.ID, source.Size(), p.Snapshot.Size)
	}
	var base *repository.Image
	if p.Base != nil {
		if base, err = q.Repository.OpenImage(ctx, *p.Base); err != nil {
			return made, baseFault(ctx, err)
		}
	}
	known, err := loadAudited(ctx, q.Repository, p.Snapshot.ID.Volume)
	if err != nil {
		return made, err
	}
	known.resize(p.Snapshot.Size, p.Snapshot.Created)
	w, err := q.Repository.NewWriter(ctx)
	if err != nil {
		return made, err
	}
	defer func() { err = errors.Join(err, w.Close(context.WithoutCancel(ctx))) }()
	b := repository.Backup{
		ID: p.ID, Volume: p.Snapshot.ID.Volume, Snapshot: p.Snapshot.ID, Kind: p.Kind,
		Size: p.Snapshot.Size, ChunkSize: q.Repository.ChunkSize(), Created: p.Snapshot.Created, Started: started,
		Cut: p.Snapshot.Notes.Cut, Consistency: p.Snapshot.Notes.Consistency, Unverified: p.Snapshot.Notes.Unverified,
	}
	if p.Base != nil {
		b.Base, b.BaseImage = p.Base.ID, p.Base.Image
	}
	l := newLine(q, source, base, w)
	l.coverage, l.instant = known.Coverage, p.Snapshot.Created
	l.keeper = keeper{pace: q.Pace, capture: func() func(context.Context) error {
		at, done := b, l.index.Part()
		at.Data = l.data
		return func(ctx context.Context) error { return w.Checkpoint(ctx, at, done, p.Base) }
	}}
	if p.Unfinished != nil {
		w.Resume(*p.Unfinished)
	}
	if p.Resume != nil {
		b.Started = p.Resume.Started
		if err := l.resume(ctx, *p.Resume); err != nil {
			return made, baseFault(ctx, err)
		}
		report.BytesResumed = p.Resume.Done
	}
	extents, err := changes(ctx, q.Adapter, p, q.Repository.ChunkSize()) // last: a stream holds its source until it is read
	if err != nil {
		return made, err
	}
	image, err := l.run(ctx, extents)
	if err == nil {
		err = sameSnapshots(ctx, q.Adapter, p)
	}
	report.BytesRead += l.read.Load()
	report.BytesAudited += l.audited.Load()
	report.BytesNew += l.fresh.Load()
	if err != nil {
		return made, err
	}
	b.Image, b.Data, b.Finished = image, l.data, time.Now()
	made, err = w.Commit(ctx, b, l.check)
	report.BytesStored += w.Stored()
	report.BytesChecked += l.checked.Load()
	if err != nil {
		return made, err
	}
	report.Warnings = append(report.Warnings, l.remember(ctx, p, made.Image == image)...)
	return made, nil
}

// remember notes what was looked at, and says what is odd about what was listed. The backup is there; what fails here is
// no reason to say that it is not.
func (l *line) remember(ctx context.Context, p Plan, ours bool) (warnings []string) {
	facts := p.facts
	facts.Listed = l.listed
	for _, f := range audit.Judge(facts) {
		if w := f.String(); p.Base != nil && !slices.Contains(p.Warnings, w) {
			warnings = append(warnings, w)
		}
	}
	if !ours {
		return warnings
	}
	_, err := putAudited(ctx, l.r, p.Snapshot, func(mark func(cbt.Extent)) {
		for from, to := range l.seen.runs((l.size + l.chunk - 1) / l.chunk) {
			mark(cbt.Extent{Offset: from * l.chunk, Length: (to - from) * l.chunk})
		}
	}, time.Time{})
	if err != nil {
		warnings = append(warnings, fmt.Sprintf("the backup is complete, but what was compared for it could not be noted, and will be compared again: %v", err))
	}
	return warnings
}

// baseFault makes a damaged base a reason for a full backup.
func baseFault(ctx context.Context, err error) error {
	if ctx.Err() == nil && fault.KindOf(err) == fault.Corrupt {
		return &distrustError{why: "the base in the repository is damaged: " + err.Error()}
	}
	return err
}

// changes is what the backup has to look at, in whole chunks: of a full backup everything, as data or zero; of an
// incremental what differs from the base, and the rest is the base's.
func changes(ctx context.Context, a adapters.Adapter, p Plan, chunk int64) (cbt.Seq, error) {
	size := p.Snapshot.Size
	differ, ok := adapters.As[adapters.Differ](a)
	if p.Base == nil {
		if !ok || p.Whole {
			return cbt.Align(whole(size), chunk, size), nil
		}
		d, err := differ.Allocated(ctx, p.Snapshot.ID, 0)
		if fault.KindOf(err) == fault.Unsupported {
			return cbt.Align(whole(size), chunk, size), nil
		} else if err != nil {
			return nil, err
		}
		return cbt.Fill(cbt.Align(cbt.Check(d.Extents, 0, size), chunk, size), 0, size), nil
	}
	d, err := differ.Changed(ctx, p.Base.Snapshot, p.Snapshot.ID, 0)
	if k := fault.KindOf(err); k == fault.Unsupported || k == fault.NotFound || k == fault.Corrupt {
		return nil, &distrustError{why: err.Error()}
	} else if err != nil {
		return nil, err
	}
	if d.BaseSize != p.Base.Size || d.TargetSize != size {
		return nil, &distrustError{why: fmt.Sprintf("they are from %d to %d bytes, the volume went from %d to %d", d.BaseSize, d.TargetSize, p.Base.Size, size)}
	}
	return cbt.Align(cbt.Merge(cbt.Check(d.Extents, 0, size), resized(p.Base.Size, size, chunk)), chunk, size), nil
}

func whole(size int64) cbt.Seq {
	if size == 0 {
		return cbt.Of()
	}
	return cbt.Of(cbt.Extent{Length: size})
}

// resized is what a change of size touches by itself: the chunk that was cut short, and what was added, which is zero
// wherever the backend does not say otherwise.
func resized(from, to, chunk int64) cbt.Seq {
	var extents []cbt.Extent
	if edge := min(from, to); from != to && edge%chunk != 0 {
		extents = append(extents, cbt.Extent{Offset: edge / chunk * chunk, Length: min(to-edge/chunk*chunk, chunk)})
	}
	if start := (from + chunk - 1) / chunk * chunk; start < to {
		extents = append(extents, cbt.Extent{Offset: start, Length: to - start, Zero: true})
	}
	return cbt.Of(extents...)
}
