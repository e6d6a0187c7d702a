package backup

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/repository"
	"stillpoint.io/stillpoint/cbt"
	"stillpoint.io/stillpoint/cbt/audit"
	"stillpoint.io/stillpoint/fault"
)

// ScrubRequest asks to look at a part of a volume, whatever its backend says of changed blocks.
type ScrubRequest struct {
	Adapter    adapters.Adapter  // must be an Opener
	Volume     adapters.VolumeID // canonical; the volume itself may be gone
	Repository *repository.Repository
	Within     time.Duration // every byte is looked at once within that time, ScrubWithin if 0
	All        bool          // look at everything now
	Budget     Budget
	Progress   *Progress // may be nil

	now time.Time // zero: the clock's
}

// ScrubWithin is how long it takes scrubs by default until they have looked at everything.
const ScrubWithin = 30 * 24 * time.Hour

// ScrubReport is what a scrub found. Counts are bytes.
type ScrubReport struct {
	Volume        string    `json:"volume"`
	Backup        string    `json:"backup"`   // the one that was held against its snapshot
	Snapshot      string    `json:"snapshot"` // that
	BytesScrubbed int64     `json:"bytes_scrubbed"`
	BytesWrong    int64     `json:"bytes_wrong"`
	Oldest        time.Time `json:"oldest"`            // since when nobody looked at some stretch of the volume
	Wrong         []string  `json:"wrong,omitempty"`   // by offset; the first hundred
	Suspect       []string  `json:"suspect,omitempty"` // handles of the backups that are marked suspect for it
	Healed        string    `json:"healed,omitempty"`  // handle of the full backup that was made for it
	Seconds       float64   `json:"seconds"`
}

// Scrub takes the newest backup of the volume whose snapshot still exists, reads from the snapshot what was looked at
// longest ago, as much as is due, and compares it with the backup. Where they differ, the backup and those that may be
// wrong with it are marked suspect, and a full backup of the snapshot is made that reads every byte; it is the next base.
// That is a report together with an error of kind Corrupt. NotFound: there is no backup whose snapshot still exists.
//
// What was compared is remembered when the scrub ends, also when it is cancelled; one that is killed is repeated.
func Scrub(ctx context.Context, q ScrubRequest) (ScrubReport, error) {
	started := time.Now()
	b, s, err := q.choose(ctx)
	if err != nil {
		return ScrubReport{}, err
	}
	report := ScrubReport{Volume: q.Volume.String(), Backup: b.Handle.String(), Snapshot: s.ID.String()}
	if b.Suspect == "" {
		if err := q.scrub(ctx, b, s, &report); err != nil {
			return ScrubReport{}, fmt.Errorf("scrubbing %s: %w", s.ID, err)
		}
	} else { // whoever found that out did not come to heal it
		report.Suspect = []string{report.Backup}
	}
	if len(report.Suspect) > 0 {
		healed, err := Run(ctx, Request{Adapter: q.Adapter, Snapshot: s.ID, Repository: q.Repository, Whole: true, Budget: q.Budget, Progress: q.Progress})
		if err != nil {
			return report, fmt.Errorf("scrubbing %s: backup %s is suspect; backing its snapshot up again: %w", s.ID, b.Handle, err)
		}
		report.Healed = healed.Backup
		if known, err := loadAudited(ctx, q.Repository, q.Volume); err == nil {
			report.Oldest = known.Coverage.Oldest()
		}
	}
	report.Seconds = time.Since(started).Seconds()
	if len(report.Suspect) > 0 {
		return report, fault.Errorf(fault.Corrupt, "backup %s differed from its snapshot; %d backups are suspect, and %s was made anew and is right", b.Handle, len(report.Suspect), report.Healed)
	}
	return report, nil
}

