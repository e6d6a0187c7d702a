package backup

import (
	"bytes"
	"context"
	"errors"
	"maps"
	"os"
	"testing"

	"stillpoint.io/stillpoint/adapters"
)

// model is what a volume must hold. Like the volumes of tests it is large and nearly empty: blocks of zeros take no room,
// and copies share all that they have in common. The race detector looks at every byte that is moved, which in volumes
// that were slices was most of what these tests did.
type model struct {
	size   int64
	blocks map[int64][]byte // by number, of modelBlock bytes; none is changed once it is here
}

const modelBlock = 64 << 10

var noBlock [modelBlock]byte

func newModel(size int64) *model { return &model{size: size, blocks: map[int64][]byte{}} }

// clone is a copy.
func (m *model) clone() *model { return &model{m.size, maps.Clone(m.blocks)} }

// resized is a copy of another size, with zeros at the end if it is larger.
func (m *model) resized(size int64) *model {
	c := m.clone()
	if size < c.size {
		c.change(size, c.size-size, func(p []byte, _ int64) { clear(p) })
	}
	c.size = size
	return c
}

func (m *model) write(p []byte, off int64) {
	m.change(off, int64(len(p)), func(block []byte, at int64) { copy(block, p[at:]) })
}

func (m *model) zero(off, length int64) {
	m.change(off, length, func(p []byte, _ int64) { clear(p) })
}

// change puts new blocks where a range is. do is given each part of the range, and where in the range it begins.
func (m *model) change(off, length int64, do func(p []byte, at int64)) {
	for at := int64(0); at < length; {
		n, within := (off+at)/modelBlock, (off+at)%modelBlock
		block := make([]byte, modelBlock)
		copy(block, m.blocks[n])
		part := block[within:min(modelBlock, within+length-at)]
		do(part, at)
		m.blocks[n] = block
		if bytes.Equal(block, noBlock[:]) {
			delete(m.blocks, n)
		}
		at += int64(len(part))
	}
}

// read returns a range.
func (m *model) read(off, length int64) []byte {
	p := make([]byte, length)
	for at := int64(0); at < length; {
		n, within := (off+at)/modelBlock, (off+at)%modelBlock
		part := p[at:min(length, at+modelBlock-within)]
		if block := m.blocks[n]; block != nil {
			copy(part, block[within:])
		}
		at += int64(len(part))
	}
	return p
}

// differs is the first place at which an image is not the model, -1 if there is none. It closes the image.
func (m *model) differs(ctx context.Context, got adapters.Image) (at int64, err error) {
	defer func() { err = errors.Join(err, got.Close()) }()
	p := make([]byte, 16*modelBlock)
	for off := int64(0); off < min(m.size, got.Size()); off += int64(len(p)) {
		p = p[:min(int64(len(p)), m.size-off, got.Size()-off)]
		if n, err := got.ReadAt(ctx, p, off); n < len(p) {
			return off, err
		}
		for at := 0; at < len(p); at += modelBlock {
			have := p[at:min(at+modelBlock, len(p))]
			want := m.block((off + int64(at)) / modelBlock)[:len(have)]
			if !bytes.Equal(have, want) {
				k := 0
				for have[k] == want[k] {
					k++
				}
				return off + int64(at+k), nil
			}
		}
	}
	if got.Size() != m.size {
		return min(m.size, got.Size()), nil
	}
	return -1, nil
}

// block is the n-th. It must not be changed.
func (m *model) block(n int64) []byte {
	if block := m.blocks[n]; block != nil {
		return block
	}
	return noBlock[:]
}

// mustEqual fails the test unless an image holds what it must. It closes the image.
func mustEqual(t testing.TB, what string, got adapters.Image, want *model) {
	t.Helper()
	if at, err := want.differs(t.Context(), got); err != nil || at >= 0 {
		t.Fatalf("%s: %d bytes, want %d, and differs at %d: %v", what, got.Size(), want.size, at, err)
	}
}

// fileImage is a file as an image.
type fileImage struct {
	file *os.File
	size int64
}

func openFile(t testing.TB, path string) adapters.Image {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	info, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	return fileImage{f, info.Size()}
}

func (f fileImage) ReadAt(_ context.Context, p []byte, off int64) (int, error) {
	return f.file.ReadAt(p, off)
}
func (f fileImage) Size() int64  { return f.size }
func (f fileImage) Close() error { return f.file.Close() }
