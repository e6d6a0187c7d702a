package cbt_test

import (
	"errors"
	"math/rand/v2"
	"slices"
	"testing"

	"stillpoint.io/stillpoint/cbt"
	"stillpoint.io/stillpoint/fault"
)

// image is the naive model of a stream: what it says of every byte of a small volume.
type image []byte

const (
	nothing = '.'
	zero    = '0'
	data    = 'x'
)

func blank(size int) image { return slices.Repeat(image{nothing}, size) }

// random makes a stream within [0, size) with extents of all lengths, gaps, and neighbours that touch.
func random(r *rand.Rand, size int64) []cbt.Extent {
	var s []cbt.Extent
	longest := 1 + r.Int64N(24)
	for at := r.Int64N(longest); at < size; at += r.Int64N(longest) * r.Int64N(2) {
		e := cbt.Extent{Offset: at, Length: min(1+r.Int64N(longest), size-at), Zero: r.IntN(2) == 0}
		s = append(s, e)
		at = e.End()
	}
	return s
}

func paint(size int64, s []cbt.Extent) image {
	m := blank(int(size))
	for _, e := range s {
		c := byte(data)
		if e.Zero {
			c = zero
		}
		for i := e.Offset; i < e.End(); i++ {
			m[i] = c
		}
	}
	return m
}

// extents is the canonical stream of an image.
func (m image) extents() []cbt.Extent {
	var s []cbt.Extent
	for i, c := range m {
		if c == nothing {
			continue
		}
		if i > 0 && m[i-1] == c {
			s[len(s)-1].Length++
			continue
		}
		s = append(s, cbt.Extent{Offset: int64(i), Length: 1, Zero: c == zero})
	}
	return s
}

// zip makes an image byte by byte from two.
func zip(a, b image, f func(a, b byte) byte) image {
	m := blank(len(a))
	for i := range m {
		m[i] = f(a[i], b[i])
	}
	return m
}

func alignModel(m image, chunk int) image {
	out := blank(len(m))
	for i := 0; i < len(m); i += chunk {
		part := m[i:min(i+chunk, len(m))]
		c := byte(data)
		switch {
		case !slices.ContainsFunc(part, func(c byte) bool { return c != nothing }):
			c = nothing
		case !slices.ContainsFunc(part, func(c byte) bool { return c != zero }):
			c = zero
		}
		for j := range part {
			out[i+j] = c
		}
	}
	return out
}

// operation is one of the algebra beside its model. canonical says that its result has no joinable neighbours.
type operation struct {
	name      string
	canonical bool
	run       func(a, b cbt.Seq, p params) cbt.Seq
	model     func(a, b image, p params) image
}

type params struct {
	size, from, to, chunk int64
}

var operations = []operation{
	{"Check", false,
		func(a, _ cbt.Seq, p params) cbt.Seq { return cbt.Check(a, 0, p.size) },
		func(a, _ image, _ params) image { return a }},
	{"Coalesce", true,
		func(a, _ cbt.Seq, _ params) cbt.Seq { return cbt.Coalesce(a) },
		func(a, _ image, _ params) image { return a }},
	{"Clip", false,
		func(a, _ cbt.Seq, p params) cbt.Seq { return cbt.Clip(a, p.from, p.to) },
		func(a, _ image, p params) image {
			m := blank(len(a))
			if p.from < p.to {
				copy(m[p.from:p.to], a[p.from:p.to])
			}
			return m
		}},
	{"Align", true,
		func(a, _ cbt.Seq, p params) cbt.Seq { return cbt.Align(a, p.chunk, p.size) },
		func(a, _ image, p params) image { return alignModel(a, int(p.chunk)) }},
	{"AlignShorter", true,
		func(a, _ cbt.Seq, p params) cbt.Seq { return cbt.Align(a, p.chunk, p.to) },
		func(a, _ image, p params) image {
			return append(alignModel(a[:p.to], int(p.chunk)), blank(int(p.size-p.to))...)
		}},
	{"Fill", false,
		func(a, _ cbt.Seq, p params) cbt.Seq { return cbt.Fill(a, 0, p.size) },
		func(a, _ image, _ params) image {
			return zip(a, a, func(c, _ byte) byte {
				if c == nothing {
					return zero
				}
				return c
			})
		}},
	{"FillFrom", false,
		func(a, _ cbt.Seq, p params) cbt.Seq {
			return cbt.Fill(cbt.Clip(a, p.from, p.size), p.from, p.size)
		},
		func(a, _ image, p params) image {
			m := blank(len(a))
			for i := p.from; i < p.size; i++ {
				if m[i] = a[i]; a[i] == nothing {
					m[i] = zero
				}
			}
			return m
		}},
	{"Merge", true,
		func(a, b cbt.Seq, _ params) cbt.Seq { return cbt.Merge(a, b) },
		func(a, b image, _ params) image {
			return zip(a, b, func(a, b byte) byte { return max(a, b) }) // data > zero > nothing
		}},
	{"Subtract", false,
		func(a, b cbt.Seq, _ params) cbt.Seq { return cbt.Subtract(a, b) },
		func(a, b image, _ params) image {
			return zip(a, b, func(a, b byte) byte {
				if b != nothing {
					return nothing
				}
				return a
			})
		}},
	{"Intersect", false,
		func(a, b cbt.Seq, _ params) cbt.Seq { return cbt.Intersect(a, b) },
		func(a, b image, _ params) image {
			return zip(a, b, func(a, b byte) byte {
				if b == nothing {
					return nothing
				}
				return a
			})
		}},
}

