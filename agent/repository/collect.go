package repository

import (
	"cmp"
	"context"
	"time"

	"github.com/kopia/kopia/repo"
	"github.com/kopia/kopia/repo/content"
	"github.com/kopia/kopia/repo/maintenance"
	"github.com/kopia/kopia/repo/maintenancestats"
	"github.com/kopia/kopia/repo/manifest"

	"stillpoint.io/stillpoint/fault"
)

// collect marks the contents as deleted that no snapshot refers to, and takes the mark from those that one refers to
// again. It is kopia's snapshot garbage collection, by kopia's rules and safety times and in kopia's books, and differs
// from it (package snapshotgc) in two points: it reads an index once that many backups share, and it stops at a snapshot
// that it cannot read instead of taking its contents for unused. started is when the maintenance began, by the medium's
// clock.
func (r *Repository) collect(ctx context.Context, w repo.DirectRepositoryWriter, started time.Time) error {
	return maintenance.ReportRun(ctx, w, maintenance.TaskSnapshotGarbageCollection, nil, func() (maintenancestats.Kind, error) {
		from := viewOf{w, w.ContentReader().(objectReader)}
		all, err := r.loadSnapshots(ctx, from)
		if err != nil {
			return nil, err
		}
		refs, err := r.refer(ctx, from, all, func(int) int { return 0 })
		if fault.KindOf(err) == fault.Corrupt {
			_, named := r.refer(ctx, from, all, func(n int) int { return n }) // slower, and knows whose it is
			return nil, cmp.Or(named, err)
		} else if err != nil {
			return nil, err
		}
		return sweep(ctx, w, started, func(id content.ID) bool {
			c := refs.table.find(id)
			return c == nil || c.set != 0
		})
	})
}

// flushEvery bounds what is lost when a sweep is killed, and what it holds in memory.
const flushEvery = 100_000

func sweep(ctx context.Context, w repo.DirectRepositoryWriter, started time.Time, used func(content.ID) bool) (maintenancestats.Kind, error) {
	s := new(maintenancestats.SnapshotGCStats)
	err := w.ContentReader().IterateContents(ctx, content.IterateOptions{IncludeDeleted: true}, func(c content.Info) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		size := int64(c.PackedLength)
		switch {
		case c.ContentID.Prefix() == manifest.ContentPrefix:
			s.InUseSystemContentCount++
			s.InUseSystemContentSize += size
		case used(c.ContentID):
			s.InUseContentCount++
			s.InUseContentSize += size
			if !c.Deleted {
				return nil
			}
			s.RecoveredContentCount++
			s.RecoveredContentSize += size
			return w.ContentManager().UndeleteContent(ctx, c.ContentID)
		case started.Sub(c.Timestamp()) < maintenance.SafetyFull.MinContentAgeSubjectToGC:
			s.UnreferencedRecentContentCount++
			s.UnreferencedRecentContentSize += size
		default:
			s.UnreferencedContentCount++
			s.UnreferencedContentSize += size
			if c.Deleted {
				return nil
			}
			s.DeletedContentCount++
			s.DeletedContentSize += size
			if err := w.ContentManager().DeleteContent(ctx, c.ContentID); err != nil {
				return err
			}
			if s.DeletedContentCount%flushEvery == 0 {
				return w.Flush(ctx)
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return s, w.Flush(ctx)
}
