package audit

import (
	"cmp"
	"encoding/json"
	"iter"
	"slices"
	"time"

	"stillpoint.io/stillpoint/cbt"
	"stillpoint.io/stillpoint/fault"
)

// Coverage is what is known of the volume by looking: for each stretch of it, the instant of the youngest snapshot whose
// bytes were read there, to be stored or to be compared with what is stored. Whatever a backend got wrong before that
// instant would have been noticed.
//
// It is bounded: of more than coverageMax stretches, neighbours are merged, and what is merged counts as compared when
// the older of the two was. So it may forget, and never claims too much. The zero Coverage is that of a volume of no
// bytes. It is not safe in parallel.
type Coverage struct {
	spans []span // ascending by end; neighbours differ in at
}

// span reaches from the end of the one before to end.
type span struct{ end, at int64 } // bytes; nanoseconds since 1970

const (
	coverageMax     = 1024 // 36 KiB in JSON
	coverageMerged  = coverageMax * 3 / 4
	coverageVersion = 1
)

// Size is the volume's size in bytes.
func (c *Coverage) Size() int64 {
	if len(c.spans) == 0 {
		return 0
	}
	return c.spans[len(c.spans)-1].end
}

// Resize cuts the coverage, or extends it by a stretch that counts as compared at that instant.
func (c *Coverage) Resize(size int64, at time.Time) {
	if old := c.Size(); size > old {
		c.spans = append(c.spans, span{size, at.UnixNano()})
		c.normalize()
		return
	}
	i, exact := slices.BinarySearchFunc(c.spans, size, func(s span, size int64) int { return cmp.Compare(s.end, size) })
	switch {
	case size <= 0:
		c.spans = nil
	case exact:
		c.spans = c.spans[:i+1]
	default:
		c.spans = c.spans[:i+1]
		c.spans[i].end = size
	}
}

// Mark notes that the bytes [from, to) were read from a snapshot of that instant. What is beyond the volume is ignored,
// and where a younger snapshot was read already, that stays.
func (c *Coverage) Mark(from, to int64, at time.Time) {
	from, to = max(0, from), min(to, c.Size())
	if from >= to {
		return
	}
	byEnd := func(s span, off int64) int { return cmp.Compare(s.end, off) }
	first, _ := slices.BinarySearchFunc(c.spans, from+1, byEnd) // the one that has from
	last, _ := slices.BinarySearchFunc(c.spans, to, byEnd)      // the one that has to-1
	var middle []span
	if from > 0 && (first == 0 || c.spans[first-1].end < from) {
		middle = append(middle, span{from, c.spans[first].at})
	}
	for i := first; i <= last; i++ {
		s := c.spans[i]
		middle = append(middle, span{min(s.end, to), max(s.at, at.UnixNano())})
	}
	if tail := c.spans[last]; tail.end > to {
		middle = append(middle, tail)
	}
	before := max(0, first-1) // it may now be of the same instant as what follows
	after := min(len(c.spans), last+2)
	middle = append(slices.Clone(c.spans[before:first]), middle...)
	middle = append(middle, c.spans[last+1:after]...)
	c.spans = slices.Replace(c.spans, before, after, join(middle)...)
	c.bound()
}

// NotAfter lowers what lies in the future to now: a clock was wrong.
func (c *Coverage) NotAfter(now time.Time) {
	for i := range c.spans {
		c.spans[i].at = min(c.spans[i].at, now.UnixNano())
	}
	c.normalize()
}

// At is the instant at which the byte at off, which lies within the volume, was compared.
func (c *Coverage) At(off int64) time.Time {
	i, _ := slices.BinarySearchFunc(c.spans, off+1, func(s span, off int64) int { return cmp.Compare(s.end, off) })
	return time.Unix(0, c.spans[i].at).UTC()
}

// Oldest is the instant since which nobody looked at some stretch of the volume; the zero time for one of no bytes.
func (c *Coverage) Oldest() time.Time {
	if len(c.spans) == 0 {
		return time.Time{}
	}
	oldest := slices.MinFunc(c.spans, func(a, b span) int { return cmp.Compare(a.at, b.at) })
	return time.Unix(0, oldest.at).UTC()
}

// Stale gives what was last compared before that instant, longest ago first, and by offset where it is the same.
func (c *Coverage) Stale(before time.Time) iter.Seq[cbt.Extent] {
	return func(yield func(cbt.Extent) bool) {
		for _, s := range c.stale(before) {
			if !yield(s.extent) {
				return
			}
		}
	}
}

type aged struct {
	extent cbt.Extent
	at     int64
}

