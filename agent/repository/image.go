package repository

import (
	"bytes"
	"context"
	"errors"
	"io"
	"sync"

	"github.com/kopia/kopia/repo/content"
	"github.com/kopia/kopia/repo/object"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/cbt"
	"stillpoint.io/stillpoint/fault"
)

// Image is a backup's disk image, open for reading. It is an adapters.Image. It holds the top level of the index in
// memory, 36 bytes for each SegmentSize of the image (10 MiB for 16 TiB), and reads the rest as it is needed.
type Image struct {
	r        *Repository
	contents content.Reader
	size     int64
	data     int64
	segments []content.ID

	mu     sync.Mutex
	chunks map[int][]Chunk // of segments read lately; never changed once it is here
}

// keptSegments is how many segments' chunk lists an image remembers.
const keptSegments = 64

// OpenImage opens the image of a backup. A top level that is damaged or does not make up the volume is Corrupt.
func (r *Repository) OpenImage(ctx context.Context, b Backup) (i *Image, err error) {
	if err := b.isImage(); err != nil {
		return nil, err
	}
	err = within(ctx, func(ctx context.Context) error {
		i, err = r.openImage(ctx, r.kopia.ContentReader(), b)
		return err
	})
	return i, err
}

// isImage is nil for the backup of a disk image.
func (b Backup) isImage() error {
	if b.Form != adapters.BlockForm {
		return fault.Errorf(fault.Unsupported, "backup %s is of a tree of files and has no image", b.ID)
	}
	return nil
}

// objectReader is what kopia's object package reads from.
type objectReader interface {
	content.Reader
	PrefetchContents(ctx context.Context, contentIDs []content.ID, hint string) []content.ID
}

func (r *Repository) openImage(ctx context.Context, from content.Reader, b Backup) (*Image, error) {
	id, size := b.Image, b.Size
	i := &Image{r: r, contents: from, size: size, data: b.Data, segments: make([]content.ID, 0, chunksIn(size, SegmentSize)), chunks: map[int][]Chunk{}}
	if size == 0 {
		return i, nil
	}
	index, ok := id.id.IndexObjectID()
	if !ok {
		return nil, fault.Errorf(fault.Corrupt, "image %s: has no index", id)
	}
	in, err := object.Open(ctx, from.(objectReader), index)
	if err != nil {
		return nil, r.corrupt(err)
	}
	defer in.Close()
	s, err := newScanner(in)
	for err == nil {
		var e entry
		if e, err = s.entry(); err != nil {
			break
		}
		if want := min(SegmentSize, size-e.start); e.length != want || !e.id.HasPrefix() {
			return nil, fault.Errorf(fault.Corrupt, "image %s: its index has %d bytes at %d, not %d", id, e.length, e.start, want)
		}
		i.segments = append(i.segments, e.id)
	}
	if !errors.Is(err, io.EOF) {
		return nil, r.corrupt(err)
	}
	if s.next != size {
		return nil, fault.Errorf(fault.Corrupt, "image %s: its index ends at %d, the volume at %d", id, s.next, size)
	}
	return i, nil
}

// corrupt gives a reading error its kind: what kopia cannot read is Corrupt unless something else is known.
func (r *Repository) corrupt(err error) error {
	if err == nil || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	err = r.at.fault("reading", err)
	if fault.KindOf(err) == fault.Internal {
		return fault.Errorf(fault.Corrupt, "%w", err)
	}
	return err
}

// isCorrupt tells damage from a reader that did not come through.
func isCorrupt(err error) bool { return fault.KindOf(err) == fault.Corrupt }

// Size is the image's length in bytes.
func (i *Image) Size() int64 { return i.size }

// Data is how many bytes are in chunks that are not all zero, as the backup's description has it.
func (i *Image) Data() int64 { return i.data }

// DataIn counts the bytes in the chunks of the n-th segment that are not all zero.
func (i *Image) DataIn(n int, chunks []Chunk) int64 {
	var data int64
	s, _ := i.Segment(n)
	for k, c := range chunks {
		if length := min(i.r.ChunkSize(), s.Length-int64(k)*i.r.ChunkSize()); c != i.r.ZeroChunk(length) {
			data += length
		}
	}
	return data
}

// Whole is how many of the first segments would be as long in an image of size bytes.
func (i *Image) Whole(size int64) int {
	if size == i.size {
		return len(i.segments)
	}
	return int(min(size, i.size) / SegmentSize)
}

// Segments is how many segments the image has.
func (i *Image) Segments() int { return len(i.segments) }

// Segment returns the n-th segment, to be put into another image's index, and whether it is all zero.
func (i *Image) Segment(n int) (s Segment, zero bool) {
	length := min(SegmentSize, i.size-int64(n)*SegmentSize)
	return Segment{i.segments[n], length}, i.segments[n] == i.r.zeroSegment(length)
}

