package repository

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"sync"

	"github.com/kopia/kopia/repo/compression"
	"github.com/kopia/kopia/repo/content"

	"stillpoint.io/stillpoint/fault"
)

// Chunk names a piece of an image by its content: chunks are equal exactly if their bytes are. The zero Chunk is none.
type Chunk struct{ id content.ID }

// String returns kopia's id of the content.
func (c Chunk) String() string { return c.id.String() }

// putContent is how kopia takes a content. Its type for the bytes is internal to it; argument makes one.
type putContent[Bytes any] = func(ctx context.Context, data Bytes, prefix content.IDPrefix, comp compression.HeaderID) (content.ID, error)

func argument[Bytes any](putContent[Bytes]) Bytes {
	var b Bytes
	return b
}

// sliceList is the one-element list of slices in which kopia takes bytes, kept to be used again.
type sliceList struct {
	list [1][]byte
	hash [64]byte
}

var slicesPool = sync.Pool{New: func() any { return new(sliceList) }}

// ChunkOf computes the name of p without storing it.
func (r *Repository) ChunkOf(p []byte) Chunk {
	return Chunk{r.idOf("", p)}
}

func (r *Repository) idOf(prefix content.IDPrefix, p []byte) content.ID {
	s := slicesPool.Get().(*sliceList)
	defer slicesPool.Put(s)
	s.list[0] = p
	b := argument((*content.WriteManager)(nil).WriteContent)
	b.Slices = s.list[:]
	id, err := content.IDFromHash(prefix, r.hash(s.hash[:0], b))
	s.list[0] = nil
	if err != nil {
		panic(err) // only for a hash or prefix of the wrong length
	}
	return id
}

// read gets a content, decrypts it, and makes sure that it is what its id says. What came over a network may have been
// spoilt on its way: it is asked for once more before it is called corrupt.
func (r *Repository) read(ctx context.Context, from content.Reader, id content.ID) ([]byte, error) {
	p, err := r.readOnce(ctx, from, id)
	if r.at.S3 == nil || fault.KindOf(err) != fault.Corrupt {
		return p, damaged(id, err)
	}
	first := err
	if p, err = r.readOnce(ctx, from, id); err == nil {
		slog.WarnContext(ctx, "a content was spoilt on its way from the store, and came right the second time", "repository", r.at.String(), "error", first.Error())
	}
	return p, damaged(id, err)
}

func (r *Repository) readOnce(ctx context.Context, from content.Reader, id content.ID) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	ctx, end := Operation(ctx)
	defer end()
	p, err := from.GetContent(ctx, id)
	err = reason(ctx, err)
	switch {
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return nil, err
	case err != nil:
		err = r.at.fault("reading", err)
		if fault.KindOf(err) == fault.Internal { // kopia has no error of its own for a failed authentication
			err = fault.Errorf(fault.Corrupt, "%w", err)
		}
		return nil, err
	case r.idOf(id.Prefix(), p) != id:
		return nil, fault.Errorf(fault.Corrupt, "repository %s: content %s decrypts to something else", r.at, id)
	}
	return p, nil
}

// zeros remembers the names of chunks and segments that are all zero, by length and chunk size.
type zeros struct {
	mu       sync.Mutex
	chunks   map[int64]Chunk
	segments map[int64]content.ID
}

// ZeroChunk is the name of length zero bytes; length is at most the chunk size.
func (r *Repository) ZeroChunk(length int64) Chunk {
	z := &r.zeros
	z.mu.Lock()
	defer z.mu.Unlock()
	c, ok := z.chunks[length]
	if !ok {
		if z.chunks == nil {
			z.chunks, z.segments = map[int64]Chunk{}, map[int64]content.ID{}
		}
		c = r.ChunkOf(make([]byte, length))
		z.chunks[length] = c
	}
	return c
}

// zeroSegment is the id of the index of an all-zero segment.
func (r *Repository) zeroSegment(length int64) content.ID {
	r.zeros.mu.Lock()
	id, ok := r.zeros.segments[length]
	r.zeros.mu.Unlock()
	if !ok {
		id = r.idOf(indexPrefix, appendIndex(nil, r.zeroChunks(length), r.ChunkSize(), length))
		r.zeros.mu.Lock()
		r.zeros.segments[length] = id
		r.zeros.mu.Unlock()
	}
	return id
}

func (r *Repository) zeroChunks(length int64) []Chunk {
	chunks := make([]Chunk, 0, chunksIn(length, r.ChunkSize()))
	for off := int64(0); off < length; off += r.ChunkSize() {
		chunks = append(chunks, r.ZeroChunk(min(r.ChunkSize(), length-off)))
	}
	return chunks
}

// chunksIn is how many pieces of size unit length bytes make, the last of which may be shorter.
func chunksIn(length, unit int64) int { return int((length + unit - 1) / unit) }

var zeroPage [64 << 10]byte

// IsZero reports whether p is all zero.
func IsZero(p []byte) bool {
	// Most data differs from zero at its start.
	for len(p) > len(zeroPage) {
		if !bytes.Equal(p[:len(zeroPage)], zeroPage[:]) {
			return false
		}
		p = p[len(zeroPage):]
	}
	return bytes.Equal(p, zeroPage[:len(p)])
}