func (c *Coverage) stale(before time.Time) []aged {
	var found []aged
	start := int64(0)
	for _, s := range c.spans {
		if s.at < before.UnixNano() {
			found = append(found, aged{cbt.Extent{Offset: start, Length: s.end - start}, s.at})
		}
		start = s.end
	}
	slices.SortStableFunc(found, func(a, b aged) int { return cmp.Compare(a.at, b.at) })
	return found
}

// Next is the first budget bytes of Stale, or less if there are not so many.
func (c *Coverage) Next(budget int64, before time.Time) []cbt.Extent {
	var next []cbt.Extent
	for e := range c.Stale(before) {
		if budget <= 0 {
			break
		}
		e.Length = min(e.Length, budget)
		next = append(next, e)
		budget -= e.Length
	}
	return next
}

// Older is how many bytes were last compared before that instant.
func (c *Coverage) Older(before time.Time) int64 {
	var n int64
	for e := range c.Stale(before) {
		n += e.Length
	}
	return n
}

// normalize joins neighbours of one instant and keeps the bound.
func (c *Coverage) normalize() {
	c.spans = join(c.spans)
	c.bound()
}

// join joins neighbours of one instant, in place.
func join(spans []span) []span {
	kept := spans[:0]
	for _, s := range spans {
		if n := len(kept); n > 0 && kept[n-1].at == s.at {
			kept[n-1].end = s.end
		} else {
			kept = append(kept, s)
		}
	}
	return kept
}

// bound merges the neighbours by which the least is forgotten: bytes times the time they become older by.
func (c *Coverage) bound() {
	for len(c.spans) > coverageMax {
		costs := make([]float64, len(c.spans)-1)
		for i := range costs {
			costs[i] = c.cost(i)
		}
		sorted := slices.Sorted(slices.Values(costs))
		limit, left := sorted[len(c.spans)-coverageMerged], len(c.spans)-coverageMerged
		kept := c.spans[:1]
		for i, s := range c.spans[1:] {
			last := &kept[len(kept)-1]
			if left > 0 && costs[i] <= limit {
				last.end, last.at = s.end, min(last.at, s.at)
				left--
			} else {
				kept = append(kept, s)
			}
		}
		c.spans = join(kept)
	}
}

// cost is what merging the i-th span with the next would forget.
func (c *Coverage) cost(i int) float64 {
	start := int64(0)
	if i > 0 {
		start = c.spans[i-1].end
	}
	a, b := c.spans[i], c.spans[i+1]
	if a.at > b.at {
		return float64(a.end-start) * float64(a.at-b.at)
	}
	return float64(b.end-a.end) * float64(b.at-a.at)
}

// coverageJSON is a Coverage in JSON: for each stretch its end and its instant, in nanoseconds since 1970.
type coverageJSON struct {
	Version int        `json:"version"`
	Spans   [][2]int64 `json:"spans"`
}

// MarshalJSON writes version 1.
func (c *Coverage) MarshalJSON() ([]byte, error) {
	out := coverageJSON{Version: coverageVersion, Spans: make([][2]int64, len(c.spans))}
	for i, s := range c.spans {
		out.Spans[i] = [2]int64{s.end, s.at}
	}
	return json.Marshal(out)
}

// UnmarshalJSON reads version 1. Another is Unsupported; stretches that are not ascending are Corrupt.
func (c *Coverage) UnmarshalJSON(p []byte) error {
	var in coverageJSON
	if err := json.Unmarshal(p, &in); err != nil {
		return fault.Errorf(fault.Corrupt, "coverage: %w", err)
	}
	if in.Version != coverageVersion {
		return fault.Errorf(fault.Unsupported, "coverage: version %d, this program knows %d; use a newer one", in.Version, coverageVersion)
	}
	spans, end := make([]span, len(in.Spans)), int64(0)
	for i, s := range in.Spans {
		if s[0] <= end {
			return fault.Errorf(fault.Corrupt, "coverage: a stretch that ends at %d after one that ends at %d", s[0], end)
		}
		spans[i], end = span{s[0], s[1]}, s[0]
	}
	c.spans = spans
	c.normalize()
	return nil
}

// Due is how many bytes a scrub has to read now, so that scrubs at this pace look at every byte of the volume once
// within that time: the share of the volume that the time since the last scrub is of it, or what would be too old at the
// next one, whichever is more; at least least bytes (so that a small volume gets anywhere), and not more than there is
// that is older than the snapshot to be read.
func Due(c *Coverage, least int64, snapshot, now, last time.Time, within time.Duration) int64 {
	left := c.Older(snapshot)
	since := max(0, now.Sub(last))
	if since >= within {
		return left
	}
	share := int64(float64(c.Size()) * (float64(since) / float64(within)))
	overdue := c.Older(now.Add(since - within))
	return min(left, max(share, overdue, least))
}
