package backup

import (
	"context"
	"fmt"
	"iter"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/repository"
	"stillpoint.io/stillpoint/fault"
)

// checker looks at the contents of backups, at each of them once however many backups share it. Segments are its unit of
// work: their chunks were stored together and lie together.
type checker struct {
	m        *repository.Medium
	quick    bool // look only whether everything is there
	workers  int
	progress *Progress

	mu       sync.Mutex
	segments map[repository.Segment]int64  // that were looked at: bytes of data in them
	broken   map[repository.Segment]string // those whose index is bad, and why
	seen     repository.ChunkSet
	bad      map[repository.Chunk]string // chunks that are not right, and why
	told     map[repository.Chunk]bool   // other contents that were reported as part of a backup
	parts    map[repository.Chunk]bool   // those of told that are bad
}

func newChecker(m *repository.Medium, quick bool, budget Budget, progress *Progress) *checker {
	if progress == nil {
		progress = new(Progress)
	}
	return &checker{
		m: m, quick: quick, progress: progress, workers: budget.workers(m.Repository().ReadBuffer() + checkMemory(m.Repository().ChunkSize())),
		segments: map[repository.Segment]int64{}, broken: map[repository.Segment]string{}, bad: map[repository.Chunk]string{},
		told: map[repository.Chunk]bool{}, parts: map[repository.Chunk]bool{},
	}
}

// checkMemory is what kopia takes to decrypt and decompress a chunk, beside the buffer of what was read: buffers of 8 or 16
// MiB that it keeps, and two copies in pieces.
func checkMemory(chunk int64) int64 { return 16<<20 + 3*chunk }

// finding is what was found out about a backup.
type finding struct {
	data  int64  // bytes of data that its index has
	read  int64  // of those, in chunks that were new
	hurts []Hurt // those of the volume's bytes by offset, then the others
}

// backup looks at everything that a backup needs. An error means that it could not.
func (c *checker) backup(ctx context.Context, b repository.Backup) (f finding, err error) {
	defer func() {
		if len(f.hurts) > 0 {
			for _, k := range c.m.Parts(ctx, b) {
				c.told[k] = true
				if _, lost := c.m.Check(ctx, k, c.quick); fault.KindOf(lost) == fault.Corrupt {
					c.parts[k] = true
				}
			}
		}
	}()
	if err := c.m.CheckDescription(ctx, b); fault.KindOf(err) == fault.Corrupt {
		f.hurts = append(f.hurts, Hurt{Part: DescriptionPart, Why: err.Error()})
	} else if err != nil {
		return f, err
	}
	if b.Form == adapters.TreeForm {
		description := f.hurts
		f, err := c.tree(ctx, b)
		f.hurts = append(f.hurts, description...)
		return f, err
	}
	image, err := c.m.OpenImage(ctx, b)
	if fault.KindOf(err) == fault.Corrupt {
		f.hurts = append([]Hurt{{Part: TopPart, Length: b.Size, Why: err.Error()}}, f.hurts...)
		c.progress.Done.Add(b.Data)
		return f, nil
	} else if err != nil {
		return f, err
	}
	defer image.Close()
	if f.read, err = c.image(ctx, image); err != nil {
		return f, err
	}
	for n := range image.Segments() {
		s, _ := image.Segment(n)
		f.data += c.segments[s]
	}
	hurts, err := c.hurts(ctx, image)
	if err != nil {
		return f, err
	}
	f.hurts = append(hurts, f.hurts...)
	if len(f.hurts) == 0 && f.data != b.Data {
		f.hurts = append(f.hurts, Hurt{Part: DescriptionPart, Why: fmt.Sprintf("the image has %d bytes of data, its description says %d", f.data, b.Data)})
	}
	return f, nil
}

// image looks at the segments that are new, and says how many bytes of data are in chunks that were.
func (c *checker) image(ctx context.Context, image *repository.Image) (int64, error) {
	var read atomic.Int64
	err := c.share(ctx, func(yield func(checkJob) bool) {
		for n := range image.Segments() {
			s, _ := image.Segment(n)
			c.mu.Lock()
			data, known := c.segments[s]
			if !known {
				c.segments[s] = 0
			}
			c.mu.Unlock()
			if known {
				c.progress.Done.Add(data)
			} else if !yield(func(ctx context.Context, w *checkWorker) error { return w.segment(ctx, image, n, &read) }) {
				return
			}
		}
	})
	return read.Load(), err
}

// checkJob is work for any worker.
type checkJob func(context.Context, *checkWorker) error