// verify compares an operation with its model, and its result with the contract of a stream.
func verify(t *testing.T, op operation, a, b []cbt.Extent, p params) {
	t.Helper()
	got, err := collect(cbt.Check(op.run(cbt.Of(a...), cbt.Of(b...), p), 0, p.size))
	if err != nil {
		t.Fatalf("%s(%v, %v, %+v) breaks the contract: %v", op.name, a, b, p, err)
	}
	want := op.model(paint(p.size, a), paint(p.size, b), p)
	if m := paint(p.size, got); !slices.Equal(m, want) {
		t.Fatalf("%s %+v\na    %s\nb    %s\ngot  %s\nwant %s", op.name, p, paint(p.size, a), paint(p.size, b), m, want)
	}
	if op.canonical && !slices.Equal(got, want.extents()) {
		t.Fatalf("%s(%v, %v, %+v) = %v: neighbours of one kind are not joined", op.name, a, b, p, got)
	}
}

func collect(s cbt.Seq) ([]cbt.Extent, error) {
	var all []cbt.Extent
	for e, err := range s {
		if err != nil {
			return all, err
		}
		all = append(all, e)
	}
	return all, nil
}

func TestOperationsMatchTheModel(t *testing.T) {
	for _, op := range operations {
		t.Run(op.name, func(t *testing.T) {
			r := rand.New(rand.NewPCG(1, 2))
			for range 5000 {
				p := params{size: 1 + r.Int64N(400), chunk: 1 + r.Int64N(40)}
				p.from, p.to = r.Int64N(p.size+1), r.Int64N(p.size+1)
				verify(t, op, random(r, p.size), random(r, p.size), p)
			}
		})
	}
}

func FuzzOperations(f *testing.F) {
	f.Add([]byte{1, 2, 3, 4, 5, 6}, []byte{9, 200, 7, 0, 130}, uint8(200), uint8(3), uint8(150), uint8(16))
	f.Add([]byte{}, []byte{255, 255}, uint8(0), uint8(0), uint8(0), uint8(0))
	f.Fuzz(func(t *testing.T, x, y []byte, size, from, to, chunk uint8) {
		p := params{size: 1 + int64(size), chunk: 1 + int64(chunk)}
		p.from, p.to = min(int64(from), p.size), min(int64(to), p.size)
		for _, op := range operations {
			verify(t, op, decode(x, p.size), decode(y, p.size), p)
		}
	})
}

// decode reads a stream from bytes: a gap, and then a length whose highest bit says zero.
func decode(x []byte, size int64) []cbt.Extent {
	var s []cbt.Extent
	var at int64
	for ; len(x) >= 2; x = x[2:] {
		at += int64(x[0])
		length := min(1+int64(x[1]&0x7f), size-at)
		if length <= 0 {
			break
		}
		s = append(s, cbt.Extent{Offset: at, Length: length, Zero: x[1]&0x80 != 0})
		at += length
	}
	return s
}

// Whatever comes in, nothing hangs, panics, or gets past Check.
func FuzzMalformed(f *testing.F) {
	f.Add(int64(-5), int64(7), int64(1<<62), int64(1<<62), int64(3), int64(-1), int64(1<<63-1), int64(100))
	f.Fuzz(func(t *testing.T, o1, l1, o2, l2, o3, l3, size, chunk int64) {
		s := cbt.Of(cbt.Extent{Offset: o1, Length: l1}, cbt.Extent{Offset: o2, Length: l2, Zero: true}, cbt.Extent{Offset: o3, Length: l3})
		p := params{size: max(size, 0), to: max(size, 0), chunk: max(chunk, 1)}
		for _, op := range operations {
			end, n := int64(0), 0
			for e, err := range cbt.Check(op.run(s, s, p), 0, p.size) {
				if err != nil {
					if !errors.Is(err, fault.Corrupt) {
						t.Fatal(err)
					}
					break
				}
				if n++; n > 100 {
					t.Fatalf("%s does not end", op.name)
				}
				if e.Offset < end || e.Length <= 0 || e.End() <= end || e.End() > p.size {
					t.Fatalf("%s: Check let %+v pass behind %d", op.name, e, end)
				}
				end = e.End()
			}
		}
	})
}
