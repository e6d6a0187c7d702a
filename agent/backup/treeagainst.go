package backup

import (
	"context"
	"errors"
	"fmt"
	"time"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/repository"
	"stillpoint.io/stillpoint/fault"
)

// treeComparison compares a tree in the repository with one in a snapshot: every name, description and byte. What the
// repository has lost is passed over: the verification has said so.
type treeComparison struct {
	*comparison
	live  adapters.Tree
	r     *repository.Repository
	saved *repository.Tree
	pool  *Pool
	spare chan struct{} // of goroutines that may be started
}

func (c *comparison) tree(ctx context.Context, q AgainstRequest, live adapters.Tree) (err error) {
	m, err := q.Repository.OpenMedium(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.Close(context.WithoutCancel(ctx))) }()
	saved, err := m.OpenTree(ctx, c.backup)
	if err != nil {
		return unlessLost(err)
	}
	pool := readPool(q.Budget, q.Repository)
	defer pool.Close()
	t := &treeComparison{c, live, q.Repository, saved, pool, make(chan struct{}, pool.workers()-1)}
	root, err := live.Stat(ctx, "")
	if err != nil {
		return err
	}
	c.progress.Total.Add(c.backup.Size)
	return t.entry(ctx, "", root, saved.Root())
}

// unlessLost passes over what the repository has lost.
func unlessLost(err error) error {
	if fault.KindOf(err) == fault.Corrupt {
		return nil
	}
	return err
}

// entry compares what both sides have at a path.
func (c *treeComparison) entry(ctx context.Context, path string, e adapters.Entry, was repository.TreeEntry) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if !was.Same(e) {
		c.differs(0, 0, fmt.Sprintf("%q: the backup has %s, the snapshot %s", path, described(was.Entry), described(e)))
	}
	switch {
	case e.Type != was.Type:
		return nil
	case e.Type == adapters.Directory:
		return c.directory(ctx, path, was)
	case e.Type == adapters.RegularFile:
		return c.file(ctx, path, e, was)
	}
	return nil
}

// described is an entry in words.
func described(e adapters.Entry) string {
	return fmt.Sprintf("a %s of %d bytes with mode %04o, owner %d:%d, time %s, target %q, device %d, link %d, attributes %q",
		e.Type, e.Size, e.Mode, e.UID, e.GID, e.Modified.Format(time.RFC3339Nano), e.Target, e.Device, e.Link, e.Attributes)
}

// directory compares what is in a directory, with all below it.
func (c *treeComparison) directory(ctx context.Context, path string, was repository.TreeEntry) error {
	old := newCursor(ctx, c.saved, &was)
	defer old.stop()
	var jobs work
	var listing error
	for e, err := range c.live.Entries(ctx, path) {
		if listing = err; err != nil {
			break
		}
		for old.at != nil && old.at.Before(e) {
			c.missing(path, old)
		}
		if listing = old.err; listing != nil {
			listing = unlessLost(listing)
			break
		}
		at := join(path, e.Name)
		if old.at == nil || e.Name != old.at.Name {
			c.differs(0, e.Size, fmt.Sprintf("%q: a %s of the snapshot that is not in the backup", at, e.Type))
			continue
		}
		mine := old.at.TreeEntry
		old.next()
		jobs.do(c.spare, func() error { return c.entry(ctx, at, e, mine) })
	}
	for listing == nil && old.err == nil && old.at != nil {
		c.missing(path, old)
	}
	return errors.Join(jobs.wait(), listing, unlessLost(old.err))
}

// missing notes the backup's next name, which is not in the snapshot.
func (c *treeComparison) missing(path string, old *cursor) {
	c.differs(0, old.at.Count().Bytes, fmt.Sprintf("%q: a %s of the backup that is not in the snapshot", join(path, old.at.Name), old.at.Type))
	old.next()
}

// file compares the bytes of two files as far as both have them, chunk by chunk: a chunk's name is its digest.
func (c *treeComparison) file(ctx context.Context, path string, e adapters.Entry, was repository.TreeEntry) (err error) {
	saved, err := c.saved.Open(ctx, was)
	if err != nil {
		return unlessLost(err)
	}
	defer saved.Close()
	f, err := c.live.OpenFile(ctx, path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if f.Size() != e.Size {
		return fault.Errorf(fault.Corrupt, "%q opens with %d bytes and is listed with %d", path, f.Size(), e.Size)
	}
	b, err := c.pool.take(ctx)
	if err != nil {
		return err
	}
	defer c.pool.give(b)
	for off := int64(0); off < was.Size; off += c.r.ChunkSize() {
		length := min(c.r.ChunkSize(), was.Size-off)
		if off+length > e.Size {
			return nil // told as a difference of size
		}
		want, err := repository.ChunkAt(ctx, saved, off)
		if fault.KindOf(err) == fault.Corrupt {
			continue // the verification has said so; what is behind it is compared all the same
		} else if err != nil {
			return err
		}
		if err := c.pool.throttle(ctx, length); err != nil {
			return err
		}
		if err := readFull(ctx, f, b.p, off, length); err != nil {
			return err
		}
		if got, zero := c.r.ChunkOf(b.p[:length]), c.r.ZeroChunk(length); got != want {
			c.differs(0, length, fmt.Sprintf("%q: %d bytes at %d: the backup has %s, the snapshot %s", path, length, off, named(want, zero), named(got, zero)))
		}
		c.mu.Lock()
		c.compared += length
		c.mu.Unlock()
		c.progress.Done.Add(length)
	}
	return nil
}
