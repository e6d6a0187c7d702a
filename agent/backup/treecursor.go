package backup

import (
	"context"
	"iter"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/repository"
)

// cursor reads a directory of the base beside one of the snapshot, both in the same order.
type cursor struct {
	pull func() (repository.TreeEntry, error, bool)
	stop func()
	at   *repository.TreeEntry // the next; nil at the end
	err  error
}

// newCursor begins at a directory's first entry. Of no directory there are none.
func newCursor(ctx context.Context, base *repository.Tree, dir *repository.TreeEntry) *cursor {
	if base == nil || dir == nil {
		return &cursor{stop: func() {}}
	}
	c := &cursor{}
	c.pull, c.stop = iter.Pull2(base.Below(ctx, *dir))
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

// find returns what the base has under the name, nil for nothing, and one of the names that were passed on the way to it:
// they are not in the snapshot.
func (c *cursor) find(e adapters.Entry) (was *repository.TreeEntry, skipped string, err error) {
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
