package fiemap_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/cbt"
	"stillpoint.io/stillpoint/cbt/fiemap"
)

// history is a live file under random changes. touched says for every block when it was last changed.
type history struct {
	*os.File
	r       *rand.Rand
	size    int64
	step    int
	touched []int
}

const most = 2 << 20 // bytes of a live file

func (h *history) touch(from, to int64) {
	for i := from / block; i < (to+block-1)/block; i++ {
		h.touched[i] = h.step
	}
}

// run picks a range of the file; most are small, some of whole blocks.
func (h *history) run() (from, length int64) {
	from, length = h.r.Int64N(most), 1+h.r.Int64N(1<<(1+h.r.IntN(18)))
	if h.r.IntN(2) == 0 {
		from, length = from/block*block, (length+block-1)/block*block
	}
	return from, min(length, most-from)
}

// change does one random thing to the file. (On btrfs every preallocation also writes the block that the file ends in.)
func (h *history) change(t *testing.T) {
	h.step++
	from, n := h.run()
	fd := int(h.Fd())
	grown := func(to int64) {
		if to > h.size {
			h.touch(h.size, to) // the tail of the old last block, and whatever is new
			h.size = to
		}
	}
	switch op := h.r.IntN(12); {
	case op < 5:
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(h.r.Uint32())
		}
		if h.r.IntN(2) == 0 {
			b = bytes.Repeat([]byte{1 + byte(h.r.IntN(255))}, int(n)) // compresses well
		}
		_, err := h.WriteAt(b, from)
		must(t, err)
		h.touch(from, from+n)
		grown(from + n)
	case op < 7:
		must(t, unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, from, n))
		h.touch(from, from+n)
	case op == 7:
		must(t, unix.Fallocate(fd, 0, from, n)) // unwritten where nothing was
		h.touch(from, from+n)
		h.touch(h.size, h.size+1)
		grown(from + n)
	case op == 8:
		must(t, unix.Fallocate(fd, unix.FALLOC_FL_KEEP_SIZE, from, n)) // perhaps behind the end
		h.touch(from, from+n)
		h.touch(h.size, h.size+1)
	case op == 9:
		must(t, unix.Fallocate(fd, unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, from, n))
		h.touch(from, from+n)
		h.touch(h.size, h.size+1)
	case op == 10:
		must(t, h.Truncate(from))
		h.touch(from, max(from, h.size))
		grown(from)
		h.size = from
	default: // a clone within the file: one block at two offsets
		from, n = from/block*block, (n+block-1)/block*block
		to := h.r.Int64N(most/block) * block
		if from+n > h.size || to+n > most || from < to+n && to < from+n {
			return
		}
		must(t, unix.IoctlFileCloneRange(fd, &unix.FileCloneRange{
			Src_fd: int64(fd), Src_offset: uint64(from), Src_length: uint64(n), Dest_offset: uint64(to),
		}))
		h.touch(to, to+n)
		grown(to + n)
	}
}

type point struct {
	*os.File
	step int
	data []byte
}

// For every pair of snapshots of a random history, in both directions and from any offset: base and changed extents
// are target, nothing is reported that was not touched, and what is allocated is all there is.
func TestRandomHistories(t *testing.T) {
	eachPool(t, func(t *testing.T, dir string, exact bool) {
		for seed := range uint64(8) {
			r := rand.New(rand.NewPCG(seed, 7))
			h := &history{File: create(t, filepath.Join(dir, fmt.Sprint("live", seed))), r: r, touched: make([]int, most/block+1)}
			var points []point
			var touched [][]int
			for i := range 7 {
				for range r.IntN(12) {
					h.change(t)
				}
				c := clone(t, h.File, filepath.Join(dir, fmt.Sprintf("snap%d-%d", seed, i)))
				points = append(points, point{c, h.step, content(t, c)})
				touched = append(touched, slices.Clone(h.touched))
			}
			for i, base := range points {
				checkAllocated(t, r, base)
				for j, target := range points {
					s := checkChanged(t, r, base, target)
					newer := max(i, j)
					for _, e := range s {
						for at := e.Offset; exact && at < e.End(); at += block {
							if touched[newer][at/block] <= min(base.step, target.step) {
								t.Fatalf("seed %d, snapshots %d and %d: block at %d is reported and was not touched", seed, i, j, at)
							}
						}
					}
				}
			}
		}
	})
}

func checkChanged(t *testing.T, r *rand.Rand, base, target point) []cbt.Extent {
	t.Helper()
	d, err := fiemap.Changed(t.Context(), base.File, target.File, 0)
	must(t, err)
	if d.BaseSize != int64(len(base.data)) || d.TargetSize != int64(len(target.data)) || d.Confidence != cbt.Exact || d.Granularity != block {
		t.Fatalf("delta %+v of files of %d and %d bytes", d, len(base.data), len(target.data))
	}
	all := list(t, d, 0)
	if !bytes.Equal(apply(t, base.data, target.data, all), target.data) {
		t.Fatalf("%s + changed extents is not %s", base.Name(), target.Name())
	}
	from := r.Int64N(d.TargetSize + 1)
	d, err = fiemap.Changed(t.Context(), base.File, target.File, from)
	must(t, err)
	want, err := collect(cbt.Clip(cbt.Of(all...), from, d.TargetSize))
	must(t, err)
	if got := list(t, d, from); !slices.Equal(got, want) {
		t.Fatalf("from %d: %v, want %v", from, got, want)
	}
	return all
}

func checkAllocated(t *testing.T, r *rand.Rand, p point) {
	t.Helper()
	from := r.Int64N(int64(len(p.data)) + 1)
	d, err := fiemap.Allocated(t.Context(), p.File, from)
	must(t, err)
	if d.BaseSize != 0 || d.TargetSize != int64(len(p.data)) {
		t.Fatalf("delta %+v of a file of %d bytes", d, len(p.data))
	}
	all := list(t, d, from)
	got := apply(t, nil, p.data, all)
	if !bytes.Equal(got[from:], p.data[from:]) {
		t.Fatalf("%s from %d: there is data outside the allocated extents", p.Name(), from)
	}
	var written []cbt.Extent
	for r, err := range fiemap.Extents(t.Context(), p.File, from) {
		must(t, err)
		if r.End() <= from || r.Logical >= d.TargetSize {
			t.Fatalf("%s from %d: record %+v is outside", p.Name(), from, r)
		}
		if !r.Flags.Zero() {
			written = append(written, cbt.Extent{Offset: r.Logical, Length: r.Length})
		}
	}
	written, err = collect(cbt.Clip(cbt.Align(cbt.Of(written...), block, d.TargetSize), from, d.TargetSize))
	must(t, err)
	if !slices.Equal(written, all) {
		t.Fatalf("%s from %d: allocated %v, records %v", p.Name(), from, all, written)
	}
}
