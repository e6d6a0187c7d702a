package thinmeta

import (
	"context"
	"fmt"
	"io"
	"math"
	"unsafe"

	"stillpoint.io/stillpoint/fault"
)

// cursor walks a btree in the order of its keys. It stands on an item: a reference to a subtree that was not read yet,
// or an entry of a leaf. Its memory is one page a level and the window of leaves.
type cursor struct {
	m         *Metadata
	ctx       context.Context
	valueSize int
	from      uint64 // entries with smaller keys are passed over

	stack   [maxHeight]node
	depth   int   // nodes on the stack
	pending child // the subtree stood on, while closed
	closed  bool  // it stands on a subtree; else on an entry of the topmost node, if there is one
	window  window
}

// newCursor stands before the whole tree. It reads a node of each level to learn the height.
func (m *Metadata) newCursor(ctx context.Context, at uint64, valueSize int, from uint64) (*cursor, error) {
	c := &cursor{m: m, ctx: ctx, valueSize: valueSize, from: from}
	ref := root(at)
	for height := 1; ; height++ {
		if height > maxHeight {
			return nil, corrupt(at, "the btree below it is deeper than %d levels: it may lead in a circle", maxHeight)
		}
		d := &c.stack[height-1]
		if err := c.read(d, ref); err != nil {
			return nil, err
		}
		if d.level == 0 {
			c.pending, c.closed = root(at), c.stack[0].n > 0
			c.pending.level = height - 1
			if c.closed {
				c.pending.lo = c.stack[0].key(0)
			}
			return c, nil
		}
		ref = d.sub(0)
		ref.level = unknownLevel
	}
}

// key is the smallest key that the item can have, or the greatest there is at the end of the tree.
func (c *cursor) key() uint64 {
	switch {
	case c.closed:
		return c.pending.lo
	case c.depth > 0:
		d := c.top()
		return d.key(d.position)
	default:
		return math.MaxUint64
	}
}

// done reports whether the tree has ended.
func (c *cursor) done() bool { return !c.closed && c.depth == 0 }

// open reports whether it stands on an entry, which is at top().position.
func (c *cursor) open() bool { return !c.closed && c.depth > 0 }

// top is the leaf that it stands in.
func (c *cursor) top() *node { return &c.stack[c.depth-1] }

// expand reads the subtree that it stands on, and stands on the first item in it.
func (c *cursor) expand() error {
	if c.depth == maxHeight {
		return corrupt(c.pending.block, "the btree is deeper than %d levels", maxHeight)
	}
	d := &c.stack[c.depth]
	if err := c.read(d, c.pending); err != nil {
		return err
	}
	d.position = d.search(c.from)
	if d.level > 0 && d.position > 0 && (d.position == d.n || d.key(d.position) > c.from) {
		d.position-- // from may lie in the child before
	}
	c.depth++
	c.settle()
	return nil
}

// next leaves the item.
func (c *cursor) next() {
	if c.depth > 0 {
		c.top().position++
	}
	c.settle()
}

// settle finds the item after a position has moved.
func (c *cursor) settle() {
	c.closed = false
	for c.depth > 0 {
		d := c.top()
		if d.position < d.n {
			if c.closed = d.level > 0; c.closed {
				c.pending = d.sub(d.position)
			}
			return
		}
		if c.depth--; c.depth > 0 {
			c.top().position++
		}
	}
}

// enter expands subtrees until it stands on an entry or at the end.
func (c *cursor) enter() error {
	for c.closed {
		if err := c.expand(); err != nil {
			return err
		}
	}
	return nil
}

// rightmost returns the last leaf of the tree. The cursor is of no use afterwards.
func (c *cursor) rightmost() (*node, error) {
	d := &c.stack[0]
	for level := c.pending.level - 1; level >= 0; level-- {
		ref := d.sub(d.n - 1)
		ref.level = level
		if err := c.read(d, ref); err != nil {
			return nil, err
		}
	}
	return d, nil
}

// read reads a node into d.
func (c *cursor) read(d *node, ref child) error {
	var page []byte
	var err error
	if ref.level == 0 && c.depth > 0 {
		page, err = c.window.load(c.ctx, c.m.source, ref.block, c.siblings())
	} else {
		if page = d.page; page == nil {
			page = aligned(blockSize)
		}
		err = readBlocks(c.ctx, c.m.source, page, ref.block)
	}
	if err != nil {
		return err
	}
	return d.parse(page, ref, c.valueSize)
}

// siblings counts the entries from the item on whose blocks follow one another.
func (c *cursor) siblings() int {
	d := c.top()
	n := 1
	for block := d.word(d.position); n < windowBlocks && d.position+n < d.n && d.word(d.position+n) == block+uint64(n); n++ {
	}
	return n
}

// windowBlocks is how many leaves are read at once at most.
const windowBlocks = 32

// window reads leaves ahead where they lie one behind the other: the more, the longer what it read ahead was used.
type window struct {
	pages       []byte
	first       uint64
	have, taken int
	ahead       int
}

// load returns the page of a block. following is how many blocks from there on are likely to be wanted next.
func (w *window) load(ctx context.Context, source Source, block uint64, following int) ([]byte, error) {
	if block < w.first || block >= w.first+uint64(w.have) {
		if w.pages == nil {
			w.pages = aligned(windowBlocks * blockSize)
		}
		w.ahead = min(2*w.ahead, windowBlocks)
		if w.taken < w.have || w.ahead == 0 {
			w.ahead = 1
		}
		n := min(w.ahead, following)
		w.have, w.taken = 0, 0
		if err := readBlocks(ctx, source, w.pages[:n*blockSize], block); err != nil {
			return nil, err
		}
		w.first, w.have = block, n
	}
	w.taken++
	at := int(block-w.first) * blockSize
	return w.pages[at : at+blockSize : at+blockSize], nil
}

// readBlocks fills p from a block on.
func readBlocks(ctx context.Context, source Source, p []byte, block uint64) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	blocks := uint64(source.Size()) / blockSize
	if blocks == 0 {
		return fault.Errorf(fault.Corrupt, "metadata block 0: %d bytes are too few for a superblock of dm-thin metadata", source.Size())
	}
	if block >= blocks || uint64(len(p)/blockSize) > blocks-block {
		return corrupt(block, "something refers to it, but the metadata ends before it, at block %d: it may be truncated", blocks)
	}
	n, err := source.ReadAt(ctx, p, int64(block)*blockSize)
	switch {
	case n == len(p):
		return nil
	case err == nil || err == io.EOF:
		return fault.Errorf(fault.Corrupt, "metadata block %d: reading ended after %d bytes of %d", block, n, len(p))
	default:
		return fmt.Errorf("reading metadata block %d: %w", block, err)
	}
}

// aligned makes a buffer that starts on a whole block of memory, as direct I/O demands.
func aligned(size int) []byte {
	b := make([]byte, size+blockSize)
	skip := -int(uintptr(unsafe.Pointer(unsafe.SliceData(b)))) & (blockSize - 1)
	return b[skip : skip+size : skip+size]
}
