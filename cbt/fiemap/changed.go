package fiemap

import (
	"context"
	"errors"

	"stillpoint.io/stillpoint/cbt"
	"stillpoint.io/stillpoint/fault"
)

// comparison derives the difference of two files from their extents, window by window: a window is what one batch of
// each file tells about.
type comparison struct {
	base, target *source
	moves        bool // the filesystem may move extents meanwhile
}

// stream lists what differs from an offset on, which is a multiple of the block, in pieces that may touch.
func (c comparison) stream(ctx context.Context, from int64) cbt.Seq {
	return func(yield func(cbt.Extent, error) bool) {
		buf, look := new(buffers), content{base: c.base, target: c.target}
		emit := func(e cbt.Extent) bool { return yield(e, nil) }
		for pos, more := from, true; more && pos < c.target.size; {
			var err error
			if pos, more, err = c.step(ctx, pos, buf, &look, emit); err != nil {
				yield(cbt.Extent{}, err)
				return
			}
		}
	}
}

// step compares one window from pos on. It returns where the next one starts, and false when emit has had enough.
func (c comparison) step(ctx context.Context, pos int64, buf *buffers, look *content, emit func(cbt.Extent) bool) (next int64, more bool, err error) {
	if err := ctx.Err(); err != nil {
		return pos, false, err
	}
	b, t, err := c.read(pos, buf)
	if err != nil {
		return pos, false, err
	}
	if err := errors.Join(c.base.settled(), c.target.settled()); err != nil {
		return pos, false, err
	}
	more = true
	for end := min(b.end, t.end); more && pos < end; {
		x, y := b.at(pos), t.at(pos)
		stop := min(x.end, y.end, end)
		switch judge(x, y) {
		case differs:
			more = emit(cbt.Extent{Offset: pos, Length: stop - pos, Zero: y.kind == zero})
		case unproved:
			more, err = look.compare(ctx, pos, stop, emit)
		}
		pos = stop
	}
	return pos, more, err
}

// buffers are the batches of both files, and that of the base's second reading.
type buffers struct{ base, target, again batch }

// read lists both files from pos on, one after the other: two listings at once hinder each other on XFS (they take
// turns for the allocation group, and together need five times as long). Where extents move, the answer counts only
// when the base says the same before and after the target was asked, so that at the instant of the target's answer
// both were as told.
func (c comparison) read(pos int64, buf *buffers) (b, t window, err error) {
	common := c.common()
	if pos >= common {
		b = window{end: c.target.size, rest: absent}
		t, err = c.target.window(pos, c.target.size, &buf.target)
		return b, t, err
	}
	for range 8 {
		if b, err = c.base.window(pos, common, &buf.base); err != nil {
			return b, t, err
		}
		if t, err = c.target.window(pos, c.target.size, &buf.target); err != nil {
			return b, t, err
		}
		if !c.moves {
			return b, t, nil
		}
		again, err := c.base.window(pos, common, &buf.again)
		if err != nil {
			return b, t, err
		}
		b.end = min(b.end, again.end)
		if agree(b, again, pos) {
			return b, t, nil
		}
	}
	return b, t, fault.Errorf(fault.Unavailable, "%s: its extents move while they are listed (a balance is running); try again later", c.base.f.Name())
}

// common is how far the base can be compared: whole blocks up to its own end, or all of the target.
func (c comparison) common() int64 {
	if c.base.size >= c.target.size {
		return c.target.size
	}
	return c.base.size - c.base.size%c.base.block
}

// verdict is what the addresses of two pieces tell about their contents.
type verdict uint8

const (
	equal    verdict = iota
	differs          // or counts as different
	unproved         // only the contents can tell
)

func judge(base, target piece) verdict {
	switch {
	case base.kind == absent:
		return differs
	case base.kind != target.kind:
		return differs
	case base.kind == opaqueData:
		return unproved
	case base.shift != target.shift:
		return differs
	default:
		return equal
	}
}

// kind is what is known about the content of a piece.
type kind uint8

const (
	zero       kind = iota
	data            // to be found at its address
	opaqueData      // has no address that proves anything
	absent          // there is nothing to compare with
)

// piece is a run of bytes, up to end, of one kind. shift is the distance from the offset in the file to the address,
// modulo 2^64; 0 if the kind has no address.
type piece struct {
	end   int64
	kind  kind
	shift uint64
}

// window is what a file has from some offset up to end, in whole blocks. Between records and after them lies what rest
// says.
type window struct {
	records []Record
	end     int64
	rest    kind
	next    int // the first record that may lie at or behind the last position asked for
}

// at returns the piece that begins at pos. Positions must ascend.
func (w *window) at(pos int64) piece {
	for w.next < len(w.records) && w.records[w.next].End() <= pos {
		w.next++
	}
	if w.next == len(w.records) {
		return piece{end: w.end, kind: w.rest}
	}
	switch r := &w.records[w.next]; {
	case pos < r.Logical:
		return piece{end: r.Logical, kind: w.rest}
	case r.Flags.Zero():
		return piece{end: r.End()}
	case r.Flags.Plain():
		return piece{end: r.End(), kind: data, shift: r.Physical - uint64(r.Logical)}
	default:
		return piece{end: r.End(), kind: opaqueData}
	}
}

// agree reports whether two windows tell the same from pos on.
func agree(a, b window, pos int64) bool {
	for end := min(a.end, b.end); pos < end; {
		x, y := a.at(pos), b.at(pos)
		if x.kind != y.kind || x.shift != y.shift {
			return false
		}
		pos = min(x.end, y.end)
	}
	return true
}

// window reads a batch from pos on, in whole blocks (an inline extent may end anywhere). It ends at limit or with the
// batch.
func (s *source) window(pos, limit int64, b *batch) (window, error) {
	if err := s.read(pos, b); err != nil {
		return window{}, err
	}
	w := window{records: b.records, end: limit}
	for i := range w.records {
		r := &w.records[i]
		r.Length = s.roundUp(r.End()) - r.Logical
	}
	if n := len(w.records); n > 0 {
		w.end = min(limit, w.records[n-1].End())
	}
	return w, nil
}
