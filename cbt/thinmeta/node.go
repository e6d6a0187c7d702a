package thinmeta

import (
	"encoding/binary"
	"math"
)

const (
	headerSize = 32 // struct node_header of dm-btree-internal.h
	keySize    = 8

	// maxHeight bounds how deep trees may be. Nodes are at least a third full: 2^40 blocks need seven levels.
	maxHeight = 16

	internalNode = 1
	leafNode     = 2

	// Sizes of the values in leaves, bytes.
	mappingSize = 8  // a block and a time
	rootSize    = 8  // of a device's tree, in the tree of devices
	detailsSize = 24 // struct disk_device_details
)

// child is a reference to a node, with what is known of the node before it is read.
type child struct {
	block    uint64
	lo, last uint64 // the keys it may hold, both inclusive
	level    int    // 0 is a leaf
}

// node is a block of a btree whose header and keys were checked.
type node struct {
	page     []byte
	child    // what led here
	n        int
	values   int // where the values begin in page
	position int // of a cursor
}

func (d *node) key(i int) uint64 { return binary.LittleEndian.Uint64(d.page[headerSize+keySize*i:]) }

// word is the 64-bit value of entry i.
func (d *node) word(i int) uint64 { return binary.LittleEndian.Uint64(d.page[d.values+8*i:]) }

// details is the value of entry i in a leaf of the device details.
func (d *node) details(i int) []byte { return d.page[d.values+detailsSize*i:][:detailsSize] }

// sub is the reference of entry i.
func (d *node) sub(i int) child {
	c := child{block: d.word(i), lo: d.key(i), last: d.last, level: d.level - 1}
	if i+1 < d.n {
		c.last = d.key(i+1) - 1
	}
	return c
}

// search returns how many keys are below a key.
func (d *node) search(key uint64) int {
	if d.n == 0 || d.key(0) >= key {
		return 0
	}
	low, high := 0, d.n // key(low) < key
	for high-low > 1 {
		if mid := (low + high) / 2; d.key(mid) < key {
			low = mid
		} else {
			high = mid
		}
	}
	return high
}

// parse checks a page, as the kernel does (node_check) and further: that its keys ascend and lie where its parent says,
// and that it has entries unless it is a root. The node's memory is the page. Its level is what it is by its flags if
// the reference does not know (unknownLevel).
func (d *node) parse(page []byte, c child, valueSize int) error {
	le := binary.LittleEndian
	if got, want := checksum(page, nodeSalt), le.Uint32(page); got != want {
		return corrupt(c.block, "the checksum is %#x, but the content gives %#x", want, got)
	}
	if at := le.Uint64(page[8:]); at != c.block {
		return corrupt(c.block, "it says that it is block %d", at)
	}
	flags, n, capacity, size := le.Uint32(page[4:]), le.Uint32(page[16:]), le.Uint32(page[20:]), le.Uint32(page[24:])
	switch {
	case flags == leafNode && c.level <= 0:
		c.level = 0
	case flags == internalNode && c.level != 0:
		valueSize = 8
	case flags == leafNode || flags == internalNode:
		return corrupt(c.block, "the btree's leaves are not all at one depth")
	default:
		return corrupt(c.block, "it is not a btree node: its flags are %#x", flags)
	}
	if size != uint32(valueSize) {
		return corrupt(c.block, "its values have %d bytes, not %d", size, valueSize)
	}
	if capacity > uint32((blockSize-headerSize)/(keySize+valueSize)) || n > capacity {
		return corrupt(c.block, "it claims %d entries of %d", n, capacity)
	}
	*d = node{page: page, child: c, n: int(n), values: headerSize + keySize*int(capacity)}
	if n == 0 {
		if flags == leafNode && c.lo == 0 && c.last == math.MaxUint64 {
			return nil // the root of an empty tree
		}
		return corrupt(c.block, "the node is empty")
	}
	keys := page[headerSize : headerSize+keySize*int(n)]
	previous := le.Uint64(keys)
	if previous < c.lo {
		return corrupt(c.block, "its first key %d is below %d, where its parent says that it starts", previous, c.lo)
	}
	for keys = keys[keySize:]; len(keys) >= keySize; keys = keys[keySize:] {
		key := le.Uint64(keys)
		if key <= previous {
			return corrupt(c.block, "the key %d follows the key %d", key, previous)
		}
		previous = key
	}
	if previous > c.last {
		return corrupt(c.block, "its last key %d is above %d, where its parent says that it ends", previous, c.last)
	}
	return nil
}

// unknownLevel is the level of a root before it was read.
const unknownLevel = -1

// root refers to a root.
func root(block uint64) child { return child{block: block, last: math.MaxUint64, level: unknownLevel} }
