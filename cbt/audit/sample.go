package audit

import (
	"iter"
	"math/rand/v2"
	"time"
)

const (
	// Share is how much of the listed bytes a sample reads besides: one in so many.
	Share = 20
	// Floor is what a sample reads at least, in bytes.
	Floor = 64 << 20
)

// Superblocks are the offsets, in bytes, where ext4 (and its first copies, for blocks of 1 and 4 KiB), xfs, and btrfs
// (fs/btrfs/volumes.h: BTRFS_SUPER_MIRROR) keep them. Every mounted filesystem writes there all the time, so a list that
// forgets everything is caught there first.
var Superblocks = []int64{0, 64 << 10, 8 << 20, 64 << 20, 128 << 20, 256 << 30}

// Field is a volume in chunks, from which a sample is drawn. Sizes are bytes.
type Field struct {
	Size, Chunk int64
	Listed      int64 // what the delta lists
	// Known says that the chunk is read already. The sample asks before it gives a chunk, and relies on what it gave
	// being known from then on.
	Known func(chunk int64) bool
	// Data lists the stretches that hold data, by number; a stretch is of Stretch bytes, a multiple of Chunk.
	Data    []int
	Stretch int64
	// Coverage is when what was compared, and Instant that of the snapshot to be read. Without a Coverage the rotation's
	// part is drawn at random.
	Coverage *Coverage
	Instant  time.Time
}

// chunks is how many the volume has.
func (f Field) chunks() int64 { return (f.Size + f.Chunk - 1) / f.Chunk }

// Wanted is how many chunks a sample has, beside those of the superblocks and the last one: max(Floor, Listed/Share) in
// bytes.
func (f Field) Wanted() int64 { return max(Floor, f.Listed/Share) / f.Chunk }

// Sample draws chunks that are not known, each once: those of the superblocks and the last one always, then half of
// Wanted where there is data, a quarter anywhere, and a quarter where nobody looked for longest. If the volume has no
// more than Wanted, all are given. What is drawn at random and turns out to be known is drawn again, but not for ever: of
// a volume that is almost all known, the sample is smaller.
func (f Field) Sample(rng *rand.Rand) iter.Seq[int64] {
	return func(yield func(int64) bool) {
		chunks, wanted := f.chunks(), f.Wanted()
		given := int64(0)
		// give gives a chunk unless it is known. It returns false when the caller wants no more.
		give := func(c int64) bool {
			if c < 0 || c >= chunks || f.Known(c) {
				return true
			}
			given++
			return yield(c)
		}
		for _, off := range Superblocks {
			if !give(off / f.Chunk) {
				return
			}
		}
		if !give(chunks - 1) {
			return
		}
		if wanted >= chunks {
			for c := range chunks {
				if !give(c) {
					return
				}
			}
			return
		}
		// draw gives n chunks of those that pick picks.
		draw := func(n int64, pick func() int64) bool {
			stop := given + n
			for i := int64(0); i < 4*n && given < stop; i++ {
				if !give(pick()) {
					return false
				}
			}
			return true
		}
		anywhere := func() int64 { return rng.Int64N(chunks) }
		inData := anywhere
		if len(f.Data) > 0 {
			inData = func() int64 {
				return (int64(f.Data[rng.IntN(len(f.Data))])*f.Stretch + rng.Int64N(f.Stretch)) / f.Chunk
			}
		}
		quarter := max(1, wanted/4)
		if !draw(max(1, wanted-2*quarter), inData) || !draw(quarter, anywhere) {
			return
		}
		if f.Coverage == nil {
			draw(quarter, anywhere)
			return
		}
		stop := given + quarter
		for e := range f.Coverage.Stale(f.Instant) {
			for c := e.Offset / f.Chunk; c*f.Chunk < e.End(); c++ {
				if given >= stop {
					return
				}
				if !give(c) {
					return
				}
			}
		}
	}
}
