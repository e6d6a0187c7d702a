package cbt

import "iter"

// Merge is the union of two streams. Where both have something, data wins over zero. Neighbours of one kind are joined.
func Merge(a, b Seq) Seq {
	return func(yield func(Extent, error) bool) {
		out := run{yield: yield}
		right := pull(b)
		defer right.stop()
		for e, err := range a {
			if err != nil {
				out.fail(err)
				return
			}
			for right.ok && right.head.Offset < e.End() && e.Length > 0 {
				var piece Extent
				switch r := right.head; {
				case r.Offset < e.Offset:
					piece = r.until(e.Offset)
				case e.Offset < r.Offset:
					piece = e.until(r.Offset)
				default:
					piece = e.until(r.End())
					piece.Zero = e.Zero && r.Zero
				}
				if !out.add(piece) {
					return
				}
				e = e.after(piece.End())
				right.skip(piece.End())
			}
			if right.err != nil {
				out.fail(right.err)
				return
			}
			if e.Length > 0 && !out.add(e) {
				return
			}
		}
		for ; right.ok; right.advance() {
			if !out.add(right.head) {
				return
			}
		}
		if right.err != nil {
			out.fail(right.err)
			return
		}
		out.flush()
	}
}

// Subtract is what a has and b has not, in a's kinds; b's do not matter. It does not read b further than a reaches.
func Subtract(a, b Seq) Seq {
	return func(yield func(Extent, error) bool) {
		right := pull(b)
		defer right.stop()
		for e, err := range a {
			if err != nil {
				yield(Extent{}, err)
				return
			}
			for right.skip(e.Offset); right.ok && right.head.Offset < e.End(); right.skip(e.Offset) {
				if piece := e.until(right.head.Offset); piece.Length > 0 && !yield(piece, nil) {
					return
				}
				if e = e.after(right.head.End()); e.Length == 0 {
					break
				}
			}
			if right.err != nil {
				yield(Extent{}, right.err)
				return
			}
			if e.Length > 0 && !yield(e, nil) {
				return
			}
		}
	}
}

// Intersect is what both streams have, in a's kinds; b's do not matter. It ends as soon as one of them does.
func Intersect(a, b Seq) Seq {
	return func(yield func(Extent, error) bool) {
		right := pull(b)
		defer right.stop()
		for e, err := range a {
			if err != nil {
				yield(Extent{}, err)
				return
			}
			for right.skip(e.Offset); right.ok && right.head.Offset < e.End(); right.skip(e.Offset) {
				e = e.after(right.head.Offset)
				piece := e.until(right.head.End())
				if !yield(piece, nil) {
					return
				}
				if e = e.after(piece.End()); e.Length == 0 {
					break
				}
			}
			if right.err != nil {
				yield(Extent{}, right.err)
				return
			}
			if !right.ok {
				return
			}
		}
	}
}

// until is the part of e before an offset, empty if there is none.
func (e Extent) until(offset int64) Extent {
	e.Length = max(min(e.End(), offset)-e.Offset, 0)
	return e
}

// after is the part of e from an offset on, empty if there is none.
func (e Extent) after(offset int64) Extent {
	start := min(max(e.Offset, offset), e.End())
	return Extent{Offset: start, Length: e.End() - start, Zero: e.Zero}
}

// pulled is a stream turned inside out: head is its next extent while ok, and err is why it ended early. Extents come
// over from the stream's coroutine in batches that grow, because a switch costs many times what an extent does, and
// because the first extent of a slow stream should not wait for a hundred more.
type pulled struct {
	head Extent
	ok   bool
	err  error

	batch []Extent
	fail  error // comes after batch
	next  func() ([]Extent, error, bool)
	stop  func()
}

// pull starts reading a stream. The caller calls stop.
func pull(s Seq) *pulled {
	p := new(pulled)
	p.next, p.stop = iter.Pull2(func(yield func([]Extent, error) bool) {
		var buffer [128]Extent
		n, limit := 0, 1
		for e, err := range s {
			if err != nil {
				yield(buffer[:n], err)
				return
			}
			buffer[n] = e
			if n++; n == limit {
				if !yield(buffer[:n], nil) {
					return
				}
				n, limit = 0, min(2*limit, len(buffer))
			}
		}
		yield(buffer[:n], nil)
	})
	p.advance()
	return p
}

// advance moves head to the next extent.
func (p *pulled) advance() {
	for len(p.batch) == 0 {
		if p.ok = p.fail == nil; p.ok {
			p.batch, p.fail, p.ok = p.next()
		}
		if !p.ok {
			p.err = p.fail
			return
		}
	}
	p.head, p.batch, p.ok = p.batch[0], p.batch[1:], true
}

// skip drops everything before an offset.
func (p *pulled) skip(offset int64) {
	for p.ok && p.head.End() <= offset {
		p.advance()
	}
	if p.ok && p.head.Offset < offset {
		p.head = p.head.after(offset)
	}
}
