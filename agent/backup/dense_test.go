package backup

import (
	"context"
	"encoding/json"
	"math/rand/v2"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/adapters/mem"
	"stillpoint.io/stillpoint/agent/repository"
	"stillpoint.io/stillpoint/cbt/audit"
)

// The dense volume has 16 TiB of data without a hole. Its content repeats after a GiB, so that its base can be made of
// chunks that were hashed once; an incremental knows nothing of that.
const (
	densePeriod = 1 << 30
	denseWrites = 64 // of 1 MiB, at random places
)

type denseReport struct {
	Report
	Peak int64 // resident memory, bytes
}

// denseBase makes a backup of the dense volume's first snapshot, from one of a volume that is one period.
func denseBase(ctx context.Context, r *repository.Repository, a counted, store *mem.Store, first adapters.Snapshot) error {
	if _, err := store.CreateDense("period", densePeriod, 7); err != nil {
		return err
	}
	s, err := a.CreateSnapshot(ctx, adapters.VolumeID{Backend: "mem", ID: "local/period"}, "only")
	if err == nil {
		err = a.Publish(ctx, s.ID, adapters.Notes{})
	}
	if err == nil {
		_, err = Run(ctx, Request{Adapter: a, Snapshot: s.ID, Repository: r, ID: "period"})
	}
	if err != nil {
		return err
	}
	period, err := r.Backup(ctx, "period")
	if err != nil {
		return err
	}
	image, err := r.OpenImage(ctx, period)
	if err != nil {
		return err
	}
	defer image.Close()
	w, err := r.NewWriter(ctx)
	if err != nil {
		return err
	}
	defer w.Close(ctx)
	x := w.NewIndex(first.Size)
	for n := range int(first.Size / repository.SegmentSize) {
		segment, _ := image.Segment(n % image.Segments())
		if err := x.Add(segment); err != nil {
			return err
		}
	}
	top, err := x.Finish(ctx)
	if err != nil {
		return err
	}
	_, err = w.Commit(ctx, repository.Backup{
		ID: "base", Volume: first.ID.Volume, Snapshot: first.ID, Kind: repository.Full, Size: first.Size, ChunkSize: r.ChunkSize(), Data: first.Size,
		Created: first.Created, Started: time.Now(), Finished: time.Now(), Image: top,
	}, func(context.Context, *repository.Image) error { return nil })
	return err
}

// denseChild makes the base, or an incremental on it in a process of its own, so that its memory is its own.
func denseChild() error {
	ctx := context.Background()
	r, err := repository.Open(ctx, repository.Location{Path: os.Getenv("REPOSITORY")}, passphrase, repository.OpenOptions{Host: "test"})
	if err != nil {
		return err
	}
	store := new(mem.Store)
	v, err := store.CreateRepeating("vol", mem.SizeMax, 7, densePeriod)
	if err != nil {
		return err
	}
	a := counted{Adapter: store.Adapter("mem"), read: counter{new(atomic.Int64)}}
	cut := func(name string) (adapters.Snapshot, error) {
		s, err := a.CreateSnapshot(ctx, resumeVolume, name)
		if err == nil {
			err = a.Publish(ctx, s.ID, adapters.Notes{})
		}
		return dated(s), err
	}
	first, err := cut("first")
	if err != nil {
		return err
	}
	if os.Getenv("STEP") == "base" {
		return denseBase(ctx, r, a, store, first)
	}
	rng := rand.New(rand.NewPCG(1, 2))
	p := random(rng, 1<<20)
	for range denseWrites {
		if _, err := v.WriteAt(p, rng.Int64N(mem.SizeMax>>20)<<20); err != nil {
			return err
		}
	}
	second, err := cut("second")
	if err != nil {
		return err
	}
	var out denseReport
	if out.Report, err = Run(ctx, Request{Adapter: a, Snapshot: second.ID, Repository: r, ID: "second"}); err != nil {
		return err
	}
	if out.Peak, err = peakMemory(); err != nil {
		return err
	}
	out.Peak -= denseWrites << 20 // the volume's own
	return json.NewEncoder(os.Stdout).Encode(out)
}

// A dense volume of 16 TiB with 64 MiB of changes: an incremental reads those and what it audits, and its memory stays
// within the promise. How long it takes is in the log; `make bench` prints it.
func TestDense(t *testing.T) {
	t.Parallel()
	at := repository.Location{Path: t.TempDir()}
	if err := repository.Init(t.Context(), at, passphrase, repository.Options{}.Quick()); err != nil {
		t.Fatal(err)
	}
	if out, err := newChild(t, "dense", "REPOSITORY="+at.Path, "STEP=base").Output(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	var got denseReport
	childReport(t, &got, "dense", "REPOSITORY="+at.Path, "STEP=incremental")
	t.Logf("incremental of %d MiB on 16 TiB: %.2f s, peak %d MiB", got.BytesRead>>20, got.Seconds, got.Peak>>20)
	if got.Kind != repository.Incremental || got.BytesRead != denseWrites<<20 || got.BytesAudited > audit.Floor+int64(len(audit.Superblocks)+1)<<20 {
		t.Errorf("%+v", got)
	}
	if got.Peak > memoryMax {
		t.Errorf("peak of %d MiB", got.Peak>>20)
	}
}
