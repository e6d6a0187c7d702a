package repository

import (
	"context"
	"encoding/binary"
	"errors"
	"sync"
	"sync/atomic"

	"github.com/klauspost/compress"
	"github.com/kopia/kopia/repo"
	"github.com/kopia/kopia/repo/compression"
	"github.com/kopia/kopia/repo/content"
	"github.com/kopia/kopia/repo/manifest"
	"github.com/kopia/kopia/repo/object"

	"stillpoint.io/stillpoint/fault"
)

// Writer adds one backup. Its methods are safe in parallel, except where they say otherwise. What it writes is invisible
// until Checkpoint, for whoever continues, and until Commit for everybody; it goes with kopia's maintenance if neither
// ever comes.
type Writer struct {
	r          *Repository
	stored     atomic.Int64
	fresh      *freshChunks
	checkpoint manifest.ID // the last one's
	began      moment
	resumed    bool // what an earlier writer did is part of it
	renewal    renewal

	mu      sync.Mutex
	current *session
}

// session is one of kopia's. A checkpoint ends one and begins the next, so that nobody waits while it is flushed.
type session struct {
	kopia repo.DirectRepositoryWriter
	put   storer
	users sync.WaitGroup

	renewal *renewal // of the writer
}

// NewWriter begins. Close it.
func (r *Repository) NewWriter(ctx context.Context) (*Writer, error) {
	if err := r.at.sweep(); err != nil {
		return nil, r.at.fault("writing to", err)
	}
	w := &Writer{r: r, fresh: new(freshChunks), began: momentNow()}
	err := within(ctx, func(ctx context.Context) error {
		bad, err := r.damage(ctx, r.kopia, r.kopia.ContentReader())
		w.renewal.begin(bad)
		return err
	})
	if err != nil {
		return nil, err
	}
	w.current, err = w.begin(ctx)
	return w, err
}

func (w *Writer) begin(ctx context.Context) (*session, error) {
	_, k, err := w.r.kopia.NewDirectWriter(ctx, repo.WriteSessionOptions{Purpose: "stillpoint backup", OnUpload: func(n int64) { w.stored.Add(n) }})
	if err != nil {
		return nil, w.r.at.fault("writing to", err)
	}
	s := &session{kopia: k, renewal: &w.renewal}
	m := k.ContentManager()
	s.put = func(ctx context.Context, p []byte, prefix content.IDPrefix, comp compression.HeaderID) (content.ID, error) {
		if err := ctx.Err(); err != nil {
			return content.EmptyID, err
		}
		s := slicesPool.Get().(*sliceList)
		defer slicesPool.Put(s)
		s.list[0] = p
		b := argument(m.WriteContent)
		b.Slices = s.list[:]
		ctx, end := Operation(ctx)
		defer end()
		var id content.ID
		var err error
		if w.renewal.any() {
			id, err = w.renewal.store(ctx, m, w.r.idOf(prefix, p), func() (content.ID, error) { return m.WriteContent(ctx, b, prefix, comp) })
		} else {
			id, err = m.WriteContent(ctx, b, prefix, comp)
		}
		s.list[0] = nil
		return id, w.r.at.fault("writing to", reason(ctx, err))
	}
	return s, nil
}

// use gives the session to write to. Its user says Done.
func (w *Writer) use() *session {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.current.users.Add(1)
	return w.current
}

func (w *Writer) put(ctx context.Context, p []byte, prefix content.IDPrefix, comp compression.HeaderID) (content.ID, error) {
	s := w.use()
	defer s.users.Done()
	return s.put(ctx, p, prefix, comp)
}

// has says whether the repository, or this writer's session, has a content that is not known to be damaged.
func (w *Writer) has(ctx context.Context, id content.ID) bool {
	s := w.use()
	defer s.users.Done()
	return !w.renewal.has(id) && has(ctx, s.kopia, id)
}

// Close ends the session. Without a Commit nothing of it will ever be seen, except by who continues from a checkpoint.
func (w *Writer) Close(ctx context.Context) error {
	return w.r.at.fault("closing", within(ctx, w.current.kopia.Close))
}

// Stored is how many bytes went to the repository so far, compressed and with indexes.
func (w *Writer) Stored() int64 { return w.stored.Load() }

// Compressors by measurement: S2 costs a third of zstd's fastest level on data that compresses, and next to nothing
// on data that does not when that is known before. Indexes are small and compress well.
var (
	chunkCompressor = compression.ByName["s2-default"].HeaderID()
	indexCompressor = compression.ByName["zstd-fastest"].HeaderID()
)

// Write stores a chunk. fresh says that the repository did not have it before. p is not kept.
func (w *Writer) Write(ctx context.Context, p []byte) (c Chunk, fresh bool, err error) {
	comp := content.NoCompression
	if compressible(p) {
		comp = chunkCompressor
	}
	c.id, err = w.put(ctx, p, "", comp)
	if err != nil {
		return Chunk{}, false, err
	}
	// The repository's own view does not see what this session has not flushed.
	return c, !has(ctx, w.r.kopia, c.id) && w.fresh.add(c), nil
}

// has says whether a content is known to be there.
func has(ctx context.Context, k interface {
	ContentInfo(ctx context.Context, id content.ID) (content.Info, error)
}, id content.ID) bool {
	ctx, end := Operation(ctx)
	defer end()
	info, err := k.ContentInfo(ctx, id)
	return err == nil && !info.Deleted
}

