package csi

import (
	"iter"

	"stillpoint.io/stillpoint/cbt"
)

// blockMin is the smallest block of the FIXED_LENGTH style, in bytes.
const blockMin = 4096

// layout is how the ranges of a volume are told: from where, and in blocks of which size.
type layout struct {
	Size  int64 // of the volume, bytes
	From  int64 // ranges that end before or there are not told
	Block int64 // all ranges are this long and begin at multiples of it; 0: they are as they come
}

// newLayout chooses the blocks. In the FIXED_LENGTH style the last block would reach beyond a volume whose size is not a
// multiple of it: so the block is the largest power of two, of at most wanted, that the size is a multiple of. Where that
// is smaller than blockMin, and where wanted is 0, the style is VARIABLE_LENGTH. It is the same in every call for a volume,
// so that a stream is resumed in the style that it began with.
func newLayout(size, from, wanted int64) layout {
	block := wanted
	for block >= blockMin && size%block != 0 {
		block /= 2
	}
	if block < blockMin {
		return layout{Size: size, From: from}
	}
	return layout{Size: size, From: from - from%block, Block: block}
}

// ranges puts a snapshot's extents into the layout: ascending, without overlap, none beyond the volume, none of no length,
// neighbours joined where the style allows it. Extents of zeros are told if zeros is set.
func (l layout) ranges(extents cbt.Seq, zeros bool) iter.Seq2[cbt.Extent, error] {
	return func(yield func(cbt.Extent, error) bool) {
		var open cbt.Extent // not told yet, of whole blocks
		tell := func() bool {
			for l.Block > 0 && open.Length > 0 {
				if !yield(cbt.Extent{Offset: open.Offset, Length: l.Block}, nil) {
					return false
				}
				open.Offset, open.Length = open.Offset+l.Block, open.Length-l.Block
			}
			return open.Length == 0 || yield(open, nil)
		}
		for e, err := range extents {
			if err != nil {
				yield(cbt.Extent{}, err)
				return
			}
			begin, end := max(e.Offset, l.From), min(e.End(), l.Size)
			if begin >= end || e.Zero && !zeros {
				continue
			}
			if l.Block > 0 {
				begin, end = begin-begin%l.Block, (end+l.Block-1)/l.Block*l.Block
			}
			if open.Length > 0 && begin <= open.End() {
				open.Length = max(open.End(), end) - open.Offset
				continue
			}
			if !tell() {
				return
			}
			open = cbt.Extent{Offset: begin, Length: end - begin}
		}
		tell()
	}
}
