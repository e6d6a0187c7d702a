package cbt

import "stillpoint.io/stillpoint/fault"

// Of returns a stream of the given extents. It can be ranged over again.
func Of(extents ...Extent) Seq {
	return func(yield func(Extent, error) bool) {
		for _, e := range extents {
			if !yield(e, nil) {
				return
			}
		}
	}
}

// Check passes a stream on and ends it with a Corrupt error, which names the offsets, at the first extent that breaks
// the contract: not ascending, overlapping, not of positive length, or not within [from, size).
func Check(s Seq, from, size int64) Seq {
	return func(yield func(Extent, error) bool) {
		end := from
		for e, err := range s {
			if err != nil {
				yield(Extent{}, err)
				return
			}
			if e.Length <= 0 || e.Offset < end || e.Offset > size || e.Length > size-e.Offset {
				yield(Extent{}, fault.Errorf(fault.Corrupt, "extent of %d bytes at %d is wrong: it must not be empty, start before %d or end after %d", e.Length, e.Offset, end, size))
				return
			}
			end = e.End()
			if !yield(e, nil) {
				return
			}
		}
	}
}

// Clip keeps what lies within [from, to), cutting extents that straddle an end. It stops reading the stream at to.
func Clip(s Seq, from, to int64) Seq {
	return func(yield func(Extent, error) bool) {
		for e, err := range s {
			if err != nil {
				yield(Extent{}, err)
				return
			}
			if e.Offset >= to {
				return
			}
			start, end := max(e.Offset, from), min(e.End(), to)
			if start < end && !yield(Extent{Offset: start, Length: end - start, Zero: e.Zero}, nil) {
				return
			}
		}
	}
}

// Coalesce joins extents that touch and are of one kind.
func Coalesce(s Seq) Seq {
	return func(yield func(Extent, error) bool) {
		r := run{yield: yield}
		for e, err := range s {
			if err != nil {
				r.fail(err)
				return
			}
			if !r.add(e) {
				return
			}
		}
		r.flush()
	}
}

// Align widens extents to whole chunks; the volume's last chunk ends at size. A chunk is zero if zero extents cover all
// of it. Else it is data, for what a delta leaves out of a chunk is not zero but unchanged. Neighbours of one kind are
// joined. What lies at or behind size is left out.
func Align(s Seq, chunk, size int64) Seq {
	return func(yield func(Extent, error) bool) {
		a := aligner{out: run{yield: yield}, chunk: chunk, size: size}
		for e, err := range s {
			if err != nil {
				a.out.fail(err)
				return
			}
			if !a.add(e) {
				return
			}
		}
		if a.close() {
			a.out.flush()
		}
	}
}

// Fill adds what a stream leaves out of [from, size) as zero extents: from what a snapshot holds it makes the whole
// volume.
func Fill(s Seq, from, size int64) Seq {
	return func(yield func(Extent, error) bool) {
		from := from // it can be ranged over again
		for e, err := range s {
			if err != nil {
				yield(Extent{}, err)
				return
			}
			if gap := e.Offset - from; gap > 0 && !yield(Extent{Offset: from, Length: gap, Zero: true}, nil) {
				return
			}
			if !yield(e, nil) {
				return
			}
			from = e.End()
		}
		if from < size {
			yield(Extent{Offset: from, Length: size - from, Zero: true}, nil)
		}
	}
}

// Total is what a stream adds up to: the number of its extents, and the bytes of its data and of its zero extents.
type Total struct{ Extents, Data, Zero int64 }

// Add counts an extent.
func (t *Total) Add(e Extent) {
	t.Extents++
	if e.Zero {
		t.Zero += e.Length
	} else {
		t.Data += e.Length
	}
}

// Sum adds up a stream. With an error comes the total of what preceded it.
func Sum(s Seq) (Total, error) {
	var t Total
	for e, err := range s {
		if err != nil {
			return t, err
		}
		t.Add(e)
	}
	return t, nil
}

// run holds an extent back until it is known not to grow any more. Its yield must not be called again once one of its
// methods returned false.
type run struct {
	yield   func(Extent, error) bool
	pending Extent
}

// add takes the next extent in order.
func (r *run) add(e Extent) bool {
	if r.pending.Length > 0 && r.pending.End() == e.Offset && r.pending.Zero == e.Zero {
		r.pending.Length += e.Length
		return true
	}
	ok := r.flush()
	r.pending = e
	return ok
}

// flush yields what is held back.
func (r *run) flush() bool {
	e := r.pending
	r.pending = Extent{}
	return e.Length == 0 || r.yield(e, nil)
}

// fail yields what is held back and then the error.
func (r *run) fail(err error) {
	if r.flush() {
		r.yield(Extent{}, err)
	}
}

// aligner is the state of Align: the chunk that extents have covered in part so far.
type aligner struct {
	out         run
	chunk, size int64
	part        Extent // what is known of the open chunk: zero until data is met in it; Length 0 if none is open
	zeros       int64  // how many of its bytes zero extents have covered
}

func (a *aligner) add(e Extent) bool {
	for end := min(e.End(), a.size); e.Offset < end; {
		start := e.Offset - e.Offset%a.chunk
		length := min(a.chunk, a.size-start)
		whole := end - start - (end-start)%a.chunk // bytes of whole chunks from start
		if end == a.size {
			whole = end - start
		}
		if start == e.Offset && whole > 0 {
			if !a.close() || !a.out.add(Extent{Offset: start, Length: whole, Zero: e.Zero}) {
				return false
			}
			e.Offset += whole
			continue
		}
		if a.part.Offset != start || a.part.Length == 0 {
			if !a.close() {
				return false
			}
			a.part, a.zeros = Extent{Offset: start, Length: length, Zero: true}, 0
		}
		stop := min(end, start+length)
		if e.Zero {
			a.zeros += stop - e.Offset
		} else {
			a.part.Zero = false
		}
		e.Offset = stop
	}
	return true
}

// close emits the open chunk.
func (a *aligner) close() bool {
	e := a.part
	a.part = Extent{}
	if e.Length == 0 {
		return true
	}
	e.Zero = e.Zero && a.zeros == e.Length
	return a.out.add(e)
}
