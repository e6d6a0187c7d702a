package ceph

import (
	"encoding/binary"
	"fmt"
	"math/bits"

	"stillpoint.io/stillpoint/cbt"
)

// An object map has two bits for each object of an image at one snapshot. Source: src/include/rbd/object_map_types.h and
// src/common/bit_vector.hpp of Ceph.
type objectMap struct {
	objects int64
	states  []byte // four objects a byte, the first in the highest bits
}

type objectState uint8

const (
	objectAbsent  objectState = 0
	objectExists  objectState = 1 // and was written since the snapshot before
	objectPending objectState = 2 // a deletion was begun
	objectClean   objectState = 3 // exists as it was at the snapshot before
)

// decodeObjectMap reads the answer of the OSD's method object_map_load: the length of a header, the header (version,
// compatible version, length, number of objects), and the states. Checksums follow, which the OSD has verified.
func decodeObjectMap(b []byte) (objectMap, error) {
	le := binary.LittleEndian
	if len(b) < 4 || int64(len(b)) < 4+int64(le.Uint32(b)) || le.Uint32(b) < 14 {
		return objectMap{}, fmt.Errorf("an object map of %d bytes is cut off", len(b))
	}
	header, rest := b[4:4+le.Uint32(b)], b[4+le.Uint32(b):]
	if compatible := header[1]; compatible != 1 {
		return objectMap{}, fmt.Errorf("an object map has the unknown version %d", compatible)
	}
	n := le.Uint64(header[6:])
	if n > uint64(len(rest))*4 {
		return objectMap{}, fmt.Errorf("an object map of %d objects has only %d bytes", n, len(rest))
	}
	return objectMap{objects: int64(n), states: rest[:(n+3)/4]}, nil
}

// at is the state of an object; those beyond the map's end are absent.
func (m objectMap) at(object int64) objectState {
	if object >= m.objects {
		return objectAbsent
	}
	return objectState(m.states[object/4]>>(6-2*(object%4))) & 3
}

// objectSet is a set of objects.
type objectSet []uint64

func newObjectSet(objects int64) objectSet { return make(objectSet, (objects+63)/64) }

func (s objectSet) add(object int64) { s[object/64] |= 1 << (object % 64) }

func (s objectSet) has(object int64) bool {
	return object/64 < int64(len(s)) && s[object/64]&(1<<(object%64)) != 0
}

// next is the first object of the set from one on, or -1.
func (s objectSet) next(from int64) int64 {
	for w := from / 64; w < int64(len(s)); w++ {
		word := s[w]
		if w == from/64 {
			word &= ^uint64(0) << (from % 64)
		}
		if word != 0 {
			return w*64 + int64(bits.TrailingZeros64(word))
		}
	}
	return -1
}

// existing is the set of the objects that a snapshot has.
func (m objectMap) existing() objectSet {
	s := newObjectSet(m.objects)
	for i := range m.objects {
		if m.at(i) != objectAbsent {
			s.add(i)
		}
	}
	return s
}

// changes finds the objects that may differ between a base and a later snapshot, from the maps of the base, of every
// snapshot between, and of the later one, which come in that order.
type changes struct {
	first, last objectMap
	set         objectSet // grows with the maps
	begun       bool
}

// step takes the next map. An object changed if it was written since the snapshot before, or is there now and was not
// then, or the other way round.
func (c *changes) step(m objectMap) {
	if !c.begun {
		c.first, c.last, c.begun = m, m, true
		return
	}
	most := max(c.last.objects, m.objects)
	if n := (most + 63) / 64; n > int64(len(c.set)) {
		c.set = append(c.set, make(objectSet, n-int64(len(c.set)))...)
	}
	for i := range most {
		was, is := c.last.at(i), m.at(i)
		if is == objectExists || is == objectPending || (was == objectAbsent) != (is == objectAbsent) {
			c.set.add(i)
		}
	}
	c.last = m
}

// changed is the set of the objects to ask about.
//
// A shrink that cuts an object does not mark it (measured on Ceph 16.2.15), and when the image grew again before the
// next snapshot no size shows that. But a shrink removes every object behind the cut one, and what is made there anew
// is marked: so behind the cut object there is none that the base has and that is not in the set. The object that was
// cut and not marked is therefore the last one of the base that is not in the set, and it is asked about too. Several
// shrinks point to the same one.
func (c *changes) changed() objectSet {
	for i := c.first.objects - 1; i >= 0; i-- {
		if c.first.at(i) != objectAbsent && !c.set.has(i) {
			if c.last.at(i) != objectAbsent {
				c.grow(i)
				c.set.add(i)
			}
			break
		}
	}
	return c.set
}

func (c *changes) grow(object int64) {
	for int64(len(c.set)) <= object/64 {
		c.set = append(c.set, 0)
	}
}

// span is a run of objects [first, end).
type span struct{ first, end int64 }

const (
	// spanGap is how many objects that did not change a span may cross: asking about them costs less than a call.
	spanGap = 4
	// spanMax is the most objects of a span. It bounds the extents in memory.
	spanMax = 64
)

// nextSpan is the first span of the set at or behind an object: what is asked about in one call. ok is false at the end.
func (s objectSet) nextSpan(from int64) (r span, ok bool) {
	first := s.next(from)
	if first < 0 {
		return r, false
	}
	r = span{first, first + 1}
	for {
		next := s.next(r.end)
		if next < 0 || next-r.end > spanGap || next+1-r.first > spanMax {
			return r, true
		}
		r.end = next + 1
	}
}

// shrank reports whether a list of sizes, in the order of time, ever goes down.
func shrank(sizes []int64) bool {
	for i := 1; i < len(sizes); i++ {
		if sizes[i] < sizes[i-1] {
			return true
		}
	}
	return false
}

// extents lists the objects of a set as runs of bytes of an image of that size.
func (s objectSet) extents(object, size int64) cbt.Seq {
	return func(yield func(cbt.Extent, error) bool) {
		for i := s.next(0); i >= 0 && i*object < size; i = s.next(i + 1) {
			if !yield(cbt.Extent{Offset: i * object, Length: min(object, size-i*object)}, nil) {
				return
			}
		}
	}
}
