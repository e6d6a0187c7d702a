package backup

import (
	"context"
	"math/rand/v2"
	"runtime"
	"testing"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/repository"
	"stillpoint.io/stillpoint/cbt"
)

// repeated is an image of one chunk over and over.
type repeated struct {
	p    []byte
	size int64
}

func (r repeated) ReadAt(_ context.Context, p []byte, off int64) (int, error) {
	return copy(p, r.p), nil
}
func (r repeated) Size() int64  { return r.size }
func (r repeated) Close() error { return nil }

// The line itself allocates nothing for a chunk: what is allocated for a chunk with data is kopia's, and for one
// without there is nothing.
func TestLineAllocations(t *testing.T) {
	const chunk = 64 << 10
	w := newWorld(t, chunk, 1<<20)
	allocations := func(p []byte, size int64) float64 {
		writer, err := w.repo.NewWriter(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer writer.Close(t.Context())
		q := Request{Repository: w.repo, Pool: StorePool(Budget{Workers: 2}, w.repo)}
		defer q.Pool.Close()
		l := newLine(q, repeated{p, size}, nil, writer)
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		ctx, end := repository.Operation(t.Context())
		defer end()
		if _, err := l.run(ctx, cbt.Of(cbt.Extent{Length: size})); err != nil {
			t.Fatal(err)
		}
		runtime.ReadMemStats(&after)
		return float64(after.Mallocs - before.Mallocs)
	}
	for name, p := range map[string][]byte{"zeros": make([]byte, 1<<20), "known data": random(rand.New(rand.NewPCG(1, 1)), 1<<20)} {
		const few, many = 64 << 20, 1 << 30
		allocations(p, few)
		fixed := allocations(p, few)
		chunks := float64((many - few) / chunk)
		each := (allocations(p, many) - fixed) / chunks
		t.Logf("%s: %.3f allocations a chunk", name, each)
		// An index content for each 1,024 chunks is in it, and whatever the runtime does meanwhile.
		if limit := map[string]float64{"zeros": 0.2, "known data": 8}[name]; each > limit && !raceDetector {
			t.Errorf("%s: %.3f allocations a chunk", name, each)
		}
	}
}

// The memory of the workers stays within the budget, and at least one of them works.
func TestBudget(t *testing.T) {
	for _, c := range []struct {
		b    Budget
		each int64
		want int
	}{
		{Budget{Workers: 3}, 1 << 20, 3},
		{Budget{Workers: 300, Memory: 64 << 20}, 16 << 20, 4},
		{Budget{Memory: 1}, 16 << 20, 1},
		{Budget{Memory: 50 << 20}, 25 << 20, 2},
	} {
		if got := c.b.workers(c.each); got != c.want {
			t.Errorf("%+v: %d workers, want %d", c.b, got, c.want)
		}
	}
	if got := (Budget{}).workers(25 << 20); got < 1 || got > DefaultMemory/(25<<20) {
		t.Errorf("%d workers by default", got)
	}
}

// The tail of a volume, the edges of segments, and volumes of next to nothing.
func TestSizes(t *testing.T) {
	t.Parallel()
	for _, size := range []int64{1, 4096, 64<<10 - 1, 64 << 10, 64<<10 + 1, repository.SegmentSize - 1, repository.SegmentSize, repository.SegmentSize + 1} {
		w := newWorld(t, 64<<10, size)
		w.write([]byte{7}, size-1)
		s, want := w.cut()
		full := w.backup(s)
		mustEqual(t, "full", w.content(full.Backup), want)
		w.write([]byte{8}, size/2)
		s, want = w.cut()
		r := w.backup(s)
		mustEqual(t, "incremental", w.content(r.Backup), want)
		if r.Kind != repository.Incremental {
			t.Errorf("%d bytes: %+v", size, r)
		}
		if _, err := Restore(t.Context(), RestoreRequest{Source: FromBackup(w.repo, backupID(t, r.Backup)), Target: w.adapter, Volume: target("v")}); err != nil {
			t.Fatal(err)
		}
		mustEqual(t, "restored", w.volumeContent(adapters.VolumeID{Backend: "mem", ID: "local/v"}), want)
	}
}
