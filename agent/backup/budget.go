package backup

import (
	"cmp"
	"context"
	"runtime"

	"golang.org/x/time/rate"

	"stillpoint.io/stillpoint/agent/repository"
)

// Budget bounds what backups, restores and verifications use. A zero field means its default.
type Budget struct {
	Memory    int64 // bytes for buffers and for packs on their way to the repository, DefaultMemory if 0
	Workers   int   // chunks read, hashed and stored at once; 0: what the memory and the processors suggest
	Volumes   int   // how many volumes are worked on at once, each of which has packs of its own; 1 if 0
	ReadBytes int64 // bytes a second read from snapshots, or from the repository by a restore; 0: no limit
}

// DefaultMemory is the memory that a Budget gives by default, in bytes.
const DefaultMemory = 192 << 20

// What kopia takes beside the buffers, by measurements of resident memory: to store, for each worker, a pack of 20 MiB being
// written and some copies of a chunk; for each volume beyond the first, the packs that are being filled.
const volumeMemory = 40 << 20

func storeMemory(chunk int64) int64 { return 22<<20 + 3*chunk }

// workers is how many to start when each needs this much memory.
func (b Budget) workers(each int64) int {
	memory := cmp.Or(b.Memory, DefaultMemory) - int64(max(0, b.Volumes-1))*volumeMemory
	most := max(1, int(memory/each))
	if b.Workers > 0 {
		return min(b.Workers, most)
	}
	return min(max(6, 3*runtime.GOMAXPROCS(0)), 32, most)
}

// Pool is a Budget at work. Those who share one share its buffers and desks, and so its memory and parallelism, and its
// bandwidth. Whoever waits for a buffer or a desk gets one in his turn: backups that are short of nothing else get equal
// parts. Close it when nobody uses it any more.
type Pool struct {
	buffers chan buffer   // as many as there are; those without memory get it when they are first taken
	desks   chan struct{} // places to work at: what a buffer holds is hashed, packed or written at one
	size    int64         // of a buffer, bytes
	limit   *rate.Limiter
}

// StorePool is for backups into a repository.
func StorePool(b Budget, r *repository.Repository) *Pool {
	size := max(r.ChunkSize(), 1<<20)
	return newPool(b, size, (1+readAhead)*size+storeMemory(r.ChunkSize()), 1+readAhead)
}

// readAhead is how many buffers are being read or wait full for each that is being stored: enough that a disk is never
// idle while there is work for the processors, nor they while the disk has an answer on its way.
const readAhead = 2

// readPool is for restoring from a repository: for each worker a window of some chunks, what is read of their packs, and
// what it takes to unpack them.
func readPool(b Budget, r *repository.Repository) *Pool {
	const window = 4 << 20
	size := max(r.ChunkSize(), window)
	b.Workers = cmp.Or(b.Workers, readers)
	return newPool(b, size, size+r.ReadBuffer()+checkMemory(r.ChunkSize()), 1)
}

// readers is how many read a repository at once if the memory allows: more than processors need, for what is far away
// answers late.
const readers = 16

// copyPool is for copying snapshots.
func copyPool(b Budget) *Pool { return newPool(b, 1<<20, 1<<20, 1) }

// newPool has as many desks as there is memory for: each with so many buffers takes so much of it.
func newPool(b Budget, size, each int64, buffers int) *Pool {
	desks := b.workers(each)
	p := &Pool{buffers: make(chan buffer, desks*buffers), desks: make(chan struct{}, desks), size: size}
	for range cap(p.buffers) {
		p.buffers <- buffer{}
	}
	if b.ReadBytes > 0 {
		p.limit = rate.NewLimiter(rate.Limit(b.ReadBytes), int(max(size, b.ReadBytes/10)))
	}
	return p
}

// workers is how many can work at once.
func (p *Pool) workers() int { return cap(p.desks) }

// readers is how many can read ahead of them at once.
func (p *Pool) readers() int { return cap(p.buffers) - cap(p.desks) }

// take waits for a buffer and a desk, for those who read and work in one go.
func (p *Pool) take(ctx context.Context) (buffer, error) {
	b, err := p.borrow(ctx)
	if err != nil {
		return b, err
	}
	if err := p.sit(ctx); err != nil {
		p.put(b)
		return buffer{}, err
	}
	return b, nil
}

// give returns both.
func (p *Pool) give(b buffer) {
	p.rise()
	p.put(b)
}

// borrow waits for a buffer.
func (p *Pool) borrow(ctx context.Context) (buffer, error) {
	select {
	case b := <-p.buffers:
		if b.p != nil {
			return b, nil
		}
		b, err := newBuffer(p.size)
		if err != nil {
			p.buffers <- buffer{}
		}
		return b, err
	case <-ctx.Done():
		return buffer{}, ctx.Err()
	}
}

// put gives a buffer back.
func (p *Pool) put(b buffer) { p.buffers <- b }

// sit waits for a desk. Who has one needs nothing else of the pool to come to an end, so that nobody waits for ever.
func (p *Pool) sit(ctx context.Context) error {
	select {
	case p.desks <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (p *Pool) rise() { <-p.desks }

// throttle waits until n bytes more may be read; n is at most a buffer.
func (p *Pool) throttle(ctx context.Context, n int64) error {
	if p.limit == nil {
		return nil
	}
	return p.limit.WaitN(ctx, int(n))
}

// Close frees the buffers.
func (p *Pool) Close() {
	for range cap(p.buffers) {
		if b := <-p.buffers; b.p != nil {
			b.free()
		}
	}
}
