package backup

import (
	"context"
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

// condemn marks as suspect every backup of a volume that may have wrong what one of them has: the one itself, and those
// that have the same chunk at the same place, unless they read it from their own snapshot, or it was still right after
// them. It is loud, and returns the handles of those that it marked.
func condemn(ctx context.Context, r *repository.Repository, wrong repository.Backup, places []place, coverage *audit.Coverage) ([]string, error) {
	all, err := r.Backups(ctx, repository.Filter{Volume: wrong.Volume})
	if err != nil {
		return nil, err
	}
	holders := make([][]bool, len(all)) // by backup and place
	for i, b := range all {
		if holders[i], err = holds(ctx, r, b, places); err != nil {
			return nil, err
		}
	}
	var marked []string
	mark := func(b repository.Backup, why string, off int64) error {
		why = fmt.Sprintf("the chunk at %d %s", off, why)
		if err := r.MarkSuspect(ctx, b.ID, why); err != nil {
			return err
		}
		slog.ErrorContext(ctx, "a backup is suspect", "backup", b.Handle.String(), "volume", b.Volume.String(), "why", why)
		marked = append(marked, b.Handle.String())
		return nil
	}
	for i, b := range all {
		if b.Suspect != "" || b.ID == wrong.ID {
			continue
		}
		for k, p := range places {
			if holders[i][k] && !innocent(r, b, p, k, all, holders, coverage) {
				if err := mark(b, "may be an older one than its snapshot had", p.off); err != nil {
					return marked, err
				}
				break
			}
		}
	}
	// Last, so that whoever dies before leaves it to be found again.
	return marked, mark(wrong, "is not the one that its snapshot has", places[0].off)
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
func innocent(r *repository.Repository, b repository.Backup, p place, k int, all []repository.Backup, holders [][]bool, coverage *audit.Coverage) bool {
	if b.Kind == repository.Full && p.stale != r.ZeroChunk(min(r.ChunkSize(), b.Size-p.off)) {
		return true
	}
	if p.off >= coverage.Size() {
		return false
	}
	looked := coverage.At(p.off)
	if b.Created.After(looked) {
		return false
	}
	for i, other := range all {
		if other.Created.Equal(looked) && holders[i][k] {
			return true
		}
	}
	return false
}

// doubt looks whether the base of an incremental was wrong already where the backend was caught, in the base's own
// snapshot, and condemns what may be wrong then.
func doubt(ctx context.Context, q Request, base repository.Backup, d *distrustError) ([]string, error) {
	opener, ok := adapters.As[adapters.Opener](q.Adapter)
	if !ok {
		return nil, nil
	}
	now, err := q.Adapter.Snapshot(ctx, base.Snapshot)
	if err != nil || !isOf(base, now) {
		return nil, err
	}
	source, err := opener.Open(ctx, base.Snapshot)
	if err != nil {
		return nil, err
	}
	defer source.Close()
	b, err := newBuffer(max(q.Repository.ChunkSize(), adapters.ImageAlign))
	if err != nil {
		return nil, err
	}
	defer b.free()
	length := min(q.Repository.ChunkSize(), base.Size-d.off)
	if err := readFull(ctx, source, b.p, d.off, length); err != nil {
		return nil, err
	}
	if q.Repository.ChunkOf(b.p[:length]) == d.stale {
		return nil, nil
	}
	known, err := loadAudited(ctx, q.Repository, base.Volume)
	if err != nil {
		return nil, err
	}
	return condemn(ctx, q.Repository, base, []place{{d.off, d.stale}}, known.Coverage)
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
