package backup

import (
	"context"
	"iter"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/repository"
)

// cursor reads a directory of the base, or of a checkpoint, beside one of the snapshot, both in the same order.
type cursor struct {
	pull func() (repository.PartEntry, error, bool)
	stop func()
	at   *repository.PartEntry // the next; nil at the end
	err  error
}

// newCursor begins at a directory's first entry. Of no directory there are none.
func newCursor(ctx context.Context, base *repository.Tree, dir *repository.TreeEntry) *cursor {
	if base == nil || dir == nil {
		return &cursor{stop: func() {}}
	}
	return cursorOver(func(yield func(repository.PartEntry, error) bool) {
		for e, err := range base.Below(ctx, *dir) {
			if !yield(repository.PartEntry{TreeEntry: e}, err) {
				return
			}
		}
	})
}

// newPartCursor begins at the first entry of a directory that an interrupted run did not finish. Of nil there are none.
func newPartCursor(ctx context.Context, part *repository.UnfinishedTree, dir *repository.PartEntry) *cursor {
	if dir == nil || !dir.Unfinished {
		return &cursor{stop: func() {}}
	}
	return cursorOver(part.Part(ctx, *dir))
}

func cursorOver(all iter.Seq2[repository.PartEntry, error]) *cursor {
	c := &cursor{}
	c.pull, c.stop = iter.Pull2(all)
	c.next()
	return c
}

func (c *cursor) next() {
	c.at = nil
	if e, err, ok := c.pull(); err != nil {
		c.err = err
	} else if ok {
		c.at = &e
	}
}

// find returns what is there under the name, nil for nothing, and one of the names that were passed on the way to it:
// they are not in the snapshot.
func (c *cursor) find(e adapters.Entry) (was *repository.PartEntry, skipped string, err error) {
	for c.at != nil && c.at.Before(e) {
		skipped = c.at.Name
		c.next()
	}
	if c.at != nil && c.at.Name == e.Name && (c.at.Type == adapters.Directory) == (e.Type == adapters.Directory) {
		was = c.at
		c.next()
	}
	return was, skipped, c.err
}

// rest returns one of the names that are left.
func (c *cursor) rest() (string, error) {
	if c.at != nil {
		return c.at.Name, c.err
	}
	return "", c.err
}
