package backup

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/semaphore"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/repository"
	"stillpoint.io/stillpoint/cbt"
	"stillpoint.io/stillpoint/cbt/audit"
	"stillpoint.io/stillpoint/fault"
)

// A line is the production line of a backup: one goroutine feeds it with extents, some read them, some hash and store
// what was read, one writes the index. Everything moves through channels of a fixed length. A segment's chunk list is
// filled by whoever works on its jobs, each at a place of its own; when the last of them is done the segment goes to
// the index, in order.
type line struct {
	r        *repository.Repository
	w        *repository.Writer
	source   adapters.Image
	base     *repository.Image // nil for a full backup
	progress *Progress
	pool     *Pool
	chunk    int64
	size     int64
	buffer   int64 // bytes a worker reads at once

	part   *repository.Image // what an interrupted run had done; nil: nothing
	index  *repository.Index
	keeper keeper

	jobs   chan job
	loads  chan load
	pieces chan piece
	window *semaphore.Weighted // bytes that may be read before they are in the index
	free   sync.Pool           // of *segment

	read, audited, fresh atomic.Int64
	data                 int64 // in chunks that are not all zero

	changed bits  // chunks that the backend listed, as data or zero
	seen    bits  // chunks that were read from the snapshot
	touched int64 // bytes listed, of an incremental
	listed  int64 // and of those, bytes that the base has too

	rng      *rand.Rand // of the audit and the check; the feeder's, then the check's
	coverage *audit.Coverage
	instant  time.Time // of the snapshot
	checked  atomic.Int64

	mu      sync.Mutex
	samples [sampleSize]int64 // offsets of chunks stored, a random choice
	stored  int
}

// sampleSize is how many of the stored chunks are read back before a backup is committed.
const sampleSize = 8

// job is a piece of work: chunks to read and store, a base's chunk list to get, or a chunk to audit.
type job struct {
	segment      *segment // nil: audit the chunk
	first, count int      // chunks of the segment; count 0: get the base's list
	audit        int64    // the chunk's number
}

// load is a job whose bytes were read.
type load struct {
	job
	buffer
}

// segment is being made from a base's chunks and new ones.
type segment struct {
	n      int
	length int64
	fed    int64              // bytes of its jobs
	chunks []repository.Chunk // zero where the base's counts
	base   []repository.Chunk // shared with the base's image: not to be changed
	left   atomic.Int32       // jobs, and one for the feeder
	done   chan struct{}
}

// piece is what goes to the index next: a segment that was made, or a run of the base's or of all-zero ones.
type piece struct {
	made        *segment
	first, last int // [first, last)
	zero        bool
}

func newLine(q Request, source adapters.Image, base *repository.Image, w *repository.Writer) *line {
	l := &line{
		r: q.Repository, w: w, source: source, base: base, progress: q.Progress, pool: q.Pool,
		chunk: q.Repository.ChunkSize(), size: source.Size(), buffer: q.Pool.size, index: w.NewIndex(source.Size()),
	}
	if l.progress == nil {
		l.progress = new(Progress)
	}
	chunks := (l.size + l.chunk - 1) / l.chunk
	l.changed, l.seen, l.rng = newBits(chunks), newBits(chunks), newRand(q.chance)
	if base != nil {
		l.data = base.Data()
	}
	l.jobs, l.loads, l.pieces = make(chan job, l.pool.readers()), make(chan load), make(chan piece, 2*l.pool.workers())
	// Enough for one whole segment, and for everybody to go on with the next: what is in it is lost to a checkpoint.
	l.window = semaphore.NewWeighted(repository.SegmentSize + int64(2*l.pool.workers()+l.pool.readers())*l.buffer)
	l.free.New = func() any {
		return &segment{chunks: make([]repository.Chunk, 0, repository.SegmentSize/l.chunk), done: make(chan struct{}, 1)}
	}
	return l
}

// resume continues where a checkpoint ends.
func (l *line) resume(ctx context.Context, c repository.Checkpoint) (err error) {
	if l.part, err = l.r.OpenPart(ctx, c); err != nil {
		return err
	}
	for n := range l.part.Segments() {
		s, _ := l.part.Segment(n)
		if err := l.index.Add(s); err != nil {
			return err
		}
	}
	l.data, l.keeper.kept = c.Data, c.Done
	return nil
}

// start is the first byte that is still to be done.
func (l *line) start() int64 {
	if l.part == nil {
		return 0
	}
	return l.part.Size()
}

