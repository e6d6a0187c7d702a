package thinmeta

import (
	"context"
	"errors"

	"stillpoint.io/stillpoint/cbt"
)

// errStopped says that the consumer of a stream has had enough.
var errStopped = errors.New("stopped")

// stopped turns errStopped into success.
func stopped(err error) error {
	if err == errStopped {
		return nil
	}
	return err
}

// comparison walks the trees of two devices together.
type comparison struct {
	m     *Metadata
	a, b  *cursor // base, target
	limit uint64  // the block at which to stop
	yield func(span) bool
}

// changed lists the blocks that two trees map differently and that touch [from, to) bytes.
func (m *Metadata) changed(ctx context.Context, base, target uint64, from, to int64) cbt.Seq {
	return m.spans(func(yield func(span) bool) error {
		if base == target || from >= to {
			return nil
		}
		a, err := m.newCursor(ctx, base, mappingSize, m.block(from))
		if err != nil {
			return err
		}
		b, err := m.newCursor(ctx, target, mappingSize, m.block(from))
		if err != nil {
			return err
		}
		c := comparison{m: m, a: a, b: b, limit: m.limit(to), yield: yield}
		for min(a.key(), b.key()) < c.limit {
			if err := c.step(); err != nil {
				return stopped(err)
			}
		}
		return nil
	})
}

// step passes over, opens or compares what the cursors stand on.
//
// The one that stands on the smaller key moves, for the other has nothing there. On the same key the subtree that is
// higher is opened, so that both arrive at a subtree they share before either has opened it, however different the trees
// above it are.
func (c *comparison) step() error {
	a, b := c.a, c.b
	ka, kb := a.key(), b.key()
	switch {
	case a.closed && b.closed && a.pending.block == b.pending.block && a.pending.level == b.pending.level:
		a.next()
		b.next()
		return nil
	case a.closed && (ka < kb || ka == kb && (!b.closed || a.pending.level >= b.pending.level)):
		return a.expand()
	case b.closed && kb <= ka:
		return b.expand()
	case ka < kb && (b.closed || b.done()):
		return c.m.run(a, min(kb, c.limit), true, c.yield)
	case kb < ka && (a.closed || a.done()):
		return c.m.run(b, min(ka, c.limit), false, c.yield)
	default:
		return c.leaves()
	}
}

// verdict is what two leaves tell of a block.
type verdict uint8

const (
	same verdict = iota
	written
	discarded
)

// leaves compares the leaves that both cursors stand in, until one of them ends.
func (c *comparison) leaves() error {
	a, b := c.a.top(), c.b.top()
	i, j := a.position, b.position
	var open span // empty while begin == end
	for i < a.n && j < b.n {
		ka, kb := a.key(i), b.key(j)
		key := min(ka, kb)
		if key >= c.limit {
			break
		}
		var v verdict
		switch {
		case ka == kb:
			if a.word(i)>>timeBits != b.word(j)>>timeBits {
				if err := errors.Join(c.m.inside(a, i), c.m.inside(b, j)); err != nil {
					return err
				}
				v = written
			}
			i++
			j++
		case ka < kb:
			if err := c.m.inside(a, i); err != nil {
				return err
			}
			v = discarded
			i++
		default:
			if err := c.m.inside(b, j); err != nil {
				return err
			}
			v = written
			j++
		}
		if v == same {
			continue
		}
		if open.end != key || open.zero != (v == discarded) || open.begin == open.end {
			if open.begin < open.end && !c.yield(open) {
				return errStopped
			}
			open = span{begin: key, zero: v == discarded}
		}
		open.end = key + 1
	}
	if open.begin < open.end && !c.yield(open) {
		return errStopped
	}
	a.position, b.position = i, j
	c.a.settle()
	c.b.settle()
	return nil
}