// choose finds the newest backup whose snapshot still exists; of several of one snapshot, one that is not suspect.
func (q ScrubRequest) choose(ctx context.Context) (repository.Backup, adapters.Snapshot, error) {
	all, err := q.Repository.Backups(ctx, repository.Filter{Volume: q.Volume})
	if err != nil {
		return repository.Backup{}, adapters.Snapshot{}, err
	}
	present := map[adapters.SnapshotID]adapters.Snapshot{}
	for s, err := range q.Adapter.Snapshots(ctx, adapters.Filter{Volume: q.Volume}) {
		if err != nil {
			return repository.Backup{}, adapters.Snapshot{}, err
		}
		present[s.ID] = s
	}
	there := func(b repository.Backup) bool {
		s, ok := present[b.Snapshot]
		return ok && isOf(b, s) && b.Form == adapters.BlockForm && s.Size == b.Size && s.State == adapters.Ready && s.Mark == adapters.Verified && b.ChunkSize == q.Repository.ChunkSize()
	}
	if len(all) > 0 && all[0].Form == adapters.TreeForm {
		return repository.Backup{}, adapters.Snapshot{}, fault.Errorf(fault.Unsupported, "volume %s is a tree of files: its backups look at every file by themselves, every %d. one", q.Volume, walkEvery)
	}
	newest := slices.IndexFunc(all, there)
	if newest < 0 {
		return repository.Backup{}, adapters.Snapshot{}, fault.Errorf(fault.NotFound, "volume %s: no backup of it in remote %q has its snapshot still in the backend, so there is nothing to compare with; keep the newest snapshot", q.Volume, q.Repository.Remote())
	}
	b := all[newest]
	for _, other := range all {
		if b.Suspect != "" && there(other) && other.Snapshot == b.Snapshot {
			b = other
		}
	}
	return b, present[b.Snapshot], nil
}

// scrub compares what is due, remembers it, and condemns what is wrong.
func (q ScrubRequest) scrub(ctx context.Context, b repository.Backup, s adapters.Snapshot, report *ScrubReport) (err error) {
	opener, ok := adapters.As[adapters.Opener](q.Adapter)
	if !ok {
		return fault.Errorf(fault.Unsupported, "backend %s cannot open snapshots", q.Volume.Backend)
	}
	known, err := loadAudited(ctx, q.Repository, q.Volume)
	if err != nil {
		return err
	}
	known.resize(s.Size, s.Created)
	now := q.now
	if now.IsZero() {
		now = time.Now()
	}
	due := q.due(known, s, now)

	image, err := q.Repository.OpenImage(ctx, b)
	if err != nil {
		return err
	}
	defer image.Close()
	source, err := opener.Open(ctx, s.ID)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, source.Close()) }()
	c := &comparer{r: q.Repository, image: image, source: source, progress: q.Progress}
	err = c.run(ctx, due, q.Budget)
	report.BytesScrubbed, report.BytesWrong, report.Wrong = c.compared.Load(), c.bytesWrong, c.words

	// What was found out counts also if the rest was not. The condemned come first: were they not all marked, the next
	// scrub has to find them again.
	last := context.WithoutCancel(ctx)
	if len(c.wrong) > 0 {
		slog.ErrorContext(ctx, "a backup differs from its snapshot: a change was missed when it was made", "backup", b.Handle.String(), "snapshot", s.ID.String(), "bytes", c.bytesWrong, "first", c.words[0])
		var condemnErr error
		if report.Suspect, condemnErr = condemn(last, q.Adapter, q.Repository, b, c.wrong, known.Coverage); condemnErr != nil {
			return errors.Join(err, condemnErr)
		}
	}
	scrubbed := now
	if err != nil {
		scrubbed = time.Time{}
	}
	put, putErr := putAudited(last, q.Repository, s, func(mark func(cbt.Extent)) {
		for _, e := range c.done {
			mark(e)
		}
	}, scrubbed)
	report.Oldest = put.Coverage.Oldest()
	return errors.Join(err, putErr)
}

// due is what to read now.
func (q ScrubRequest) due(known audited, s adapters.Snapshot, now time.Time) []cbt.Extent {
	if q.All {
		return slices.SortedFunc(known.Coverage.Stale(now.Add(time.Hour)), func(a, b cbt.Extent) int { return cmp.Compare(a.Offset, b.Offset) })
	}
	last := known.Scrubbed
	if last.IsZero() {
		last = known.Coverage.Oldest()
	}
	budget := audit.Due(known.Coverage, repository.SegmentSize, s.Created, now, last, cmp.Or(q.Within, ScrubWithin))
	return known.Coverage.Next(budget, s.Created)
}

