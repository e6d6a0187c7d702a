package thinmetatest

import (
	"encoding/binary"
	"hash/crc32"
	"io"
	"maps"
	"slices"
)

const (
	block = 4096

	superblockSalt = 160774
	nodeSalt       = 121107
	indexSalt      = 160478
	bitmapSalt     = 240779

	perBitmap = (block - 16) * 4 // two bits a block
)

var (
	le         = binary.LittleEndian
	castagnoli = crc32.MakeTable(crc32.Castagnoli)
)

func seal(page []byte, salt uint32) {
	le.PutUint32(page, ^crc32.Checksum(page[4:block], castagnoli)^salt)
}

// SealNode makes the checksum of a btree node right again after its content was changed.
func SealNode(page []byte) { seal(page, nodeSalt) }

// SealSuperblock makes the checksum of a superblock right again after its content was changed.
func SealSuperblock(page []byte) { seal(page, superblockSalt) }

// Image returns the pool's metadata as they lie on the metadata device.
func (p *Pool) Image() ([]byte, error) {
	var m memory
	err := p.WriteImage(&m)
	return m, err
}

// memory is a file in memory.
type memory []byte

func (m *memory) WriteAt(p []byte, at int64) (int, error) {
	if end := int(at) + len(p); end > len(*m) {
		*m = append(*m, make([]byte, end-len(*m))...)
	}
	return copy((*m)[at:], p), nil
}

// WriteImage writes the pool's metadata to a file, which must be empty before.
func (p *Pool) WriteImage(w io.WriterAt) error {
	e := &encoder{w: w, capacity: p.o.Capacity, placed: map[*node]uint64{}, counts: []uint32{1}, data: make([]uint32, p.o.DataBlocks)}
	super := e.devices(p.devices, p.time, p.trans, p.o.BlockSize)
	if p.held != nil {
		held := map[uint64]*device{}
		for id, d := range p.held {
			held[id] = &d
		}
		snapshot := e.devices(held, p.heldTime, p.heldTrans, p.o.BlockSize)
		at := e.allocate()
		le.PutUint64(snapshot[8:], at)
		seal(snapshot, superblockSalt)
		e.write(at, snapshot)
		le.PutUint64(super[56:], at)
	}
	e.dataSpace(super[64:])
	e.metadataSpace(super[192:], p.o.MetadataBlocks)
	copy(super[344:352], super[192:200])
	seal(super, superblockSalt)
	e.write(0, super)
	return e.err
}

// encoder gives nodes their blocks and writes them.
type encoder struct {
	w        io.WriterAt
	err      error
	capacity int
	placed   map[*node]uint64
	counts   []uint32 // references to each metadata block
	data     []uint32 // references to each data block
}

func (e *encoder) allocate() uint64 {
	e.counts = append(e.counts, 1)
	return uint64(len(e.counts) - 1)
}

func (e *encoder) write(at uint64, page []byte) {
	if e.err == nil {
		_, e.err = e.w.WriteAt(page, int64(at)*block)
	}
}

// devices writes the trees of devices and returns a superblock without spaces and without a checksum.
func (e *encoder) devices(devices map[uint64]*device, time uint32, trans uint64, blockSize int64) []byte {
	ids := slices.Sorted(maps.Keys(devices))
	var roots, details [][]byte
	for _, id := range ids {
		d := devices[id]
		roots = append(roots, le.AppendUint64(nil, e.tree(d.root)))
		b := le.AppendUint64(le.AppendUint64(nil, d.mapped), d.trans)
		details = append(details, le.AppendUint32(le.AppendUint32(b, d.created), d.snapped))
	}
	super := make([]byte, block)
	le.PutUint64(super[32:], 27022010)
	le.PutUint32(super[40:], 2)
	le.PutUint32(super[44:], time)
	le.PutUint64(super[48:], trans)
	le.PutUint64(super[320:], e.table(ids, roots, 8))
	le.PutUint64(super[328:], e.table(ids, details, 24))
	le.PutUint32(super[336:], uint32(blockSize/512))
	le.PutUint32(super[340:], block/512)
	return super
}

// tree writes what is not written yet of a device's tree and returns its block.
func (e *encoder) tree(n *node) uint64 {
	if at, ok := e.placed[n]; ok {
		e.counts[at]++
		return at
	}
	at := e.allocate()
	e.placed[n] = at
	page := header(at, n.leaf(), len(n.keys), e.capacity, 8)
	for i, key := range n.keys {
		le.PutUint64(page[32+8*i:], key)
		word := uint64(0)
		if n.leaf() {
			word = n.words[i]
			e.data[word>>24]++
		} else {
			word = e.tree(n.kids[i])
		}
		le.PutUint64(page[32+8*e.capacity+8*i:], word)
	}
	seal(page, nodeSalt)
	e.write(at, page)
	return at
}

