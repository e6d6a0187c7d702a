package backup

import (
	"context"
	"errors"
	"sync"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/repository"
	"stillpoint.io/stillpoint/cbt"
	"stillpoint.io/stillpoint/fault"
)

// readFile stores a file's bytes: as one content if they are no more than a chunk, and otherwise as a disk image is stored,
// chunk by chunk in parallel, from where an interrupted run had come to. Chunks in holes are not read.
func (g *grower) readFile(ctx context.Context, in *unfinished, path string, e adapters.Entry, part *repository.PartEntry) (made repository.TreeEntry, err error) {
	g.progress.Total.Add(e.Size)
	f, err := g.source.OpenFile(ctx, path)
	if err != nil {
		return made, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if f.Size() != e.Size {
		return made, fault.Errorf(fault.Corrupt, "%q opens with %d bytes and is listed with %d", path, f.Size(), e.Size)
	}
	g.filesRead.Add(1)
	if e.Size <= g.chunk {
		c, err := g.readChunk(ctx, f, 0, e.Size)
		if err == nil {
			g.written.offer(path)
		}
		return c.Holding(e), err
	}
	image, err := g.readLarge(ctx, in, e, f, part)
	if err == nil {
		g.written.offer(path)
	}
	return image.Holding(e), err
}

// readChunk reads and stores a chunk. One of zeros is stored like any other.
func (g *grower) readChunk(ctx context.Context, f adapters.File, off, length int64) (repository.Chunk, error) {
	if length == 0 {
		c, _, err := g.w.Write(ctx, nil)
		return c, err
	}
	b, err := g.pool.take(ctx)
	if err != nil {
		return repository.Chunk{}, err
	}
	defer g.pool.give(b)
	if err := g.pool.throttle(ctx, length); err != nil {
		return repository.Chunk{}, err
	}
	if err := readFull(ctx, f, b.p, off, length); err != nil {
		return repository.Chunk{}, err
	}
	g.read.Add(length)
	g.progress.Done.Add(length)
	if off > 0 && repository.IsZero(b.p[:length]) {
		return g.w.WriteZero(ctx, length)
	}
	c, fresh, err := g.w.Write(ctx, b.p[:length])
	if fresh {
		g.fresh.Add(length)
	}
	return c, err
}

// readLarge stores a file of more than a chunk, segment by segment.
func (g *grower) readLarge(ctx context.Context, in *unfinished, self adapters.Entry, f adapters.File, part *repository.PartEntry) (repository.ImageID, error) {
	size := f.Size()
	x := g.w.NewIndex(size)
	if err := g.resumeLarge(ctx, x, part); err != nil {
		return repository.ImageID{}, err
	}
	start := x.Part().Size
	if start == size {
		return x.Finish(ctx)
	}
	s := &largeSegment{g: g, f: f, start: start, length: min(repository.SegmentSize, size-start)}
	add := func() error {
		made, err := s.finish(ctx)
		if err == nil {
			err = x.Add(made)
		}
		if err == nil {
			g.sofar.grow(in, self, x.Part())
			err = g.step()
		}
		return err
	}
	for e, err := range cbt.Align(cbt.Check(f.Extents(ctx), 0, size), g.chunk, size) {
		if done := min(start-e.Offset, e.Length); done > 0 {
			e.Offset, e.Length = e.Offset+done, e.Length-done
		}
		for err == nil && e.Length > 0 {
			if e.Offset >= s.start+s.length {
				if err = add(); err == nil {
					s = &largeSegment{g: g, f: f, start: s.start + s.length, length: min(repository.SegmentSize, size-s.start-s.length)}
				}
				continue
			}
			length := min(e.Length, g.chunk-e.Offset%g.chunk)
			s.add(ctx, e.Offset, length, e.Zero)
			if e.Zero {
				g.progress.Done.Add(length)
			}
			e.Offset, e.Length = e.Offset+length, e.Length-length
		}
		if err != nil {
			s.wg.Wait()
			return repository.ImageID{}, err
		}
	}
	if err := add(); err != nil {
		return repository.ImageID{}, err
	}
	return x.Finish(ctx)
}

// resumeLarge makes what an interrupted run had read of a file the start of its index.
func (g *grower) resumeLarge(ctx context.Context, x *repository.Index, part *repository.PartEntry) error {
	if part == nil || !part.Unfinished || part.Type != adapters.RegularFile {
		return nil
	}
	done, err := g.part.OpenStart(ctx, *part)
	if err != nil {
		return baseFault(ctx, err)
	}
	defer done.Close()
	for n := range done.Segments() {
		s, _ := done.Segment(n)
		if err := x.Add(s); err != nil {
			return err
		}
	}
	g.resumed.Add(done.Size())
	g.progress.Done.Add(done.Size())
	return nil
}

// largeSegment is a segment of a file that is being stored.
type largeSegment struct {
	g             *grower
	f             adapters.File
	start, length int64
	chunks        []repository.Chunk
	data          bool

	wg   sync.WaitGroup
	mu   sync.Mutex
	errs []error
}

// add reads the next chunk of the segment, or does not if it is a hole.
func (s *largeSegment) add(ctx context.Context, off, length int64, hole bool) {
	if s.chunks == nil {
		s.chunks = make([]repository.Chunk, 0, (s.length+s.g.chunk-1)/s.g.chunk)
	}
	if hole {
		s.chunks = append(s.chunks, s.g.r.ZeroChunk(length))
		return
	}
	s.data = true
	s.chunks = append(s.chunks, repository.Chunk{})
	place := &s.chunks[len(s.chunks)-1]
	s.wg.Add(1)
	s.g.do(func() {
		c, err := s.g.readChunk(ctx, s.f, off, length)
		if *place = c; err != nil {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.errs = append(s.errs, err)
		}
	}, s.wg.Done)
}

// finish waits for the chunks and writes the segment's index.
func (s *largeSegment) finish(ctx context.Context) (repository.Segment, error) {
	s.wg.Wait()
	if err := errors.Join(s.errs...); err != nil {
		return repository.Segment{}, err
	}
	if !s.data {
		return s.g.w.WriteZeroSegment(ctx, s.length)
	}
	for i, c := range s.chunks { // a hole's chunk may be in the repository for the first time
		if n := min(s.g.chunk, s.length-int64(i)*s.g.chunk); c == s.g.r.ZeroChunk(n) {
			if _, err := s.g.w.WriteZero(ctx, n); err != nil {
				return repository.Segment{}, err
			}
		}
	}
	return s.g.w.WriteSegment(ctx, s.chunks, s.length)
}