// comparer holds a snapshot against a backup of it.
type comparer struct {
	r        *repository.Repository
	image    *repository.Image
	source   adapters.Image
	progress *Progress
	unit     int64 // bytes read at once
	pool     *Pool
	compared atomic.Int64
	done     []cbt.Extent

	mu         sync.Mutex
	wrong      []place  // the first placesMax
	words      []string // the first badMax
	bytesWrong int64
}

const (
	placesMax = 1000     // so many wrong chunks are looked for in other backups
	batch     = 16 << 30 // bytes that are compared before they count as done
)

// run compares extents, widened to whole chunks; done is what was compared, also when it fails.
func (c *comparer) run(ctx context.Context, extents []cbt.Extent, budget Budget) error {
	if c.progress == nil {
		c.progress = new(Progress)
	}
	size := c.r.ChunkSize()
	wanted := newBits((c.image.Size() + size - 1) / size)
	for _, e := range extents {
		wanted.set(e.Offset/size, (e.End()+size-1)/size)
	}
	var runs []cbt.Extent
	for from, to := range wanted.runs((c.image.Size() + size - 1) / size) {
		for at, end := from*size, min(to*size, c.image.Size()); at < end; at += batch {
			runs = append(runs, cbt.Extent{Offset: at, Length: min(end-at, batch)})
			c.progress.Total.Add(min(end-at, batch))
		}
	}
	c.unit = max(size, 1<<20)
	c.pool = newPool(budget, c.unit, c.unit+4*size, 1)
	defer c.pool.Close()
	for len(runs) > 0 {
		n, length := 0, int64(0)
		for n < len(runs) && length < batch {
			length += runs[n].Length
			n++
		}
		if err := c.batch(ctx, runs[:n]); err != nil {
			return err
		}
		c.done, runs = append(c.done, runs[:n]...), runs[n:]
	}
	return nil
}

// batch compares runs, a unit at a time.
func (c *comparer) batch(ctx context.Context, runs []cbt.Extent) error {
	g, ctx := errgroup.WithContext(ctx)
	pieces := make(chan cbt.Extent, c.pool.workers())
	g.Go(func() error {
		defer close(pieces)
		for _, e := range runs {
			for at := e.Offset; at < e.End(); {
				end := min(e.End(), at/c.unit*c.unit+c.unit)
				select {
				case pieces <- cbt.Extent{Offset: at, Length: end - at}:
				case <-ctx.Done():
					return ctx.Err()
				}
				at = end
			}
		}
		return nil
	})
	for range c.pool.workers() {
		g.Go(func() error {
			b, err := c.pool.take(ctx)
			if err != nil {
				return err
			}
			defer c.pool.give(b)
			for e := range pieces {
				if err := c.compare(ctx, b.p, e.Offset, e.Length); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return g.Wait()
}

// compare compares the chunks of a piece of a unit.
func (c *comparer) compare(ctx context.Context, p []byte, at, length int64) error {
	if err := c.pool.throttle(ctx, length); err != nil {
		return err
	}
	if err := readFull(ctx, c.source, p, at, length); err != nil {
		return err
	}
	chunks, err := c.image.Chunks(ctx, int(at/repository.SegmentSize))
	if err != nil {
		return err
	}
	size := c.r.ChunkSize()
	for off := at; off < at+length; off += size {
		n := min(size, at+length-off)
		stored := chunks[off%repository.SegmentSize/size]
		if stored != c.chunkOf(p[off-at:][:n]) {
			c.differs(place{off, stored}, n)
		}
	}
	c.compared.Add(length)
	c.progress.Done.Add(length)
	return nil
}

// chunkOf spares the hash of zeros.
func (c *comparer) chunkOf(p []byte) repository.Chunk {
	if repository.IsZero(p) {
		return c.r.ZeroChunk(int64(len(p)))
	}
	return c.r.ChunkOf(p)
}

func (c *comparer) differs(p place, length int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.bytesWrong += length
	if len(c.wrong) < placesMax {
		c.wrong = append(c.wrong, p)
	}
	if len(c.words) < badMax {
		c.words = append(c.words, fmt.Sprintf("%d bytes at %d", length, p.off))
	}
}
