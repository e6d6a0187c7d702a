package repository

import (
	"encoding/binary"
	"iter"
	"math/bits"
)

// setID names a set of members; 0 is the empty one. Equal sets have equal ids.
type setID int32

// memberSets interns sets of small numbers.
type memberSets struct {
	bits    []string // of each set, little-endian words, without zero words at the end
	ids     map[string]setID
	singles map[int]setID
	unions  map[[2]setID]setID
}

func newMemberSets() *memberSets {
	return &memberSets{bits: []string{""}, ids: map[string]setID{"": 0}, singles: map[int]setID{}, unions: map[[2]setID]setID{}}
}

func (m *memberSets) intern(set string) setID {
	id, ok := m.ids[set]
	if !ok {
		id = setID(len(m.bits))
		m.bits = append(m.bits, set)
		m.ids[set] = id
	}
	return id
}

// single is the set of one member.
func (m *memberSets) single(member int) setID {
	id, ok := m.singles[member]
	if !ok {
		b := make([]byte, member/64*8+8)
		binary.LittleEndian.PutUint64(b[member/64*8:], 1<<(member%64))
		id = m.intern(string(b))
		m.singles[member] = id
	}
	return id
}

func (m *memberSets) union(a, b setID) setID {
	if a == b || b == 0 {
		return a
	}
	if a == 0 {
		return b
	}
	key := [2]setID{min(a, b), max(a, b)}
	id, ok := m.unions[key]
	if !ok {
		long, short := m.bits[a], m.bits[b]
		if len(long) < len(short) {
			long, short = short, long
		}
		both := []byte(long)
		for i := range len(short) {
			both[i] |= short[i]
		}
		id = m.intern(string(both))
		m.unions[key] = id
	}
	return id
}

// members gives the members of a set, ascending.
func (m *memberSets) members(id setID) iter.Seq[int] {
	return func(yield func(int) bool) {
		set := m.bits[id]
		for at := 0; at < len(set); at += 8 {
			for w := binary.LittleEndian.Uint64([]byte(set[at : at+8])); w != 0; w &= w - 1 {
				if !yield(at*8 + bits.TrailingZeros64(w)) {
					return
				}
			}
		}
	}
}

// first is the smallest member of a set that is not empty.
func (m *memberSets) first(id setID) int {
	for member := range m.members(id) {
		return member
	}
	return 0
}
