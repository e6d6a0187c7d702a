package ceph

import (
	"encoding/binary"
	"math/rand/v2"
	"slices"
	"testing"

	"stillpoint.io/stillpoint/cbt"
)

// encodeObjectMap makes a map as an OSD sends it.
func encodeObjectMap(states ...objectState) []byte {
	le := binary.LittleEndian
	b := le.AppendUint32(nil, 14)
	b = append(b, 1, 1)
	b = le.AppendUint32(b, 8)
	b = le.AppendUint64(b, uint64(len(states)))
	data := make([]byte, (len(states)+3)/4)
	for i, s := range states {
		data[i/4] |= byte(s) << (6 - 2*(i%4))
	}
	return append(append(b, data...), 1, 2, 3, 4) // and checksums
}

func mapOf(t *testing.T, states ...objectState) objectMap {
	m, err := decodeObjectMap(encodeObjectMap(states...))
	if err != nil || m.objects != int64(len(states)) {
		t.Fatalf("%v: %+v, %v", states, m, err)
	}
	return m
}

func TestObjectMap(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for n := range 70 {
		states := make([]objectState, n)
		var there []int64
		for i := range states {
			if states[i] = objectState(r.IntN(4)); states[i] != objectAbsent {
				there = append(there, int64(i))
			}
		}
		m := mapOf(t, states...)
		for i, s := range states {
			if m.at(int64(i)) != s {
				t.Fatalf("%v: object %d is %d", states, i, m.at(int64(i)))
			}
		}
		if m.at(int64(n)) != objectAbsent {
			t.Fatal("there is an object behind the end")
		}
		if got := members(m.existing()); !slices.Equal(got, there) {
			t.Fatalf("%v: %v exist", states, got)
		}
	}
	whole := encodeObjectMap(make([]objectState, 9)...)
	for cut := range len(whole) - 4 {
		if m, err := decodeObjectMap(whole[:cut]); err == nil {
			t.Errorf("a map cut off after %d bytes was read as %+v", cut, m)
		}
	}
	whole[5] = 2
	if _, err := decodeObjectMap(whole); err == nil {
		t.Error("a map of another version was read")
	}
}

func FuzzObjectMap(f *testing.F) {
	f.Add(encodeObjectMap(0, 1, 2, 3, 1))
	f.Fuzz(func(t *testing.T, b []byte) {
		if m, err := decodeObjectMap(b); err == nil && m.objects > 0 {
			m.at(m.objects - 1)
		}
	})
}

func members(s objectSet) (all []int64) {
	for i := s.next(0); i >= 0; i = s.next(i + 1) {
		all = append(all, i)
	}
	return all
}

func TestChanges(t *testing.T) {
	const a, e, p, c = objectAbsent, objectExists, objectPending, objectClean
	for name, x := range map[string]struct {
		maps [][]objectState
		want []int64
	}{
		"nothing":                    {[][]objectState{{a, a}, {a, a}}, nil},
		"written":                    {[][]objectState{{e, e, e}, {e, c, c}}, []int64{0, 2}}, // 2: the last that did not change
		"made":                       {[][]objectState{{a, a}, {e, a}}, []int64{0}},
		"removed":                    {[][]objectState{{e, e}, {a, e}}, []int64{0, 1}},
		"made and removed":           {[][]objectState{{a, c}, {e, c}, {a, c}}, []int64{0, 1}},
		"made clean":                 {[][]objectState{{a, c, c}, {c, c, c}}, []int64{0, 2}},
		"written in between":         {[][]objectState{{c, c, a}, {e, c, a}, {c, c, a}}, []int64{0, 1}},
		"a deletion begun":           {[][]objectState{{c, c}, {p, c}}, []int64{0, 1}},
		"grown":                      {[][]objectState{{c}, {c, a, e}}, []int64{0, 2}},
		"shrunk":                     {[][]objectState{{c, c, c}, {c}}, []int64{0, 1, 2}},
		"shrunk and grown, unseen":   {[][]objectState{{c, c, c, c}, {c, c, a, e}}, []int64{1, 2, 3}},
		"shrunk, grown and refilled": {[][]objectState{{c, c, c, c}, {c, c, e, e}}, []int64{1, 2, 3}},
		"everything written":         {[][]objectState{{c, c}, {e, e}}, []int64{0, 1}},
	} {
		var found changes
		for _, states := range x.maps {
			found.step(mapOf(t, states...))
		}
		if got := members(found.changed()); !slices.Equal(got, x.want) {
			t.Errorf("%s: %v instead of %v", name, got, x.want)
		}
	}
}

func TestSpans(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	for range 200 {
		s := newObjectSet(1000)
		var want []int64
		for i := range int64(1000) {
			if r.IntN(1+r.IntN(30)) == 0 {
				s.add(i)
				want = append(want, i)
			}
		}
		from := r.Int64N(1000)
		want = slices.DeleteFunc(want, func(i int64) bool { return i < from })
		at := from
		var got []int64
		for {
			n, ok := s.nextSpan(at)
			if !ok {
				break
			}
			if n.first < at || n.end <= n.first || n.end-n.first > spanMax || !s.has(n.first) || !s.has(n.end-1) {
				t.Fatalf("span %+v from %d", n, at)
			}
			gap := int64(0)
			for i := n.first; i < n.end; i++ {
				if gap++; s.has(i) {
					got, gap = append(got, i), 0
				}
				if gap > spanGap {
					t.Fatalf("span %+v crosses more than %d objects", n, spanGap)
				}
			}
			at = n.end
		}
		if !slices.Equal(got, want) {
			t.Fatalf("spans from %d have %v instead of %v", from, got, want)
		}
	}
}

func TestSetExtents(t *testing.T) {
	s := newObjectSet(10)
	s.add(1)
	s.add(9)
	var got []cbt.Extent
	for e := range s.extents(100, 950) {
		got = append(got, e)
	}
	if want := []cbt.Extent{{Offset: 100, Length: 100}, {Offset: 900, Length: 50}}; !slices.Equal(got, want) {
		t.Error(got)
	}
}

func TestShrank(t *testing.T) {
	for _, c := range []struct {
		sizes []int64
		want  bool
	}{{nil, false}, {[]int64{5}, false}, {[]int64{1, 1, 2}, false}, {[]int64{1, 3, 2, 4}, true}, {[]int64{2, 1}, true}} {
		if shrank(c.sizes) != c.want {
			t.Error(c)
		}
	}
}
