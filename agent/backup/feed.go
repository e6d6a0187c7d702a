package backup

import (
	"context"

	"stillpoint.io/stillpoint/agent/repository"
	"stillpoint.io/stillpoint/cbt"
	"stillpoint.io/stillpoint/cbt/audit"
	"stillpoint.io/stillpoint/fault"
)

// feeder cuts extents into segments and jobs.
type feeder struct {
	*line
	ctx  context.Context
	open *segment // being fed
	next int      // the segment after the last that was fed
}

func (f *feeder) feed(extents cbt.Seq) error {
	segments := f.segments()
	for e, err := range extents {
		if err != nil {
			return f.distrust(err)
		}
		f.mark(e)
		if done := f.start() - e.Offset; done > 0 { // whole segments, by an interrupted run
			done = min(done, e.Length)
			e.Offset, e.Length = e.Offset+done, e.Length-done
		}
		for e.Length > 0 {
			n := int(e.Offset / repository.SegmentSize)
			start, length := f.bounds(n)
			if e.Zero && e.Offset == start && e.Length >= length {
				// Whole segments of zeros.
				last := n + int(e.Length/repository.SegmentSize)
				if e.Offset+e.Length == f.size {
					last = segments
				}
				if err := f.skipTo(n); err != nil {
					return err
				}
				if err := f.send(piece{first: n, last: last, zero: true}); err != nil {
					return err
				}
				f.next = last
				end := min(int64(last)*repository.SegmentSize, f.size)
				e.Offset, e.Length = end, e.Offset+e.Length-end
				continue
			}
			if f.open == nil || f.open.n != n {
				if err := f.begin(n); err != nil {
					return err
				}
			}
			part := min(e.Length, start+length-e.Offset)
			if err := f.add(cbt.Extent{Offset: e.Offset - start, Length: part, Zero: e.Zero}); err != nil {
				return err
			}
			e.Offset, e.Length = e.Offset+part, e.Length-part
		}
	}
	return f.skipTo(segments)
}

// distrust turns a broken list of changes into a full backup.
func (f *feeder) distrust(err error) error {
	if f.base != nil && f.ctx.Err() == nil && fault.KindOf(err) == fault.Corrupt {
		return &distrustError{why: err.Error()}
	}
	return err
}

// mark remembers what is listed, and what of it will be read.
func (f *feeder) mark(e cbt.Extent) {
	first, end := e.Offset/f.chunk, (e.End()+f.chunk-1)/f.chunk
	f.changed.set(first, end)
	if !e.Zero { // what an interrupted run had done was read by it, or not: who knows what it was told
		f.seen.set(max(first, f.start()/f.chunk), end)
	}
	if f.base != nil {
		f.touched += e.Length
		f.listed += audit.ListedOf(e, f.base.Size())
	}
}

// skipTo ends the open segment and lets the base's stand for all before n.
func (f *feeder) skipTo(n int) error {
	if s := f.open; s != nil {
		f.open = nil
		f.finished(s)
	}
	for f.next < n {
		last := n
		if f.base != nil {
			last = min(n, f.base.Whole(f.size))
		}
		if f.base == nil || last <= f.next {
			// A segment whose length changed, though nothing in it: it is made anew from the base's chunks.
			if err := f.begin(f.next); err != nil {
				return err
			}
			f.finished(f.open)
			f.open = nil
			continue
		}
		if err := f.send(piece{first: f.next, last: last}); err != nil {
			return err
		}
		f.next = last
	}
	return nil
}

// begin opens the n-th segment.
func (f *feeder) begin(n int) error {
	if f.open != nil || f.next < n {
		if err := f.skipTo(n); err != nil {
			return err
		}
	}
	s := f.free.Get().(*segment)
	s.n = n
	_, s.length = f.bounds(n)
	s.chunks = s.chunks[:(s.length+f.chunk-1)/f.chunk]
	clear(s.chunks)
	s.base, s.fed = nil, 0
	s.left.Store(1)
	f.open, f.next = s, n+1
	if err := f.send(piece{made: s}); err != nil {
		return err
	}
	if f.base != nil && n < f.base.Segments() {
		return f.do(job{segment: s})
	}
	return nil
}

// add feeds an extent of whole chunks, counted from the segment's start, to the open segment.
func (f *feeder) add(e cbt.Extent) error {
	first, last := int(e.Offset/f.chunk), int((e.End()+f.chunk-1)/f.chunk)
	if e.Zero {
		for i := first; i < last; i++ {
			f.open.chunks[i] = f.r.ZeroChunk(f.open.chunkLength(i, f.chunk))
		}
		return nil
	}
	f.progress.Total.Add(e.Length)
	for at := int(f.buffer / f.chunk); first < last; first += at {
		n := min(at, last-first)
		bytes := int64(n) * f.chunk
		if err := f.window.Acquire(f.ctx, bytes); err != nil {
			return err
		}
		f.open.fed += bytes
		if err := f.do(job{segment: f.open, first: first, count: n}); err != nil {
			return err
		}
	}
	return nil
}

func (s *segment) chunkLength(i int, chunk int64) int64 {
	return min(chunk, s.length-int64(i)*chunk)
}

func (f *feeder) do(j job) error {
	j.segment.left.Add(1)
	return f.submit(f.ctx, j)
}

func (f *feeder) send(p piece) error {
	select {
	case f.pieces <- p:
		return nil
	case <-f.ctx.Done():
		return f.ctx.Err()
	}
}
