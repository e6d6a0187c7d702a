package mem

import (
	"context"

	"stillpoint.io/stillpoint/cbt"
)

// extents walks two versions of a volume side by side and yields where they differ within [from, end), neighbours of
// one kind merged. Subtrees that are one pointer are stepped over, so the cost follows the changes. From split on the
// base counts as absent. A nil base is no version at all: what is allocated.
func extents(ctx context.Context, base, target *tree, from, split, end int64) cbt.Seq {
	return func(yield func(cbt.Extent, error) bool) {
		w := walk{ctx: ctx, target: target, from: from, split: split, end: end, yield: yield, all: base != nil}
		root := target.blank()
		if base != nil {
			root = base.root
		}
		if w.compare(root, target.root, depth, 0) {
			w.flush()
		}
		if w.err != nil {
			yield(cbt.Extent{}, w.err)
		}
	}
}

type walk struct {
	ctx              context.Context
	target           *tree
	from, split, end int64
	all              bool // mention zeros too
	yield            func(cbt.Extent, error) bool
	last             cbt.Extent // found, and still growing
	steps            int
	err              error
}

// compare goes down both subtrees at start. It reports whether to go on.
func (w *walk) compare(base, target *node, level int, start int64) bool {
	stop := start + span(level)
	if stop <= w.from || start >= w.end {
		return true
	}
	if start >= w.split {
		base = absent
	}
	if base == target && stop <= w.split {
		return true
	}
	if w.steps++; w.steps&0xff == 0 {
		if w.err = w.ctx.Err(); w.err != nil {
			return false
		}
	}
	if level == 0 || (base.whole() && target.whole() && (stop <= w.split || start >= w.split)) {
		return w.found(cbt.Extent{Offset: start, Length: stop - start, Zero: target.whole() && w.target.isZero(target)})
	}
	for i := range int64(fan) {
		if !w.compare(base.kid(i), target.kid(i), level-1, start+i*span(level-1)) {
			return false
		}
	}
	return true
}

// found takes an extent in: clipped, and merged with the one before if they touch.
func (w *walk) found(e cbt.Extent) bool {
	if e.Zero && !w.all {
		return true
	}
	off, end := max(e.Offset, w.from), min(e.End(), w.end)
	if w.last.Length > 0 && w.last.End() == off && w.last.Zero == e.Zero {
		w.last.Length += end - off
		return true
	}
	ok := w.flush()
	w.last = cbt.Extent{Offset: off, Length: end - off, Zero: e.Zero}
	return ok
}

// flush yields what was found, unless the context has ended.
func (w *walk) flush() bool {
	if w.err = w.ctx.Err(); w.err != nil {
		return false
	}
	return w.last.Length == 0 || w.yield(w.last, nil)
}