// run makes the image. If it does not come to its end, a last checkpoint keeps what was done.
func (l *line) run(ctx context.Context, extents cbt.Seq) (repository.ImageID, error) {
	for _, length := range []int64{min(l.chunk, l.size), l.size % l.chunk} {
		if length > 0 {
			if _, err := l.w.WriteZero(ctx, length); err != nil {
				return repository.ImageID{}, err
			}
		}
	}
	var image repository.ImageID
	outer := ctx
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		defer close(l.jobs)
		defer close(l.pieces)
		f := feeder{line: l, ctx: ctx, next: int(l.start() / repository.SegmentSize)}
		if err := f.feed(extents); err != nil {
			return err
		}
		return l.audit(ctx)
	})
	g.Go(func() (err error) {
		image, err = l.finish(ctx)
		return err
	})
	g.Go(func() error {
		defer close(l.loads)
		readers, ctx := errgroup.WithContext(ctx)
		for range l.pool.readers() {
			readers.Go(func() error { return l.readAll(ctx) })
		}
		return readers.Wait()
	})
	for range l.pool.workers() {
		g.Go(func() error { return l.storeAll(ctx) })
	}
	err := g.Wait()
	for f := range l.loads { // of a line that was stopped
		l.pool.put(f.buffer)
	}
	if _, distrusted := errors.AsType[*distrustError](err); err != nil && !distrusted && fault.KindOf(err) != fault.Corrupt {
		err = errors.Join(err, l.keeper.last(outer, l.index.Part().Size))
	}
	return image, err
}

// readAll reads what the jobs ask for, as long as there are jobs.
func (l *line) readAll(ctx context.Context) error {
	for j := range l.jobs {
		if j.segment != nil && j.count == 0 {
			if err := l.recall(ctx, j.segment); err != nil {
				return err
			}
			continue
		}
		b, err := l.pool.borrow(ctx)
		if err != nil {
			return err
		}
		off, length := l.place(j)
		if err = l.fill(ctx, b.p, off, length); err == nil {
			select {
			case l.loads <- load{j, b}:
				continue
			case <-ctx.Done():
				err = ctx.Err()
			}
		}
		l.pool.put(b)
		return err
	}
	return nil
}

// storeAll does the jobs whose bytes were read.
func (l *line) storeAll(ctx context.Context) error {
	for f := range l.loads {
		err := l.pool.sit(ctx)
		if err == nil {
			err = l.work(ctx, f.job, f.p)
			l.pool.rise()
		}
		l.pool.put(f.buffer)
		if err != nil {
			return err
		}
	}
	return nil
}

func (l *line) segments() int {
	return int((l.size + repository.SegmentSize - 1) / repository.SegmentSize)
}

func (l *line) bounds(n int) (start, length int64) {
	start = int64(n) * repository.SegmentSize
	return start, min(repository.SegmentSize, l.size-start)
}

