package backup

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"

	"stillpoint.io/stillpoint/agent/repository"
	"stillpoint.io/stillpoint/cbt/audit"
	"stillpoint.io/stillpoint/fault"
)

// distrustError says that what a backend told about changed or allocated blocks is not to be used.
type distrustError struct {
	why   string
	lied  bool // it was held against the snapshot's bytes: nothing the backend says is to be believed
	off   int64
	stale repository.Chunk // what the base has at off, of an incremental that was lied to
}

func (e *distrustError) Error() string {
	return "what the backend says about changed blocks is worth nothing: " + e.why
}

// audit submits the audit's jobs: a sample of what was not read, because the backend calls it unchanged or empty. It is
// called when everything that changed has been fed.
func (l *line) audit(ctx context.Context) error {
	if l.size == 0 {
		return nil
	}
	field := audit.Field{
		Size: l.size, Chunk: l.chunk, Listed: l.touched, Known: l.seen.has,
		Stretch: repository.SegmentSize, Coverage: l.coverage, Instant: l.instant,
	}
	if l.base != nil {
		for n := range l.base.Segments() {
			if _, zero := l.base.Segment(n); !zero {
				field.Data = append(field.Data, n)
			}
		}
	}
	for c := range field.Sample(l.rng) {
		l.seen.set(c, c+1)
		if err := l.submit(ctx, job{audit: c}); err != nil {
			return err
		}
	}
	return nil
}

// auditChunk compares a chunk that the backend did not want read, p, with what the image will have there.
func (l *line) auditChunk(ctx context.Context, c int64, p []byte) error {
	l.audited.Add(int64(len(p)))
	want, err := l.unread(ctx, c)
	if err != nil {
		return err
	}
	if want != l.r.ChunkOf(p) {
		return l.lie(c, want)
	}
	return nil
}

// unread is what the image has of a chunk that is not read: an interrupted run's, zeros if the backend says so, or else
// the base's.
func (l *line) unread(ctx context.Context, c int64) (repository.Chunk, error) {
	off, from := c*l.chunk, l.base
	switch {
	case off < l.start():
		from = l.part
	case l.base == nil || l.changed.has(c):
		return l.r.ZeroChunk(min(l.chunk, l.size-off)), nil
	}
	chunks, err := from.Chunks(ctx, int(off/repository.SegmentSize))
	if err != nil {
		return repository.Chunk{}, baseFault(ctx, err)
	}
	return chunks[off%repository.SegmentSize/l.chunk], nil
}

func (l *line) lie(c int64, want repository.Chunk) error {
	off := c * l.chunk
	length := min(l.chunk, l.size-off)
	if off < l.start() {
		return &distrustError{why: fmt.Sprintf("the %d bytes at %d are not what an interrupted run took for them", length, off), lied: true, off: off}
	}
	if l.base == nil || l.changed.has(c) {
		return &distrustError{why: fmt.Sprintf("the %d bytes at %d are data and were said to be zero", length, off), lied: true, off: off}
	}
	return &distrustError{why: fmt.Sprintf("the %d bytes at %d changed and are not among them", length, off), lied: true, off: off, stale: want}
}

// checkPlaces is how many places anywhere in the image are read back before a backup is committed, beside sampleSize
// chunks that it stored.
const checkPlaces = 8

// check is the extent check: the image as it lies in the repository against the snapshot, byte for byte, at some of the
// chunks that were stored and at random places: half anywhere, half where there is data, be it new, known before, or the
// base's. The line has ended; the snapshot is still open.
func (l *line) check(ctx context.Context, back *repository.Image) error {
	if l.size == 0 {
		return nil
	}
	b, err := newBuffer(l.buffer)
	if err != nil {
		return err
	}
	defer b.free()
	got := make([]byte, l.chunk)
	for _, off := range append(l.sample(), l.places(back)...) {
		length := min(l.chunk, l.size-off)
		if _, err := back.ReadAt(ctx, got[:length], off); err != nil {
			return fmt.Errorf("%d bytes at %d: %w", length, off, err)
		}
		if err := readFull(ctx, l.source, b.p, off, length); err != nil {
			return err
		}
		l.checked.Add(length)
		if bytes.Equal(got[:length], b.p[:length]) {
			continue
		}
		c := off / l.chunk
		if !l.seen.has(c) {
			want, err := l.unread(ctx, c)
			if err != nil {
				return err
			}
			return l.lie(c, want)
		}
		return fault.Errorf(fault.Corrupt, "the %d bytes at %d come back as something else than the snapshot has now; the snapshot changes while it is read, or memory or the remote is faulty: find out before you back up again", length, off)
	}
	return nil
}

// places draws the offsets of chunks to be read back.
func (l *line) places(back *repository.Image) []int64 {
	chunks := (l.size + l.chunk - 1) / l.chunk
	var offsets []int64
	for i := range checkPlaces {
		c := l.rng.Int64N(chunks)
		for range 64 {
			n := l.rng.IntN(back.Segments())
			if _, zero := back.Segment(n); i%2 == 0 && !zero {
				c = min(chunks-1, (int64(n)*repository.SegmentSize+l.rng.Int64N(repository.SegmentSize))/l.chunk)
				break
			}
		}
		offsets = append(offsets, c*l.chunk)
	}
	return offsets
}

// newRand is the audit's chance: nobody who writes to a volume can know what will be looked at.
func newRand(source rand.Source) *rand.Rand {
	if source == nil {
		source = rand.NewPCG(rand.Uint64(), rand.Uint64())
	}
	return rand.New(source)
}
