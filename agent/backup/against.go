package backup

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/repository"
	"stillpoint.io/stillpoint/fault"
)

// AgainstRequest asks whether a backup is what a snapshot is that still exists in its backend.
type AgainstRequest struct {
	Repository *repository.Repository
	ID         string
	Adapter    adapters.Adapter // an Opener, or of a backup of a tree Trees
	Snapshot   adapters.SnapshotID
	Budget     Budget
	Progress   *Progress // may be nil
}

// AgainstReport is a verification, and what the comparison found. Counts are bytes.
type AgainstReport struct {
	VerifyReport
	Snapshot      string   `json:"snapshot"`       // its handle
	Same          bool     `json:"same_snapshot"`  // it is the one that the backup was made of
	BytesCompared int64    `json:"bytes_compared"` // all of the volume or of its files, zeros too, but for what the repository has lost
	BytesDiffer   int64    `json:"bytes_differ"`
	Differences   []string `json:"differences,omitempty"` // by offset or, of a tree, by path, and which side is which; the first hundred
}

// VerifyAgainst verifies a backup, and compares every chunk of it with the snapshot: all of the snapshot is read, whatever
// the backend calls unallocated. Of a tree it compares every name, description and byte. A difference is Corrupt. Which
// side is wrong it cannot say; the backup's chunks have just been found to be what was stored.
func VerifyAgainst(ctx context.Context, q AgainstRequest) (report AgainstReport, err error) {
	started := time.Now()
	b, err := q.Repository.Backup(ctx, q.ID)
	if err != nil {
		return report, err
	}
	found, err := q.Adapter.Snapshot(ctx, q.Snapshot)
	if err != nil {
		return report, err
	}
	if found.Form != b.Form {
		return report, fault.Errorf(fault.Invalid, "backup %s is of the form %s, and snapshot %s of the form %s: name a snapshot of that volume", b.Handle, b.Form, found.ID, found.Form)
	}
	live, err := openSource(ctx, q.Adapter, found)
	if err != nil {
		return report, err
	}
	defer func() { err = errors.Join(err, live.Close()) }()
	report.Snapshot, report.Same = found.ID.String(), isOf(b, found)

	var damaged error
	report.VerifyReport, damaged = Verify(ctx, VerifyRequest{Repository: q.Repository, ID: q.ID, Budget: q.Budget, Progress: q.Progress})
	if damaged != nil && fault.KindOf(damaged) != fault.Corrupt {
		return report, damaged
	}
	c := &comparison{backup: b, live: live.image, progress: q.Progress}
	if c.progress == nil {
		c.progress = new(Progress)
	}
	if live.tree != nil {
		err = c.tree(ctx, q, live.tree)
	} else {
		err = c.run(ctx, q.Repository, q.Budget)
	}
	if err != nil {
		return report, fmt.Errorf("comparing %s with %s: %w", b.Handle, found.ID, err)
	}
	report.BytesCompared, report.Seconds = c.compared, time.Since(started).Seconds()
	slices.SortFunc(c.differences, func(x, y difference) int { return cmp.Or(cmp.Compare(x.off, y.off), cmp.Compare(x.words, y.words)) })
	for _, d := range c.differences {
		report.BytesDiffer += d.length
		if len(report.Differences) < badMax {
			report.Differences = append(report.Differences, d.words)
		}
	}
	if len(c.differences) == 0 {
		return report, damaged
	}
	return report, errors.Join(damaged, fault.Errorf(fault.Corrupt, "backup %s is not what snapshot %s is: %s (%d places, %d bytes)", b.Handle, found.ID, report.Differences[0], len(c.differences), report.BytesDiffer))
}

// comparison of a backup's index with a snapshot's bytes.
type comparison struct {
	backup   repository.Backup
	live     adapters.Image // nil of a tree
	progress *Progress

	mu          sync.Mutex
	compared    int64
	differences []difference
}

type difference struct {
	off, length int64
	words       string
}

func (c *comparison) run(ctx context.Context, r *repository.Repository, budget Budget) (err error) {
	m, err := r.OpenMedium(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.Close(context.WithoutCancel(ctx))) }()
	image, err := m.OpenImage(ctx, c.backup)
	if fault.KindOf(err) == fault.Corrupt {
		return nil // the verification has said so
	} else if err != nil {
		return err
	}
	defer image.Close()
	if c.live.Size() != c.backup.Size {
		c.differs(min(c.live.Size(), c.backup.Size), 0, fmt.Sprintf("the backup has %d bytes, the snapshot %d", c.backup.Size, c.live.Size()))
	}
	c.progress.Total.Add(min(c.live.Size(), c.backup.Size))
	size := max(r.ChunkSize(), adapters.ImageAlign)
	g, ctx := errgroup.WithContext(ctx)
	jobs := make(chan int)
	g.Go(func() error {
		defer close(jobs)
		for n := range image.Segments() {
			select {
			case jobs <- n:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		return nil
	})
	for range budget.workers(2 * size) {
		g.Go(func() error {
			p, err := newBuffer(size)
			if err != nil {
				return err
			}
			defer p.free()
			for n := range jobs {
				if err := c.segment(ctx, r, image, n, p.p); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return g.Wait()
}

// segment compares one segment.
func (c *comparison) segment(ctx context.Context, r *repository.Repository, image *repository.Image, n int, p []byte) error {
	chunks, err := image.Chunks(ctx, n)
	if fault.KindOf(err) == fault.Corrupt {
		return nil // the verification has said so
	} else if err != nil {
		return err
	}
	s, _ := image.Segment(n)
	start := int64(n) * repository.SegmentSize
	for i, want := range chunks {
		off := int64(i) * r.ChunkSize()
		length := min(r.ChunkSize(), s.Length-off)
		if start+off+length > c.live.Size() {
			return nil // told as a difference of size
		}
		if err := readFull(ctx, c.live, p, start+off, length); err != nil {
			return err
		}
		zero := r.ZeroChunk(length)
		got := zero
		if !repository.IsZero(p[:length]) {
			got = r.ChunkOf(p[:length])
		}
		if got != want {
			c.differs(start+off, length, fmt.Sprintf("%d bytes at %d: the backup has %s, the snapshot %s", length, start+off, named(want, zero), named(got, zero)))
		}
		c.mu.Lock()
		c.compared += length
		c.mu.Unlock()
		c.progress.Done.Add(length)
	}
	return nil
}

// named is a chunk in words.
func named(c, zero repository.Chunk) string {
	if c == zero {
		return "zeros"
	}
	return "content " + c.String()
}

func (c *comparison) differs(off, length int64, words string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.differences = append(c.differences, difference{off, length, words})
}