func header(at uint64, leaf bool, n, capacity, valueSize int) []byte {
	page := make([]byte, block)
	le.PutUint32(page[4:], 1)
	if leaf {
		le.PutUint32(page[4:], 2)
	}
	le.PutUint64(page[8:], at)
	le.PutUint32(page[16:], uint32(n))
	le.PutUint32(page[20:], uint32(capacity))
	le.PutUint32(page[24:], uint32(valueSize))
	return page
}

// table writes a btree of ascending keys that is not shared, and returns its root.
func (e *encoder) table(keys []uint64, values [][]byte, valueSize int) uint64 {
	for leaf := true; ; leaf = false {
		capacity := (block - 32) / (8 + valueSize) / 3 * 3
		runs := chunks(len(keys), capacity)
		if len(runs) == 0 {
			runs = [][2]int{{0, 0}}
		}
		var up []uint64
		var refs [][]byte
		for _, r := range runs {
			at := e.allocate()
			page := header(at, leaf, r[1]-r[0], capacity, valueSize)
			for i := range r[1] - r[0] {
				le.PutUint64(page[32+8*i:], keys[r[0]+i])
				copy(page[32+8*capacity+valueSize*i:], values[r[0]+i])
			}
			seal(page, nodeSalt)
			e.write(at, page)
			if len(keys) > 0 {
				up = append(up, keys[r[0]])
			}
			refs = append(refs, le.AppendUint64(nil, at))
		}
		if len(runs) == 1 {
			return le.Uint64(refs[0])
		}
		keys, values, valueSize = up, refs, 8
	}
}

// many returns the table of the counts above two.
func (e *encoder) many(counts []uint32) uint64 {
	var keys []uint64
	var values [][]byte
	for at, n := range counts {
		if n > 2 {
			keys, values = append(keys, uint64(at)), append(values, le.AppendUint32(nil, n))
		}
	}
	return e.table(keys, values, 4)
}

// bitmap writes the counts of up to perBitmap blocks to a block of its own, and returns its entry in the index.
func (e *encoder) bitmap(at uint64, counts []uint32) []byte {
	page := make([]byte, block)
	le.PutUint64(page[8:], at)
	free, first := 0, len(counts)
	for i, n := range counts {
		if n == 0 {
			free++
			first = min(first, i)
		}
		n = min(n, 3)
		page[16+i/4] |= byte((n>>1 | n&1<<1) << (i % 4 * 2)) // the high bit comes first
	}
	seal(page, bitmapSalt)
	e.write(at, page)
	return le.AppendUint32(le.AppendUint32(le.AppendUint64(nil, at), uint32(free)), uint32(first))
}

func used(counts []uint32) (n uint64) {
	for _, c := range counts {
		if c > 0 {
			n++
		}
	}
	return n
}

func (e *encoder) dataSpace(out []byte) {
	var keys []uint64
	var entries [][]byte
	for counts := range slices.Chunk(e.data, perBitmap) {
		keys, entries = append(keys, uint64(len(keys))), append(entries, e.bitmap(e.allocate(), counts))
	}
	le.PutUint64(out, uint64(len(e.data)))
	le.PutUint64(out[8:], used(e.data))
	le.PutUint64(out[16:], e.table(keys, entries, 16))
	le.PutUint64(out[24:], e.many(e.data))
}

// metadataSpace comes last: it counts its own blocks as well.
func (e *encoder) metadataSpace(out []byte, blocks uint64) {
	many := e.many(e.counts)
	index := e.allocate()
	if blocks == 0 {
		blocks = uint64(len(e.counts)) + 300
	}
	bitmaps := make([]uint64, (blocks+perBitmap-1)/perBitmap)
	for i := range bitmaps {
		bitmaps[i] = e.allocate()
	}
	counts := append(e.counts, make([]uint32, blocks-uint64(len(e.counts)))...)
	page := make([]byte, block)
	le.PutUint64(page[8:], index)
	for i, at := range bitmaps {
		copy(page[16+16*i:], e.bitmap(at, counts[i*perBitmap:min((i+1)*perBitmap, len(counts))]))
	}
	seal(page, indexSalt)
	e.write(index, page)
	e.write(blocks-1, make([]byte, block)) // the last block of the device
	le.PutUint64(out, blocks)
	le.PutUint64(out[8:], used(counts))
	le.PutUint64(out[16:], index)
	le.PutUint64(out[24:], many)
}
