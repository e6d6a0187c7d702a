package csi

import (
	"errors"
	"math/rand/v2"
	"testing"

	"stillpoint.io/stillpoint/cbt"
)

func seq(extents []cbt.Extent, err error) cbt.Seq {
	return func(yield func(cbt.Extent, error) bool) {
		for _, e := range extents {
			if !yield(e, nil) {
				return
			}
		}
		if err != nil {
			yield(cbt.Extent{}, err)
		}
	}
}

// randomExtents are ascending, without overlap, some of them neighbours, some zero, aligned to 512 bytes.
func randomExtents(r *rand.Rand, size int64) (all []cbt.Extent) {
	for at := int64(0); at < size; {
		at += r.Int64N(3) * r.Int64N(40) * 512
		length := (1 + r.Int64N(60)) * 512
		if at+length > size {
			break
		}
		all = append(all, cbt.Extent{Offset: at, Length: length, Zero: r.IntN(3) == 0})
		at += length
	}
	return all
}

// Whatever the extents, the style and the offset: ranges ascend, do not overlap, are of the style's length, lie within the
// volume, none ends before the offset, and they hold every byte behind it that they must and no block that they need not.
func TestLayoutOfRandomExtents(t *testing.T) {
	for seed := range uint64(300) {
		r := rand.New(rand.NewPCG(seed, 1))
		size := (1 + r.Int64N(64)) * 4096 * (1 + 7*r.Int64N(2))
		extents := randomExtents(r, size)
		from := r.Int64N(size + 1)
		wanted := []int64{0, 4096, 8192, 65536, 1 << 20}[r.IntN(5)]
		zeros := r.IntN(2) == 0
		l := newLayout(size, from, wanted)
		if l.Block > wanted || l.Block > 0 && (size%l.Block != 0 || l.Block < blockMin) {
			t.Fatalf("seed %d: blocks of %d bytes for %d bytes and %d wanted", seed, l.Block, size, wanted)
		}
		must, may := make([]bool, size/512), make([]bool, size/512)
		unit := max(l.Block, 512)
		for _, e := range extents {
			for at := e.Offset; at < e.End() && (zeros || !e.Zero); at += 512 {
				if at+512 <= from/unit*unit {
					continue
				}
				must[at/512] = at+512 > from
				for i := at / unit * unit; i < at/unit*unit+unit; i += 512 {
					may[i/512] = true
				}
			}
		}
		end, seen := int64(0), make([]bool, size/512)
		for e, err := range l.ranges(seq(extents, nil), zeros) {
			switch {
			case err != nil:
				t.Fatal(err)
			case e.Length <= 0 || e.Offset < end || e.End() > size:
				t.Fatalf("seed %d: %+v after %d in %d bytes", seed, e, end, size)
			case l.Block > 0 && (e.Length != l.Block || e.Offset%l.Block != 0):
				t.Fatalf("seed %d: %+v with blocks of %d", seed, e, l.Block)
			case e.End() <= from:
				t.Fatalf("seed %d: %+v ends before %d", seed, e, from)
			case l.Block == 0 && e.Offset == end && end > 0:
				t.Fatalf("seed %d: %+v could have been joined with the range before it", seed, e)
			}
			end = e.End()
			for at := e.Offset / 512 * 512; at < e.End(); at += 512 {
				seen[at/512] = true
			}
		}
		for i := range seen {
			if must[i] && !seen[i] || seen[i] && !may[i] {
				t.Fatalf("seed %d: sector %d is told: %v, must %v, may %v (from %d, blocks of %d)", seed, i, seen[i], must[i], may[i], from, l.Block)
			}
		}
	}
}

// Whoever stops reading stops the extents too, and an error comes after all that was before it.
func TestLayoutStopsAndFails(t *testing.T) {
	extents := []cbt.Extent{{Offset: 0, Length: 8192}, {Offset: 65536, Length: 4096}}
	broken := errors.New("broken")
	for _, block := range []int64{0, 4096} {
		l := newLayout(1<<20, 0, block)
		var got []cbt.Extent
		var last error
		for e, err := range l.ranges(seq(extents, broken), true) {
			if last = err; err == nil {
				got = append(got, e)
			}
		}
		if !errors.Is(last, broken) || len(got) == 0 || got[0].Offset != 0 {
			t.Errorf("blocks of %d: %v, then %v", block, got, last)
		}
		n := 0
		for range l.ranges(seq(extents, nil), true) {
			n++
			break
		}
		if n != 1 {
			t.Errorf("%d ranges", n)
		}
	}
}
