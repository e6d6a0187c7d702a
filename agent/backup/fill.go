package backup

import (
	"context"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/repository"
	"stillpoint.io/stillpoint/cbt"
	"stillpoint.io/stillpoint/fault"
)

// filler writes a source into a target: one goroutine cuts the source's extents into windows, some move them.
type filler struct {
	from     opened
	to       adapters.Target
	progress *Progress
	pool     *Pool

	written, found, zeroed atomic.Int64
}

func newFiller(q RestoreRequest, from opened, to adapters.Target) *filler {
	f := &filler{from: from, to: to, progress: q.Progress, pool: from.pool(q.Budget)}
	if f.progress == nil {
		f.progress = new(Progress)
	}
	return f
}

// run copies all of the source and zeroes the rest up to size.
func (f *filler) run(ctx context.Context, size int64) error {
	g, ctx := errgroup.WithContext(ctx)
	windows := make(chan cbt.Extent, f.pool.workers())
	g.Go(func() error {
		defer close(windows)
		for e, err := range f.from.extents {
			if err != nil {
				return err
			}
			if err := f.feed(ctx, windows, e); err != nil {
				return err
			}
		}
		if rest := size - f.from.image.Size(); rest > 0 {
			return f.feed(ctx, windows, cbt.Extent{Offset: f.from.image.Size(), Length: rest, Zero: true})
		}
		return nil
	})
	for range f.pool.workers() {
		g.Go(func() error { return f.work(ctx, windows) })
	}
	return g.Wait()
}

// feed cuts an extent into windows that end on multiples of the buffer. Zeros go in larger pieces.
func (f *filler) feed(ctx context.Context, windows chan<- cbt.Extent, e cbt.Extent) error {
	unit := f.pool.size
	if e.Zero {
		if f.to.ReadsZero() {
			return nil
		}
		unit = 1 << 30
	}
	f.progress.Total.Add(e.Length)
	for e.Length > 0 {
		part := min(e.Length, unit-e.Offset%unit)
		select {
		case windows <- cbt.Extent{Offset: e.Offset, Length: part, Zero: e.Zero}:
		case <-ctx.Done():
			return ctx.Err()
		}
		e.Offset, e.Length = e.Offset+part, e.Length-part
	}
	return nil
}

// work moves windows until there are no more.
func (f *filler) work(ctx context.Context, windows <-chan cbt.Extent) error {
	b, err := f.pool.take(ctx)
	if err != nil {
		return err
	}
	defer f.pool.give(b)
	move := f.copy
	if image, ok := f.from.image.(*repository.Image); ok {
		packed, err := newBuffer(image.ReadBuffer())
		if err != nil {
			return err
		}
		defer packed.free()
		move = (&fetcher{filler: f, image: image, in: image.NewReader(packed.p), compare: !f.to.Fresh()}).move
	}
	for e := range windows {
		if e.Zero {
			err = f.zero(ctx, e)
		} else if err = f.pool.throttle(ctx, e.Length); err == nil {
			err = move(ctx, e, b.p[:e.Length])
		}
		if err != nil {
			return err
		}
		f.progress.Done.Add(e.Length)
	}
	return nil
}

func (f *filler) zero(ctx context.Context, e cbt.Extent) error {
	f.zeroed.Add(e.Length)
	return f.to.Zero(ctx, e.Offset, e.Length)
}

func (f *filler) write(ctx context.Context, p []byte, off int64) error {
	f.written.Add(int64(len(p)))
	return f.to.WriteAt(ctx, p, off)
}

// copy moves a window of a snapshot; p has room for it.
func (f *filler) copy(ctx context.Context, e cbt.Extent, p []byte) error {
	if err := readFull(ctx, f.from.image, p[:cap(p)], e.Offset, e.Length); err != nil {
		return err
	}
	switch {
	case !repository.IsZero(p):
		return f.write(ctx, p, e.Offset)
	case !f.to.ReadsZero():
		return f.zero(ctx, e)
	}
	return nil
}

// fetcher moves windows of a backup, which are whole chunks with data. It is one worker's.
type fetcher struct {
	*filler
	image   *repository.Image
	in      *repository.Reader
	compare bool // the target may hold chunks already
	needs   []repository.Need
	offsets []int64 // of the needs
	bad     error
}

func (f *fetcher) move(ctx context.Context, e cbt.Extent, p []byte) error {
	f.needs, f.offsets = f.needs[:0], f.offsets[:0]
	for off := e.Offset; off < e.End(); {
		n, err := f.image.Need(ctx, off, p[off-e.Offset:])
		if err != nil {
			return err
		}
		held := false
		if f.compare {
			if held, err = f.held(ctx, n, off); err != nil {
				return err
			}
		}
		if !held {
			f.needs, f.offsets = append(f.needs, n), append(f.offsets, off)
		}
		off += n.Length
	}
	f.bad = nil
	if err := f.in.Read(ctx, f.needs, f.judge); err != nil {
		return err
	}
	if f.bad != nil {
		return f.bad
	}
	for i := 0; i < len(f.needs); { // what lies side by side is written at once
		start := f.offsets[i]
		end := start
		for ; i < len(f.needs) && f.offsets[i] == end; i++ {
			end += f.needs[i].Length
		}
		if err := f.write(ctx, p[start-e.Offset:end-e.Offset], start); err != nil {
			return err
		}
	}
	return nil
}

// held says that the target holds a chunk already.
func (f *fetcher) held(ctx context.Context, n repository.Need, off int64) (bool, error) {
	if err := f.to.ReadAt(ctx, n.Into, off); fault.KindOf(err) == fault.Unsupported {
		f.compare = false
		return false, nil
	} else if err != nil {
		return false, err
	}
	if !f.image.Is(n.Chunk, n.Into) {
		return false, nil
	}
	f.found.Add(n.Length)
	return true, nil
}

// judge remembers the first chunk that is not right.
func (f *fetcher) judge(_ repository.Chunk, err error) {
	if f.bad == nil {
		f.bad = err
	}
}
