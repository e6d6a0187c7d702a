package backup

import (
	"context"
	"errors"
	"fmt"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/repository"
	"stillpoint.io/stillpoint/fault"
)

// openTreeAgainst opens a snapshot that is a tree.
func (q AgainstRequest) openTreeAgainst(ctx context.Context, found adapters.Snapshot) (adapters.Tree, error) {
	if found.Form != adapters.TreeForm {
		return nil, fault.Errorf(fault.Invalid, "the backup is of a tree of files, and snapshot %s is of a disk image: name a snapshot of the tree", found.ID)
	}
	trees, ok := adapters.As[adapters.Trees](q.Adapter)
	if !ok {
		return nil, fault.Errorf(fault.Unsupported, "backend %s cannot open snapshots of trees", found.ID.Volume.Backend)
	}
	return trees.OpenTree(ctx, found.ID, nil)
}

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
		c.differs(0, 0, fmt.Sprintf("%q: described as %+v in the backup, and as %+v in the snapshot", path, was.Entry, e))
	}
	switch {
	case e.Type != was.Type:
		return nil
	case e.Type == adapters.Directory:
		return c.directory(ctx, path, was)
	case e.Type == adapters.RegularFile && e.Size == was.Size:
		return c.file(ctx, path, was)
	}
	return nil
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

// file compares a file's bytes, chunk by chunk: a chunk's name is its digest.
func (c *treeComparison) file(ctx context.Context, path string, was repository.TreeEntry) (err error) {
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
	if f.Size() != was.Size {
		return fault.Errorf(fault.Corrupt, "%q opens with %d bytes and is listed with %d", path, f.Size(), was.Size)
	}
	b, err := c.pool.take(ctx)
	if err != nil {
		return err
	}
	defer c.pool.give(b)
	for off := int64(0); off < was.Size; off += c.r.ChunkSize() {
		length := min(c.r.ChunkSize(), was.Size-off)
		if err := c.pool.throttle(ctx, length); err != nil {
			return err
		}
		if err := readFull(ctx, f, b.p, off, length); err != nil {
			return err
		}
		same, err := sameChunk(ctx, saved, c.r, b.p[:length], off)
		if err != nil {
			return unlessLost(err)
		}
		if !same {
			c.differs(0, length, fmt.Sprintf("%q: %d bytes at %d are others in the backup than in the snapshot", path, length, off))
		}
		c.mu.Lock()
		c.compared += length
		c.mu.Unlock()
		c.progress.Done.Add(length)
	}
	return nil
}
