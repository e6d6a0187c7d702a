package audit

import (
	"fmt"
	"math/bits"
	"slices"

	"stillpoint.io/stillpoint/cbt"
	"stillpoint.io/stillpoint/fault"
)

// CanaryMin is the smallest volume that a canary can live on, in bytes.
const CanaryMin = 1 << 20

// canaryBlock is how much a known write writes, and what every offset is a multiple of. Bytes.
const canaryBlock = 4 << 10

// Write is one of a canary's known writes. Offset and Length are bytes, and multiples of 4 KiB.
type Write struct {
	Offset, Length int64
	Zero           bool   // written as zeros, by the call for it
	Where          string // in words
}

// Pattern is what a canary does to its volume of size bytes: first are written before its first snapshot, then between
// its snapshots. The latter are ascending and apart. Invalid: the size is below CanaryMin or no multiple of 4 KiB.
//
// What is written between are the places where backends went wrong: the first block and the last, both sides of the edges
// that every power of two is, one block in the middle of a hole, and a stretch with data that becomes zero.
func Pattern(size int64) (first, then []Write, err error) {
	if size < CanaryMin || size%canaryBlock != 0 {
		return nil, nil, fault.Errorf(fault.Invalid, "a canary wants a volume of %d bytes or more, a multiple of %d, not of %d", CanaryMin, canaryBlock, size)
	}
	top := int64(1) << (bits.Len64(uint64(size)) - 1) // the largest power of two that is not more than size
	half := top / 2                                   // so [half, top) is whole
	hole := half + half/2
	full, data := half/2+half/4, min(half/16, 256<<10)
	first = []Write{
		{Offset: 0, Length: canaryBlock, Where: "the first block"},
		{Offset: full, Length: data, Where: "a stretch of data"},
		{Offset: hole - half/8, Length: half / 4, Zero: true, Where: "a hole"},
	}
	then = []Write{
		{Offset: 0, Length: canaryBlock, Where: "the first block"},
		{Offset: full, Length: data, Zero: true, Where: "data that was zeroed"},
		{Offset: hole, Length: canaryBlock, Where: "a block in the middle of a hole"},
		{Offset: size - canaryBlock, Length: canaryBlock, Where: "the last block"},
	}
	for n := bits.Len64(64<<10) - 1; int64(1)<<n < size-2*canaryBlock; n++ {
		then = append(then, Write{Offset: 1<<n - canaryBlock, Length: 2 * canaryBlock, Where: fmt.Sprintf("across 2^%d", n)})
	}
	slices.SortFunc(then, func(a, b Write) int { return int(min(1, max(-1, a.Offset-b.Offset))) })
	return first, then, nil
}

// Comparison is what a backend's list says about known writes. Counts are bytes.
type Comparison struct {
	Writes  int
	Missed  []Write // not listed, or data listed as zero
	Written int64
	Listed  int64
}

// Compare holds a list of changes against the writes that were made. Its error is the list's.
func Compare(writes []Write, changes cbt.Seq) (Comparison, error) {
	c := Comparison{Writes: len(writes)}
	covered := make([]int64, len(writes))
	for e, err := range changes {
		if err != nil {
			return c, err
		}
		c.Listed += e.Length
		for i, w := range writes {
			if !e.Zero || w.Zero {
				covered[i] += max(0, min(e.End(), w.Offset+w.Length)-max(e.Offset, w.Offset))
			}
		}
	}
	for i, w := range writes {
		c.Written += w.Length
		if covered[i] < w.Length {
			c.Missed = append(c.Missed, w)
		}
	}
	return c, nil
}

// String is the verdict in a sentence.
func (c Comparison) String() string {
	if len(c.Missed) == 0 {
		return fmt.Sprintf("all of %d known writes are among the changed blocks: %d bytes were written, %d are listed", c.Writes, c.Written, c.Listed)
	}
	w := c.Missed[0]
	return fmt.Sprintf("%d of %d known writes are not among the changed blocks, the first of them %d bytes at %d (%s)", len(c.Missed), c.Writes, w.Length, w.Offset, w.Where)
}