// share has the workers do jobs until all are done or one failed, and returns when none works any more.
func (c *checker) share(ctx context.Context, all iter.Seq[checkJob]) error {
	g, ctx := errgroup.WithContext(ctx)
	jobs := make(chan checkJob)
	g.Go(func() error {
		defer close(jobs)
		for j := range all {
			select {
			case jobs <- j:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		return nil
	})
	for range c.workers {
		g.Go(func() error {
			w, err := c.worker()
			if err != nil {
				return err
			}
			defer w.free()
			for j := range jobs {
				if err := j(ctx, w); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return g.Wait()
}

// checkWorker is one goroutine's.
type checkWorker struct {
	*checker
	buf   buffer
	in    *repository.Reader
	needs []repository.Need
}

func (c *checker) worker() (*checkWorker, error) {
	w := &checkWorker{checker: c}
	if c.quick {
		return w, nil
	}
	var err error
	if w.buf, err = newBuffer(c.m.Repository().ReadBuffer()); err != nil {
		return nil, err
	}
	w.in = c.m.NewReader(w.buf.p)
	return w, nil
}

func (w *checkWorker) free() {
	if w.in != nil {
		w.buf.free()
	}
}

// segment looks at one segment.
func (w *checkWorker) segment(ctx context.Context, image *repository.Image, n int, read *atomic.Int64) error {
	s, zero := image.Segment(n)
	if zero { // nobody but kopia reads it
		if err := w.m.CheckSegment(ctx, s); fault.KindOf(err) == fault.Corrupt {
			w.breaks(s, err)
		} else if err != nil {
			return err
		}
	}
	chunks, err := image.Chunks(ctx, n)
	if fault.KindOf(err) == fault.Corrupt {
		w.breaks(s, err)
		return nil
	} else if err != nil {
		return err
	}
	data := image.DataIn(n, chunks)
	w.needs = w.needs[:0]
	var fresh int64
	size := w.m.Repository().ChunkSize()
	w.mu.Lock()
	w.segments[s] = data
	for i, c := range chunks {
		if w.seen.Add(c) {
			length := min(size, s.Length-int64(i)*size)
			w.needs = append(w.needs, repository.Need{Chunk: c, Length: length})
			if c != w.m.Repository().ZeroChunk(length) {
				fresh += length
			}
		}
	}
	w.mu.Unlock()
	read.Add(fresh)
	if err := w.check(ctx); err != nil {
		return err
	}
	w.progress.Done.Add(data)
	return nil
}

func (w *checkWorker) check(ctx context.Context) error {
	if !w.quick {
		return w.in.Read(ctx, w.needs, w.spoilt)
	}
	for _, n := range w.needs {
		if err := w.m.Locate(ctx, n.Chunk); fault.KindOf(err) == fault.Corrupt {
			w.spoilt(n.Chunk, err)
		} else if err != nil {
			return err
		}
	}
	return ctx.Err()
}

func (c *checker) breaks(s repository.Segment, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.broken[s] = err.Error()
}

func (c *checker) spoilt(chunk repository.Chunk, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.bad[chunk] = err.Error()
}

// note records everything bad that was found, and the loose besides, so that the next backup stores it anew. A repository
// that cannot be written from here can be checked all the same.
func (c *checker) note(ctx context.Context, others []loose) error {
	var bad []repository.Chunk
	for k := range c.bad {
		bad = append(bad, k)
	}
	for s := range c.broken {
		bad = append(bad, s.Index())
	}
	for k := range c.parts {
		bad = append(bad, k)
	}
	for _, l := range others {
		bad = append(bad, l.chunk)
	}
	if err := c.m.NoteDamage(ctx, bad); fault.KindOf(err) != fault.Invalid {
		return err
	}
	return nil
}

// loose is a bad content that no backup was seen to refer to.
type loose struct {
	chunk repository.Chunk
	why   string
}

// rest checks the contents that no backup which was looked at refers to. Of the others it finds some for the second time;
// they are not told again.
func (c *checker) rest(ctx context.Context) ([]loose, error) {
	var mu sync.Mutex
	found := map[repository.Chunk]string{}
	work, err := c.m.Rest(ctx, &c.seen, func(k repository.Chunk, err error) {
		mu.Lock()
		defer mu.Unlock()
		found[k] = err.Error()
	})
	if err != nil {
		return nil, err
	}
	err = c.share(ctx, func(yield func(checkJob) bool) {
		for _, j := range work {
			if !yield(func(ctx context.Context, w *checkWorker) error { return j(ctx, w.in) }) {
				return
			}
		}
	})
	if err != nil {
		return nil, err
	}
	for s := range c.broken {
		c.told[s.Index()] = true
	}
	var all []loose
	for k, why := range found {
		if !c.told[k] {
			all = append(all, loose{k, why})
		}
	}
	slices.SortFunc(all, func(a, b loose) int { return strings.Compare(a.why, b.why) })
	return all, nil
}