func (l *line) submit(ctx context.Context, j job) error {
	select {
	case l.jobs <- j:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// finished counts down the work on a segment.
func (l *line) finished(s *segment) {
	if s.left.Add(-1) == 0 {
		s.done <- struct{}{}
	}
}

// place is what a job reads.
func (l *line) place(j job) (off, length int64) {
	if j.segment == nil {
		off = j.audit * l.chunk
		return off, min(l.chunk, l.size-off)
	}
	start, _ := l.bounds(j.segment.n)
	first := int64(j.first) * l.chunk
	return start + first, min(int64(j.count)*l.chunk, j.segment.length-first)
}

// recall gets the base's list of a segment's chunks.
func (l *line) recall(ctx context.Context, s *segment) (err error) {
	if s.base, err = l.base.Chunks(ctx, s.n); err != nil {
		return baseFault(ctx, err)
	}
	l.finished(s)
	return nil
}

// work does a job with what was read for it.
func (l *line) work(ctx context.Context, j job, p []byte) error {
	at, length := l.place(j)
	if j.segment == nil {
		return l.auditChunk(ctx, j.audit, p[:length])
	}
	s := j.segment
	l.read.Add(length)
	for i := range j.count {
		n := s.chunkLength(j.first+i, l.chunk)
		q := p[int64(i)*l.chunk:][:n]
		if repository.IsZero(q) {
			s.chunks[j.first+i] = l.r.ZeroChunk(n)
			continue
		}
		c, fresh, err := l.w.Write(ctx, q)
		if err != nil {
			return err
		}
		s.chunks[j.first+i] = c
		if fresh {
			l.fresh.Add(n)
			l.offer(at + int64(i)*l.chunk)
		}
	}
	l.progress.Done.Add(length)
	l.finished(s)
	return nil
}

// fill reads from the snapshot, within the bandwidth.
func (l *line) fill(ctx context.Context, p []byte, off, length int64) error {
	if err := l.pool.throttle(ctx, length); err != nil {
		return err
	}
	return readFull(ctx, l.source, p, off, length)
}

// readFull reads length bytes at off into p, which has room for a whole number of blocks.
func readFull(ctx context.Context, from adapters.Image, p []byte, off, length int64) error {
	padded := (length + adapters.ImageAlign - 1) / adapters.ImageAlign * adapters.ImageAlign
	n, err := from.ReadAt(ctx, p[:padded], off)
	if int64(n) >= length {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = fault.Errorf(fault.Corrupt, "it ends at %d instead of %d or later", off+int64(n), off+length)
	}
	return err
}

// offer considers a stored chunk for the sample: every one has the same chance.
func (l *line) offer(off int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.stored++
	if l.stored <= sampleSize {
		l.samples[l.stored-1] = off
	} else if i := rand.IntN(l.stored); i < sampleSize {
		l.samples[i] = off
	}
}

// sample is what to read back.
func (l *line) sample() []int64 { return l.samples[:min(l.stored, sampleSize)] }

// finish writes the segments in order, and counts the data in them.
func (l *line) finish(ctx context.Context) (repository.ImageID, error) {
	err := l.collect(ctx)
	if err = errors.Join(err, l.keeper.wait()); err != nil {
		return repository.ImageID{}, err
	}
	if l.base != nil {
		for n := l.segments(); n < l.base.Segments(); n++ { // cut off
			if err := l.forget(ctx, n); err != nil {
				return repository.ImageID{}, err
			}
		}
	}
	return l.index.Finish(ctx)
}

// collect takes the pieces as they come, and checkpoints between them.
func (l *line) collect(ctx context.Context) error {
	for p := range l.pieces {
		if err := l.add(ctx, p); err != nil {
			return err
		}
		if err := l.keeper.step(ctx, l.index.Part().Size, l.read.Load()); err != nil {
			return err
		}
	}
	return ctx.Err()
}

func (l *line) add(ctx context.Context, p piece) error {
	switch {
	case p.made != nil:
		return l.addMade(ctx, p.made)
	case p.zero:
		var s repository.Segment
		for n := p.first; n < p.last; n++ {
			if l.base != nil && n < l.base.Segments() {
				if err := l.forget(ctx, n); err != nil {
					return err
				}
			}
			if _, length := l.bounds(n); length != s.Length {
				var err error
				if s, err = l.w.WriteZeroSegment(ctx, length); err != nil {
					return err
				}
			}
			if err := l.index.Add(s); err != nil {
				return err
			}
		}
	default:
		for n := p.first; n < p.last; n++ {
			s, _ := l.base.Segment(n)
			if err := l.index.Add(s); err != nil {
				return err
			}
		}
	}
	return nil
}

// forget takes the base's n-th segment out of the count of data.
func (l *line) forget(ctx context.Context, n int) error {
	if _, zero := l.base.Segment(n); zero {
		return nil
	}
	chunks, err := l.base.Chunks(ctx, n)
	if err != nil {
		return baseFault(ctx, err)
	}
	l.data -= l.base.DataIn(n, chunks)
	return nil
}

// addMade waits for a segment's jobs and writes its index.
func (l *line) addMade(ctx context.Context, s *segment) error {
	select {
	case <-s.done:
	case <-ctx.Done():
		return ctx.Err()
	}
	if s.base != nil {
		l.data -= l.base.DataIn(s.n, s.base)
	}
	for i, c := range s.chunks {
		if c == (repository.Chunk{}) {
			if i >= len(s.base) {
				return fmt.Errorf("nothing is known of the chunk at %d", int64(s.n)*repository.SegmentSize+int64(i)*l.chunk)
			}
			c = s.base[i]
			s.chunks[i] = c
		}
		if n := s.chunkLength(i, l.chunk); c != l.r.ZeroChunk(n) {
			l.data += n
		}
	}
	made, err := l.w.WriteSegment(ctx, s.chunks, s.length)
	if err != nil {
		return err
	}
	l.window.Release(s.fed)
	l.free.Put(s)
	return l.index.Add(made)
}