// Chunks returns the chunks of the n-th segment. The slice is shared: it must not be changed.
func (i *Image) Chunks(ctx context.Context, n int) ([]Chunk, error) {
	i.mu.Lock()
	chunks, ok := i.chunks[n]
	i.mu.Unlock()
	if ok {
		return chunks, nil
	}
	segment, zero := i.Segment(n)
	if zero {
		return i.r.zeroChunks(segment.Length), nil
	}
	p, err := i.r.read(ctx, i.contents, segment.id)
	if err != nil {
		return nil, err
	}
	s, err := newScanner(bytes.NewReader(p))
	if err != nil {
		return nil, err
	}
	size := i.r.ChunkSize()
	chunks = make([]Chunk, 0, chunksIn(segment.Length, size))
	for {
		e, err := s.entry()
		if errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return nil, err
		}
		if e.length != min(size, segment.Length-e.start) || e.id.HasPrefix() {
			return nil, fault.Errorf(fault.Corrupt, "segment %d: its index has %d bytes at %d", n, e.length, e.start)
		}
		chunks = append(chunks, Chunk{e.id})
	}
	if s.next != segment.Length {
		return nil, fault.Errorf(fault.Corrupt, "segment %d: its index ends at %d, not at %d", n, s.next, segment.Length)
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	if len(i.chunks) >= keptSegments {
		for old := range i.chunks {
			delete(i.chunks, old)
			break
		}
	}
	i.chunks[n] = chunks
	return chunks, nil
}

// ReadAt is safe in parallel and follows io.ReaderAt. Every chunk it touches is decrypted, hashed and compared with
// its id, and has the length that the index says; one that is not right, or not there, is Corrupt. Reads of whole
// chunks waste nothing.
func (i *Image) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fault.Errorf(fault.Invalid, "reading at the negative offset %d", off)
	}
	done := 0
	for done < len(p) && off < i.size {
		n, err := i.readChunk(ctx, p[done:], off)
		if err != nil {
			return done, err
		}
		done, off = done+n, off+int64(n)
	}
	if done < len(p) {
		return done, io.EOF
	}
	return done, nil
}

// readChunk fills p from off, up to the end of one chunk.
func (i *Image) readChunk(ctx context.Context, p []byte, off int64) (int, error) {
	size := i.r.ChunkSize()
	chunks, err := i.Chunks(ctx, int(off/SegmentSize))
	if err != nil {
		return 0, err
	}
	chunk := chunks[off%SegmentSize/size]
	start := off / size * size
	length := min(size, i.size-start)
	want := int(min(int64(len(p)), start+length-off))
	if chunk == i.r.ZeroChunk(length) {
		clear(p[:want])
		return want, nil
	}
	data, err := i.r.read(ctx, i.contents, chunk.id)
	if err != nil {
		return 0, err
	}
	if int64(len(data)) != length {
		return 0, fault.Errorf(fault.Corrupt, "chunk %s: %d bytes long, the index says %d", chunk, len(data), length)
	}
	return copy(p[:want], data[off-start:]), nil
}

// Need is the chunk at off, to be read into the start of p.
func (i *Image) Need(ctx context.Context, off int64, p []byte) (Need, error) {
	size := i.r.ChunkSize()
	chunks, err := i.Chunks(ctx, int(off/SegmentSize))
	if err != nil {
		return Need{}, err
	}
	length := min(size, i.size-off/size*size)
	return Need{chunks[off%SegmentSize/size], length, p[:length]}, nil
}

// Is says that p is what the chunk holds.
func (i *Image) Is(c Chunk, p []byte) bool { return i.r.ChunkOf(p) == c }

// ReadBuffer is what a Reader of the image needs, in bytes.
func (i *Image) ReadBuffer() int64 { return i.r.ReadBuffer() }

// Extents gives the image as runs of whole chunks, data and zero, from offset 0 to its end without a gap. It reads the
// index of every segment that is not all zero.
func (i *Image) Extents(ctx context.Context) cbt.Seq {
	return cbt.Coalesce(func(yield func(cbt.Extent, error) bool) {
		for n := range i.segments {
			segment, zero := i.Segment(n)
			at := int64(n) * SegmentSize
			if zero {
				if !yield(cbt.Extent{Offset: at, Length: segment.Length, Zero: true}, nil) {
					return
				}
				continue
			}
			chunks, err := i.Chunks(ctx, n)
			if err != nil {
				yield(cbt.Extent{}, err)
				return
			}
			for k, c := range chunks {
				off := int64(k) * i.r.ChunkSize()
				length := min(i.r.ChunkSize(), segment.Length-off)
				if !yield(cbt.Extent{Offset: at + off, Length: length, Zero: c == i.r.ZeroChunk(length)}, nil) {
					return
				}
			}
		}
	})
}

// Close releases the image.
func (i *Image) Close() error { return nil }