// WriteZero stores length zero bytes, at most the chunk size, if the repository has them not yet.
func (w *Writer) WriteZero(ctx context.Context, length int64) (Chunk, error) {
	c := w.r.ZeroChunk(length)
	if w.has(ctx, c.id) {
		return c, nil
	}
	_, err := w.put(ctx, make([]byte, length), "", chunkCompressor)
	return c, err
}

// compressible looks at three samples of 4 KiB.
func compressible(p []byte) bool {
	const sample = 4 << 10
	if len(p) < 4*sample {
		return true
	}
	for i := range 3 {
		off := (len(p) - sample) / 2 * i
		if compress.Estimate(p[off:off+sample]) > 0.05 {
			return true
		}
	}
	return false
}

// freshChunks remembers which chunks a session found new, so that a chunk which occurs often is new once. It
// remembers the last quarter of a million, give or take; an older one counts as new again.
type freshChunks [1 << 18]atomic.Uint64

func (f *freshChunks) add(c Chunk) bool {
	h := binary.LittleEndian.Uint64(c.id.Hash())
	return f[h%uint64(len(f))].Swap(h) != h
}

// Segment is a stretch of SegmentSize bytes of an image, or less at its end, by the index of its chunks.
type Segment struct {
	id     content.ID
	Length int64 // bytes
}

// Index is the content that holds the segment's index.
func (s Segment) Index() Chunk { return Chunk{s.id} }

var indexBuffers = sync.Pool{New: func() any { return new([]byte) }}

// WriteSegment stores the index of a segment's chunks, which are in order and without a gap.
func (w *Writer) WriteSegment(ctx context.Context, chunks []Chunk, length int64) (Segment, error) {
	if len(chunks) != chunksIn(length, w.r.ChunkSize()) || length > SegmentSize {
		return Segment{}, errors.New("a segment without all of its chunks")
	}
	b := indexBuffers.Get().(*[]byte)
	defer indexBuffers.Put(b)
	*b = appendIndex((*b)[:0], chunks, w.r.ChunkSize(), length)
	id, err := w.put(ctx, *b, indexPrefix, indexCompressor)
	return Segment{id, length}, err
}

// WriteZeroSegment stores the index of an all-zero segment, if the repository has it not yet.
func (w *Writer) WriteZeroSegment(ctx context.Context, length int64) (Segment, error) {
	id := w.r.zeroSegment(length)
	if w.has(ctx, id) {
		return Segment{id, length}, nil
	}
	for off := int64(0); off < length; off += w.r.ChunkSize() {
		if _, err := w.WriteZero(ctx, min(w.r.ChunkSize(), length-off)); err != nil {
			return Segment{}, err
		}
	}
	return w.WriteSegment(ctx, w.r.zeroChunks(length), length)
}

// Index is the top level of an image's index, collected segment by segment: 36 bytes of memory for each. It is not safe in
// parallel.
type Index struct {
	w        *Writer
	segments []content.ID
	size     int64
}

// NewIndex begins the top level of an image of size bytes.
func (w *Writer) NewIndex(size int64) *Index {
	return &Index{w: w, segments: make([]content.ID, 0, chunksIn(size, SegmentSize))}
}

// Add appends the next segment. All but the last have SegmentSize bytes.
func (x *Index) Add(s Segment) error {
	if x.size%SegmentSize != 0 || s.Length <= 0 || s.Length > SegmentSize {
		return errors.New("a segment at the wrong place")
	}
	x.segments = append(x.segments, s.id)
	x.size += s.Length
	return nil
}

// Finish stores the top level. An image of no bytes is an empty object.
func (x *Index) Finish(ctx context.Context) (ImageID, error) {
	return x.Part().store(ctx, x.w.put)
}

// Part is the start of an image: all the segments that an Index had at a moment.
type Part struct {
	segments []content.ID // shared with the index, which only appends
	Size     int64        // bytes
}

// Part is what the index has so far.
func (x *Index) Part() Part { return Part{x.segments, x.size} }

// store writes the part's top level.
func (p Part) store(ctx context.Context, put storer) (ImageID, error) {
	if p.Size == 0 {
		id, err := put(ctx, nil, "", content.NoCompression)
		return ImageID{object.DirectObjectID(id)}, err
	}
	out := objectWriter{put: put, prefix: indexPrefix, buf: append(make([]byte, 0, 64<<10), indexHead...)}
	for n, id := range p.segments {
		if n > 0 {
			out.buf = append(out.buf, ',')
		}
		start := int64(n) * SegmentSize
		out.buf = appendEntry(out.buf, entry{start, min(SegmentSize, p.Size-start), id})
		if len(out.buf) >= objectPiece {
			if err := out.flush(ctx); err != nil {
				return ImageID{}, err
			}
		}
	}
	out.buf = append(out.buf, indexTail...)
	id, err := indirect(out.finish(ctx))
	return ImageID{id}, err
}

// ImageID is kopia's id of an image: a digest of all of it.
type ImageID struct{ id object.ID }

// String returns kopia's id of the object.
func (i ImageID) String() string { return i.id.String() }

func (i ImageID) MarshalText() ([]byte, error) { return []byte(i.id.String()), nil }

func (i *ImageID) UnmarshalText(b []byte) (err error) {
	*i, err = parseImageID(string(b))
	return err
}

func parseImageID(s string) (ImageID, error) {
	id, err := object.ParseID(s)
	if err != nil {
		return ImageID{}, fault.Errorf(fault.Corrupt, "%q is no image: %w", s, err)
	}
	return ImageID{id}, nil
}
