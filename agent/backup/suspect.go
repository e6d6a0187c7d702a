package backup

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/repository"
	"stillpoint.io/stillpoint/cbt/audit"
	"stillpoint.io/stillpoint/fault"
)

// place is a chunk that a backup has wrong: stale is what it has at off.
type place struct {
	off   int64
	stale repository.Chunk
}

// judge decides which backups of a volume may be wrong.
type judge struct {
	adapter    adapters.Adapter
	repository *repository.Repository
	coverage   *audit.Coverage // of the volume, as it was before the wrong places were found
	places     []place
	all        []repository.Backup
	holders    [][]bool // by backup and place: it has the stale chunk
}

// condemn marks as suspect every backup of a volume that may have wrong what one of them has: the one itself, and those
// that have the same chunk at the same place. Not those whose own snapshot still exists and has that chunk too, nor those
// that read it from their snapshot when they were made, nor those that are older than when it was last right. It is loud,
// and returns the handles of those that it marked.
func condemn(ctx context.Context, a adapters.Adapter, r *repository.Repository, wrong repository.Backup, places []place, coverage *audit.Coverage) (marked []string, err error) {
	j := judge{adapter: a, repository: r, coverage: coverage, places: places}
	if j.all, err = r.Backups(ctx, repository.Filter{Volume: wrong.Volume}); err != nil {
		return nil, err
	}
	j.holders = make([][]bool, len(j.all))
	for i, b := range j.all {
		if j.holders[i], err = holds(ctx, r, b, places); err != nil {
			return nil, err
		}
	}
	mark := func(b repository.Backup, off int64, how string) error {
		why := fmt.Sprintf("the chunk at %d %s", off, how)
		if err := r.MarkSuspect(ctx, b.ID, why); err != nil {
			return err
		}
		slog.ErrorContext(ctx, "a backup is suspect", "backup", b.Handle.String(), "volume", b.Volume.String(), "why", why)
		marked = append(marked, b.Handle.String())
		return nil
	}
	for i, b := range j.all {
		if b.Suspect != "" || b.ID == wrong.ID {
			continue
		}
		k, err := j.accuse(ctx, i)
		if err == nil && k >= 0 {
			err = mark(b, places[k].off, "may be an older one than its snapshot had")
		}
		if err != nil {
			return marked, err
		}
	}
	// Last, so that whoever dies before leaves it to be found again.
	return marked, mark(wrong, places[0].off, "is not the one that its snapshot has")
}

// accuse finds a place that the i-th backup may have wrong, or -1.
func (j judge) accuse(ctx context.Context, i int) (found int, err error) {
	b := j.all[i]
	var w *witness
	defer func() { err = errors.Join(err, w.close()) }()
	for k, p := range j.places {
		if !j.holders[i][k] || j.innocent(b, p, k) {
			continue
		}
		if w == nil {
			if w, err = call(ctx, j.adapter, j.repository, b); err != nil {
				return -1, err
			}
		}
		if right, err := w.confirms(ctx, p); err != nil {
			return -1, err
		} else if !right {
			return k, nil
		}
	}
	return -1, nil
}

// holds says at which of the places a backup has the stale chunk. One whose index is damaged is judged as if it had.
func holds(ctx context.Context, r *repository.Repository, b repository.Backup, places []place) ([]bool, error) {
	has := make([]bool, len(places))
	image, err := r.OpenImage(ctx, b)
	damaged := fault.KindOf(err) == fault.Corrupt && ctx.Err() == nil
	if err != nil && !damaged {
		return nil, err
	}
	if !damaged {
		defer image.Close()
	}
	for k, p := range places {
		if p.off >= b.Size {
			continue
		}
		if damaged {
			has[k] = true
			continue
		}
		chunks, err := image.Chunks(ctx, int(p.off/repository.SegmentSize))
		if err != nil && (fault.KindOf(err) != fault.Corrupt || ctx.Err() != nil) {
			return nil, err
		}
		has[k] = err != nil || chunks[p.off%repository.SegmentSize/r.ChunkSize()] == p.stale
	}
	return has, nil
}

