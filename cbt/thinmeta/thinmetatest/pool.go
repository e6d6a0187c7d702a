// Package thinmetatest makes dm-thin metadata for tests: a pool in memory that is written to, snapshotted and discarded
// as the kernel would, and its metadata as an image that thin_check, thin_dump and thin_delta accept. Unlike what
// thin_restore makes, devices share subtrees, and there can be a metadata snapshot.
package thinmetatest

import (
	"fmt"
	"maps"
)

// Nodes of the kernel's mapping trees hold 252 entries; smaller capacities make tall trees of few mappings.
const (
	MaxCapacity = 252
	MinCapacity = 6
)

// Options are the shape of a pool.
type Options struct {
	BlockSize      int64  // bytes, a multiple of 64 KiB
	DataBlocks     uint64 // of the data device
	MetadataBlocks uint64 // of 4 KiB; 0 means as many as are needed and a few more
	Capacity       int    // entries in a node of a mapping tree, a multiple of 3 from MinCapacity to MaxCapacity; 0 means MaxCapacity
}

// Pool is a pool in memory. Its methods panic when they are used wrongly, such as with a device that does not exist.
type Pool struct {
	o         Options
	time      uint32
	trans     uint64
	next      uint64   // the data block to be allocated next
	free      []uint64 // data blocks before next that are free again
	devices   map[uint64]*device
	held      map[uint64]device // what the metadata snapshot shows; nil if there is none
	heldTime  uint32
	heldTrans uint64
}

type device struct {
	root    *node
	mapped  uint64
	trans   uint64
	created uint32
	snapped uint32
}

// New returns an empty pool.
func New(o Options) *Pool {
	if o.Capacity == 0 {
		o.Capacity = MaxCapacity
	}
	return &Pool{o: o, devices: map[uint64]*device{}}
}

func (p *Pool) device(id uint64) *device {
	d := p.devices[id]
	if d == nil {
		panic(fmt.Sprintf("the pool has no device %d", id))
	}
	return d
}

// Create makes an empty device.
func (p *Pool) Create(id uint64) {
	p.trans++
	p.devices[id] = &device{root: new(node), trans: p.trans, created: p.time, snapped: p.time}
}

// Snapshot makes a device with the content of another.
func (p *Pool) Snapshot(id, origin uint64) {
	o := p.device(origin)
	p.trans++
	p.time++
	o.snapped = p.time
	p.devices[id] = &device{root: o.root, mapped: o.mapped, trans: p.trans, created: p.time, snapped: p.time}
}

// Delete removes a device.
func (p *Pool) Delete(id uint64) {
	p.device(id)
	delete(p.devices, id)
	p.trans++
}

// Write writes to a block. Where it was mapped before the last snapshot, it is mapped anew.
func (p *Pool) Write(id, block uint64) {
	d := p.device(id)
	word, mapped := d.root.get(block)
	if mapped && uint32(word&(1<<24-1)) >= d.snapped {
		return
	}
	if !mapped {
		d.mapped++
	}
	d.root = grow(d.root.set(block, p.allocate()<<24|uint64(p.time), p.o.Capacity))
}

// Discard unmaps a block, if it is mapped.
func (p *Pool) Discard(id, block uint64) {
	d := p.device(id)
	if _, ok := d.root.get(block); ok {
		d.root = d.root.remove(block, p.o.Capacity).shrink()
		d.mapped--
	}
}

// Fill writes to count blocks from one on, of a device that has none, as fast as can be. The nodes get fill entries:
// between two thirds and all of the capacity.
func (p *Pool) Fill(id, from, count uint64, fill int) {
	d := p.device(id)
	keys, words := make([]uint64, count), make([]uint64, count)
	for i := range keys {
		keys[i], words[i] = from+uint64(i), p.allocate()<<24|uint64(p.time)
	}
	d.root, d.mapped = build(keys, words, fill), count
}

// Rebuild gives a device a tree of its own with the same mappings and fill entries in each node, as Fill does: equal to
// others, and nothing shared. (The kernel never does that, thin_restore always.)
func (p *Pool) Rebuild(id uint64, fill int) {
	d := p.device(id)
	var keys, words []uint64
	d.root.each(func(key, word uint64) { keys, words = append(keys, key), append(words, word) })
	d.root = build(keys, words, fill)
}

func (n *node) each(f func(key, word uint64)) {
	for _, kid := range n.kids {
		kid.each(f)
	}
	for i := range n.words {
		f(n.keys[i], n.words[i])
	}
}

// Reserve makes a metadata snapshot of the pool as it is, instead of one that there may be.
func (p *Pool) Reserve() {
	p.held, p.heldTime, p.heldTrans = map[uint64]device{}, p.time, p.trans
	for id, d := range p.devices {
		p.held[id] = *d
	}
}

// Release drops the metadata snapshot.
func (p *Pool) Release() { p.held = nil }

// Reclaim makes data blocks that nothing refers to available again.
func (p *Pool) Reclaim() {
	used := make([]bool, p.next)
	mark := func(_, word uint64) { used[word>>24] = true }
	for _, d := range p.devices {
		d.root.each(mark)
	}
	for _, d := range p.held {
		d.root.each(mark)
	}
	p.free = p.free[:0]
	for block, used := range used {
		if !used {
			p.free = append(p.free, uint64(block))
		}
	}
}

func (p *Pool) allocate() uint64 {
	if n := len(p.free); n > 0 {
		block := p.free[n-1]
		p.free = p.free[:n-1]
		return block
	}
	if p.next == p.o.DataBlocks {
		panic("the pool is full")
	}
	p.next++
	return p.next - 1
}

// Devices returns the numbers of the pool's devices, in no order.
func (p *Pool) Devices() (ids []uint64) {
	for id := range maps.Keys(p.devices) {
		ids = append(ids, id)
	}
	return ids
}

// Mappings returns what a device has mapped: block → data block.
func (p *Pool) Mappings(id uint64) map[uint64]uint64 {
	all := map[uint64]uint64{}
	p.device(id).root.each(func(key, word uint64) { all[key] = word >> 24 })
	return all
}

// Unshared counts the nodes that only one of two devices' trees has.
func (p *Pool) Unshared(a, b uint64) (n int) {
	seen := map[*node]int{}
	p.device(a).root.mark(seen, 1)
	p.device(b).root.mark(seen, 2)
	for _, trees := range seen {
		if trees != 3 {
			n++
		}
	}
	return n
}

// mark notes all nodes of a tree.
func (n *node) mark(seen map[*node]int, tree int) {
	seen[n] |= tree
	for _, kid := range n.kids {
		kid.mark(seen, tree)
	}
}
