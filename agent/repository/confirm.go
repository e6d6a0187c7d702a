package repository

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/content"
	"github.com/kopia/kopia/repo/object"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

// safeSession is how long a writer may rely on what it found in the repository. Maintenance takes away what nothing refers
// to, at the earliest five hours after it marked it as deleted (kopia's SafetyFull: four between two cycles, and one
// more), and a mark is seen a quarter of an hour later at the latest. A commit or a checkpoint within that time comes
// early enough: the next cycle takes the marks away.
const safeSession = 4 * time.Hour

// moment is a time by two clocks: one that can be set, and one that cannot and that goes on while the machine sleeps.
type moment struct {
	wall time.Time
	boot time.Duration
}

func momentNow() moment {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		panic("CLOCK_BOOTTIME: " + err.Error()) // in every kernel since 2.6.39
	}
	return moment{time.Now().Round(0), time.Duration(ts.Nano())}
}

// since is how far the moment is from now, by the clock that says more.
func (m moment) since() time.Duration {
	now := momentNow()
	return max(now.wall.Sub(m.wall).Abs(), now.boot-m.boot)
}

// confirm makes sure of everything that a backup refers to before it is committed, when the writer took so long, or goes
// on so long after another, that a maintenance may have taken something away: checkpoints prevent that, unless the
// process was stopped, the machine slept, or the clock was set. Every content must be in kopia's index as it is on the
// medium now, and its pack there; what is marked as deleted is stored anew, so that no maintenance which did not see the
// backup yet drops it. Unavailable if something is gone; the checkpoint is worthless then and goes too.
func (w *Writer) confirm(ctx context.Context, s *session, back *reader, b Backup) error {
	if !w.resumed && w.began.since() < safeSession {
		return nil
	}
	if err := s.kopia.Refresh(ctx); err != nil {
		return w.r.corrupt(err)
	}
	c := confirmation{s: s, from: back.contents, packs: map[blob.ID]bool{}}
	err := w.r.at.fault("confirming a backup in", w.r.eachContent(ctx, back.contents, b, c.content))
	if err == nil {
		err = c.check(ctx, w.r)
	}
	if fault.KindOf(err) != fault.Unavailable {
		return err
	}
	if lost := w.r.dropCheckpoints(ctx, s, b); lost != nil {
		return errors.Join(err, lost)
	}
	return errors.Join(err, w.r.at.fault("writing to", s.kopia.Flush(ctx)))
}

type confirmation struct {
	s    *session
	from content.Reader

	mu    sync.Mutex
	packs map[blob.ID]bool
}

// eachOfImage is eachContent of an image.
func (r *Repository) eachOfImage(ctx context.Context, from content.Reader, b Backup, visit func(context.Context, content.ID) error) error {
	top := b.Image.id
	if index, ok := top.IndexObjectID(); ok {
		top = index
	}
	ids, err := object.VerifyObject(ctx, from.(objectReader), top)
	if err != nil {
		return r.corrupt(err)
	}
	if root, _, ok := b.root.ContentID(); ok {
		ids = append(ids, root)
	}
	for _, id := range ids {
		if err := visit(ctx, id); err != nil {
			return err
		}
	}
	image, err := r.openImage(ctx, from, b)
	if err != nil {
		return err
	}
	seen := map[content.ID]bool{}
	readers, inner := errgroup.WithContext(ctx)
	readers.SetLimit(8)
	for n, segment := range image.segments {
		if seen[segment] {
			continue
		}
		seen[segment] = true
		readers.Go(func() error {
			if err := visit(inner, segment); err != nil {
				return err
			}
			chunks, err := image.Chunks(inner, n)
			for i := 0; err == nil && i < len(chunks); i++ {
				err = visit(inner, chunks[i].id)
			}
			return err
		})
	}
	return readers.Wait()
}

// eachOfTree is eachContent of a tree.
func (r *Repository) eachOfTree(ctx context.Context, from content.Reader, b Backup, visit func(context.Context, content.ID) error) error {
	t, err := r.openTree(ctx, from, b)
	if err != nil {
		return err
	}
	if root, _, ok := b.root.ContentID(); ok {
		if err := visit(ctx, root); err != nil {
			return err
		}
	}
	seen := map[object.ID]bool{}
	var entry func(e TreeEntry) error
	entry = func(e TreeEntry) error {
		if seen[e.object] {
			return nil
		}
		seen[e.object] = true
		all, err := t.Contents(ctx, e)
		if err != nil {
			return err
		}
		for _, c := range all {
			if err := visit(ctx, c.id); err != nil {
				return err
			}
		}
		if e.Type != adapters.Directory {
			return nil
		}
		for child, err := range t.Below(ctx, e) {
			if err == nil {
				err = entry(child)
			}
			if err != nil {
				return err
			}
		}
		return nil
	}
	return entry(t.root)
}

func (c *confirmation) content(ctx context.Context, id content.ID) error {
	info, err := c.from.ContentInfo(ctx, id)
	switch {
	case errors.Is(err, content.ErrContentNotFound):
		return gone(fmt.Sprintf("content %s", id))
	case err != nil:
		return err
	case info.Deleted:
		err := c.s.kopia.ContentManager().UndeleteContent(ctx, id)
		if errors.Is(err, blob.ErrBlobNotFound) || errors.Is(err, content.ErrContentNotFound) {
			return gone(fmt.Sprintf("content %s", id))
		}
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.packs[info.PackBlobID] = true
	return nil
}

// check makes what was stored anew durable, and confirms the packs.
func (c *confirmation) check(ctx context.Context, r *Repository) error {
	if err := c.s.kopia.Flush(ctx); err != nil {
		return r.at.fault("writing to", err)
	}
	for _, prefix := range content.PackBlobIDPrefixes {
		err := r.medium.ListBlobs(ctx, prefix, func(m blob.Metadata) error {
			delete(c.packs, m.BlobID)
			return nil
		})
		if err != nil {
			return r.at.fault("listing", err)
		}
	}
	for pack := range c.packs {
		return gone(fmt.Sprintf("pack %s", pack))
	}
	return nil
}

func gone(what string) error {
	return fault.Errorf(fault.Unavailable, "%s, which the backup relied on, went with a maintenance while the backup was interrupted or the clock was set; back up again", what)
}