// innocent says that a backup which has the stale chunk has it with right: it read it itself, or the place was looked at
// in a snapshot as young as the backup's or younger, and a backup of that very snapshot has the chunk too.
func (j judge) innocent(b repository.Backup, p place, k int) bool {
	if b.Kind == repository.Full && p.stale != j.repository.ZeroChunk(min(j.repository.ChunkSize(), b.Size-p.off)) {
		return true
	}
	if p.off >= j.coverage.Size() {
		return false
	}
	looked := j.coverage.At(p.off)
	if b.Created.After(looked) {
		return false
	}
	for i, other := range j.all {
		if other.Created.Equal(looked) && j.holders[i][k] {
			return true
		}
	}
	return false
}

// witness is a backup's own snapshot.
type witness struct {
	r     *repository.Repository
	size  int64
	image adapters.Image // nil: it is gone
	p     buffer
}

// call opens the snapshot of a backup, if it is still there.
func call(ctx context.Context, a adapters.Adapter, r *repository.Repository, b repository.Backup) (*witness, error) {
	w := &witness{r: r, size: b.Size}
	opener, ok := adapters.As[adapters.Opener](a)
	now, err := a.Snapshot(ctx, b.Snapshot)
	if !ok || fault.KindOf(err) == fault.NotFound {
		return w, nil
	}
	if err != nil || !isOf(b, now) || now.Size != b.Size || now.State != adapters.Ready {
		return w, err
	}
	if w.p, err = newBuffer(max(r.ChunkSize(), adapters.ImageAlign)); err != nil {
		return w, err
	}
	if w.image, err = opener.Open(ctx, b.Snapshot); err != nil {
		w.p.free()
	}
	return w, err
}

// confirms says that the snapshot has the chunk at that place. One that is gone confirms nothing.
func (w *witness) confirms(ctx context.Context, p place) (bool, error) {
	if w.image == nil {
		return false, nil
	}
	length := min(w.r.ChunkSize(), w.size-p.off)
	if err := readFull(ctx, w.image, w.p.p, p.off, length); err != nil {
		return false, err
	}
	return w.r.ChunkOf(w.p.p[:length]) == p.stale, nil
}

func (w *witness) close() error {
	if w == nil || w.image == nil {
		return nil
	}
	w.p.free()
	return w.image.Close()
}

// doubt looks, in the base's own snapshot, whether the base of an incremental was wrong already where the backend was
// caught, and condemns what may be wrong then. If that snapshot is gone, so is the question: nothing is known.
func doubt(ctx context.Context, q Request, base repository.Backup, d *distrustError) (marked []string, err error) {
	if d.stale == (repository.Chunk{}) {
		return nil, nil // the backend lied about zeros: the base has no part in that
	}
	w, err := call(ctx, q.Adapter, q.Repository, base)
	defer func() { err = errors.Join(err, w.close()) }()
	if err != nil || w.image == nil {
		return nil, err
	}
	p := place{d.off, d.stale}
	if right, err := w.confirms(ctx, p); err != nil || right {
		return nil, err
	}
	known, err := loadAudited(ctx, q.Repository, base.Volume)
	if err != nil {
		return nil, err
	}
	return condemn(ctx, q.Adapter, q.Repository, base, []place{p}, known.Coverage)
}

// sameSnapshots makes sure, after everything was read, that what was read is what was planned: both snapshots are still
// those, and not others that took their names.
func sameSnapshots(ctx context.Context, a adapters.Adapter, p Plan) error {
	now, err := a.Snapshot(ctx, p.Snapshot.ID)
	if err == nil && (!now.Created.Equal(p.Snapshot.Created) || now.Size != p.Snapshot.Size) {
		return fault.Errorf(fault.Corrupt, "snapshot %s: another of %s took its name while it was read, it was of %s; cut again", p.Snapshot.ID, now.Created.Format(time.RFC3339Nano), p.Snapshot.Created.Format(time.RFC3339Nano))
	}
	if err != nil && fault.KindOf(err) != fault.NotFound { // deleted when it had been read: it was the one
		return err
	}
	if p.Base == nil {
		return nil
	}
	now, err = a.Snapshot(ctx, p.Base.Snapshot)
	switch {
	case fault.KindOf(err) == fault.NotFound:
		return &distrustError{why: "the base's snapshot was deleted while it was compared"}
	case err != nil:
		return err
	case !isOf(*p.Base, now):
		return &distrustError{why: "another snapshot took the name of the base's while it was compared"}
	}
	return nil
}
