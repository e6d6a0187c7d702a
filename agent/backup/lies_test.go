package backup

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"strings"
	"sync/atomic"
	"testing"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/repository"
	"stillpoint.io/stillpoint/cbt"
	"stillpoint.io/stillpoint/fault"
)

// extentsOf lists a delta's extents.
func extentsOf(d cbt.Delta) (all []cbt.Extent) {
	for e, err := range d.Extents {
		if err != nil {
			panic(err)
		}
		all = append(all, e)
	}
	return all
}

// filtered is a delta whose extents go through f.
func filtered(f func(cbt.Extent) (cbt.Extent, bool)) func(cbt.Delta) (cbt.Delta, error) {
	return func(d cbt.Delta) (cbt.Delta, error) {
		var kept []cbt.Extent
		for _, e := range extentsOf(d) {
			if e, ok := f(e); ok {
				kept = append(kept, e)
			}
		}
		d.Extents = cbt.Of(kept...)
		return d, nil
	}
}

// moved shifts the extents that begin at from or later, and keeps them within the volume and apart.
func moved(from, by int64) func(cbt.Delta) (cbt.Delta, error) {
	return func(d cbt.Delta) (cbt.Delta, error) {
		end := int64(0)
		return filtered(func(e cbt.Extent) (cbt.Extent, bool) {
			if e.Offset >= from {
				e.Offset += by
			}
			if e.Offset < end {
				e.Offset, e.Length = end, e.End()-end
			}
			e.Length = min(e.Length, d.TargetSize-e.Offset)
			if e.Length <= 0 {
				return e, false
			}
			end = e.End()
			return e, true
		})(d)
	}
}

// The incidents, on a volume that is no larger than a sample: each is found with certainty when the backup is made, and
// the backup that is listed is right.
func TestLiesAtOnce(t *testing.T) {
	const size = 20 << 20
	for name, c := range map[string]struct {
		lie    func(w *world, base adapters.SnapshotID) liar
		resize int64 // between the backups, if not 0
		words  string
	}{
		"misses a write": {func(*world, adapters.SnapshotID) liar {
			return liar{delta: filtered(func(e cbt.Extent) (cbt.Extent, bool) { return e, e.Offset > 3<<20 || e.End() <= 2<<20 })}
		}, 0, "changed and are not among them"},
		"misses everything": {func(*world, adapters.SnapshotID) liar {
			return liar{delta: filtered(func(e cbt.Extent) (cbt.Extent, bool) { return e, false })}
		}, 0, "changed and are not among them"},
		"wrong offsets past a power of two": {func(*world, adapters.SnapshotID) liar {
			return liar{delta: moved(8<<20, 1<<20)}
		}, 0, "changed and are not among them"},
		"shifted after a resize": {func(*world, adapters.SnapshotID) liar {
			return liar{delta: moved(0, 5<<20)}
		}, size + 5<<20, "changed and are not among them"},
		"an empty page in the middle": {func(*world, adapters.SnapshotID) liar {
			return liar{delta: filtered(func(e cbt.Extent) (cbt.Extent, bool) { return e, e.Offset < 5<<20 || e.Offset > 12<<20 })}
		}, 0, "changed and are not among them"},
		"ends at an empty page": {func(*world, adapters.SnapshotID) liar {
			return liar{delta: filtered(func(e cbt.Extent) (cbt.Extent, bool) { return e, e.Offset < 5<<20 })}
		}, 0, "changed and are not among them"},
		"data as zero": {func(*world, adapters.SnapshotID) liar {
			return liar{delta: filtered(func(e cbt.Extent) (cbt.Extent, bool) { e.Zero = true; return e, true })}
		}, 0, "were said to be zero"},
		"the base's snapshot is another by now": {func(w *world, base adapters.SnapshotID) liar {
			return liar{asked: func() { w.replace(base) }}
		}, 0, "changed and are not among them"},
		"the base's snapshot is another after the answer": {func(w *world, base adapters.SnapshotID) liar {
			return liar{delta: func(d cbt.Delta) (cbt.Delta, error) { w.replace(base); return d, nil }}
		}, 0, "took the name"},
		"the base's snapshot is deleted": {func(w *world, base adapters.SnapshotID) liar {
			return liar{asked: func() { w.deleteSnapshot(base) }}
		}, 0, "not in the store"},
		"the base's snapshot is deleted after the answer": {func(w *world, base adapters.SnapshotID) liar {
			return liar{delta: func(d cbt.Delta) (cbt.Delta, error) { w.deleteSnapshot(base); return d, nil }}
		}, 0, "was deleted while"},
		"sizes of before a resize": {func(*world, adapters.SnapshotID) liar {
			return liar{delta: func(d cbt.Delta) (cbt.Delta, error) { d.TargetSize = size; return d, nil }}
		}, size + 3<<20, "the volume went from"},
		"sizes of after a shrink": {func(*world, adapters.SnapshotID) liar {
			return liar{delta: func(d cbt.Delta) (cbt.Delta, error) { d.BaseSize = size - 1<<20; return d, nil }}
		}, size - 1<<20, "the volume went from"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, 64<<10, size)
			rng := rand.New(rand.NewPCG(1, 2))
			w.write(random(rng, 10<<20), 5<<20)
			first, _ := w.cut()
			w.backup(first)
			if c.resize > 0 {
				w.resize(c.resize)
			}
			for off := int64(1 << 20); off < 15<<20; off += 3 << 19 {
				w.write(random(rng, 100), off)
			}
			second, want := w.cut()
			q := w.request(second)
			l := c.lie(w, first)
			l.Adapter = w.mem()
			q.Adapter = l
			r, err := Run(t.Context(), q)
			if err != nil {
				t.Fatal(err)
			}
			if r.Kind != repository.Full || len(r.Warnings) != 1 || !strings.Contains(r.Warnings[0], c.words) || len(r.Suspect) > 0 {
				t.Errorf("%+v", r)
			}
			mustEqual(t, "image", w.content(r.Backup), want)
		})
	}
}

// deleteSnapshot deletes a snapshot behind everybody's back.
func (w *world) deleteSnapshot(id adapters.SnapshotID) {
	if err := w.adapter.DeleteSnapshot(context.Background(), id); err != nil {
		w.t.Error(err)
	}
}

// replace gives a snapshot's name to another of the volume as it is now.
func (w *world) replace(id adapters.SnapshotID) {
	w.deleteSnapshot(id)
	s, err := w.adapter.CreateSnapshot(context.Background(), id.Volume, id.Name)
	if err == nil {
		err = w.adapter.Publish(context.Background(), s.ID, adapters.Notes{})
	}
	if err != nil {
		w.t.Error(err)
	}
}

// What is said to be empty is not believed either, in the first backup as in any other.
func TestAllocatedLies(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 64<<10, 20<<20)
	w.write(random(rand.New(rand.NewPCG(1, 2)), 10<<20), 5<<20)
	first, want := w.cut()
	q := w.request(first)
	q.Adapter = liar{Adapter: w.mem(), allocated: func(d cbt.Delta) cbt.Delta {
		d, _ = filtered(func(e cbt.Extent) (cbt.Extent, bool) { e.Length /= 2; return e, true })(d)
		return d
	}}
	r, err := Run(t.Context(), q)
	if err != nil {
		t.Fatal(err)
	}
	if r.Kind != repository.Full || len(r.Warnings) != 1 || !strings.Contains(r.Warnings[0], "were said to be zero") {
		t.Errorf("%+v", r)
	}
	mustEqual(t, "image", w.content(r.Backup), want)
}

// shifting is a snapshot whose bytes are others after some reads.
type shifting struct {
	adapters.Image
	reads, after *atomic.Int64
}

func (s shifting) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	n, err := s.Image.ReadAt(ctx, p, off)
	if s.reads.Add(1) > s.after.Load() {
		for i := range p[:n] {
			p[i] ^= 0x5a
		}
	}
	return n, err
}

// A snapshot that changes while it is read makes no backup: not when its bytes change, nor when another takes its name.
func TestSnapshotChangesUnderUs(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 64<<10, 4<<20)
	w.write(random(rand.New(rand.NewPCG(1, 2)), 4<<20), 0)
	first, _ := w.cut()
	var reads, after atomic.Int64
	after.Store(4) // the volume is read by the mebibyte
	q := w.request(first)
	q.Adapter = liar{Adapter: w.mem(), open: func(i adapters.Image) adapters.Image { return shifting{i, &reads, &after} }}
	if r, err := Run(t.Context(), q); fault.KindOf(err) != fault.Corrupt || !strings.Contains(err.Error(), "come back as something else") {
		t.Errorf("its bytes changed: %+v, %v", r, err)
	}

	w.backup(first)
	second, _ := w.cut()
	q = w.request(second)
	q.Adapter = liar{Adapter: w.mem(), delta: func(d cbt.Delta) (cbt.Delta, error) { w.replace(second); return d, nil }}
	if r, err := Run(t.Context(), q); err == nil || !errors.Is(err, fault.Corrupt) && !errors.Is(err, fault.NotFound) {
		t.Errorf("another took its name: %+v, %v", r, err)
	}
	if all, err := w.repo.Backups(t.Context(), repositoryFilter); err != nil || len(all) != 1 {
		t.Errorf("%d backups are listed, %v", len(all), err)
	}
}

// The bytes that a remote returns are compared with the snapshot's, wherever in the image: the check sees what the
// snapshot had at a place that was not read before.
func TestExtentCheckFindsLies(t *testing.T) {
	t.Parallel()
	const chunk, chunks = 64 << 10, 64
	w := newWorld(t, chunk, chunks*chunk)
	w.write(random(rand.New(rand.NewPCG(1, 2)), chunks*chunk), 0)
	first, _ := w.cut()
	b, err := w.repo.Backup(t.Context(), backupID(t, w.backup(first).Backup))
	if err != nil {
		t.Fatal(err)
	}
	image, err := w.repo.OpenImage(t.Context(), b)
	if err != nil {
		t.Fatal(err)
	}
	w.write(random(rand.New(rand.NewPCG(3, 4)), chunks*chunk), 0)
	second, _ := w.cut()
	source, err := w.mem().Open(t.Context(), second)
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()
	writer, err := w.repo.NewWriter(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer writer.Close(context.Background())
	pool := StorePool(Budget{Workers: 2}, w.repo)
	defer pool.Close()
	line := func(s adapters.SnapshotID, source adapters.Image) *line {
		q := w.request(s)
		q.Pool = pool
		return newLine(q, source, image, writer)
	}
	l := line(second, source)
	var lie *distrustError
	if err := l.check(t.Context(), image); !errors.As(err, &lie) || !lie.lied {
		t.Errorf("of the base's: %v", err)
	}
	if l.checked.Load() != chunk {
		t.Errorf("%d bytes checked", l.checked.Load())
	}
	l.seen.set(0, chunks)
	if err := l.check(t.Context(), image); errors.As(err, &lie) || fault.KindOf(err) != fault.Corrupt {
		t.Errorf("of its own: %v", err)
	}
	same, err := w.mem().Open(t.Context(), first)
	if err != nil {
		t.Fatal(err)
	}
	defer same.Close()
	l = line(first, same)
	if err := l.check(t.Context(), image); err != nil || l.checked.Load() != checkPlaces*chunk {
		t.Errorf("of what is right: %d bytes, %v", l.checked.Load(), err)
	}
}

// The audit of a real line finds a fraction f of missed chunks with the probability that package audit states, measured
// over many seeded lines.
func TestDetectionMeasured(t *testing.T) {
	t.Parallel()
	const chunk, chunks, trials = 1 << 20, 1024, 120
	w := newWorld(t, chunk, chunks*chunk)
	for off := int64(0); off < chunks*chunk; off += repository.SegmentSize { // every segment has data
		w.write([]byte("data"), off)
	}
	first, _ := w.cut()
	b, err := w.repo.Backup(t.Context(), backupID(t, w.backup(first).Backup))
	if err != nil {
		t.Fatal(err)
	}
	image, err := w.repo.OpenImage(t.Context(), b)
	if err != nil {
		t.Fatal(err)
	}
	defer image.Close()
	writer, err := w.repo.NewWriter(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer writer.Close(context.Background())
	pool := StorePool(Budget{Workers: 2}, w.repo)
	defer pool.Close()
	const n, fixed = 64, 6 // chunks of the sample, and of the superblocks and the end (64 KiB is in the first)
	for _, missed := range []int{8, 32} {
		found := 0
		for trial := range trials {
			rng := rand.New(rand.NewPCG(uint64(trial), uint64(missed)))
			bad := map[int64]bool{}
			for len(bad) < missed {
				if c := rng.Int64N(chunks); c != 0 && c != 8 && c != 64 && c != 128 && c != chunks-1 {
					bad[c] = true
				}
			}
			for c := range bad {
				w.write([]byte("missed"), c*chunk+1000)
			}
			s, _ := w.cut()
			source, err := w.mem().Open(t.Context(), s)
			if err != nil {
				t.Fatal(err)
			}
			q := w.request(s)
			q.chance, q.Pool = rng, pool
			l := newLine(q, source, image, writer)
			_, err = l.run(t.Context(), cbt.Of())
			var lie *distrustError
			switch {
			case errors.As(err, &lie):
				found++
			case err != nil:
				t.Fatal(err)
			}
			if err := source.Close(); err != nil {
				t.Fatal(err)
			}
			w.deleteSnapshot(s)
			for c := range bad {
				if err := w.volume.Zero(c*chunk+1000, 6); err != nil {
					t.Fatal(err)
				}
			}
		}
		f := float64(missed) / (chunks - fixed + 1)
		want := 1 - math.Pow(1-f, n)
		got, sigma := float64(found)/trials, math.Sqrt(want*(1-want)/trials)
		t.Logf("%d of %d chunks missed: found in %.1f %% of %d backups, 1-(1-f)^%d = %.1f %%", missed, chunks, 100*got, trials, n, 100*want)
		if got < want-4*sigma || got > want+4*sigma+0.02 { // drawn without replacement it is a little more
			t.Errorf("found in %.3f, want %.3f ± %.3f", got, want, sigma)
		}
	}
}

// Random histories with a backend that lies now and then, and scrubs now and then: in the end every backup is equal to
// its snapshot or marked suspect, never both, and a backend that does not lie is never accused.
func TestLiesNeverStand(t *testing.T) {
	caught := map[string]int{}
	for seed := range uint64(4) {
		liesNeverStand(t, seed, caught)
	}
	t.Logf("%v", caught)
	for _, how := range []string{"lies", "inline", "scrub", "suspect"} {
		if caught[how] == 0 {
			t.Errorf("nothing was counted as %q: the test shows less than it says: %v", how, caught)
		}
	}
}

func liesNeverStand(t *testing.T, seed uint64, caught map[string]int) {
	const chunk, chunks, steps = 64 << 10, 2400, 6 // 150 MiB: a sample is less than half of it
	rng := rand.New(rand.NewPCG(seed, 77))
	w := newWorld(t, chunk, chunks*chunk)
	fresh := rng.Perm(chunks) // nothing is written to twice
	type step struct {
		backup string
		want   *model
	}
	var all []step
	lied := false
	scrub := func() {
		r, err := Scrub(t.Context(), ScrubRequest{Adapter: w.adapter, Volume: w.id, Repository: w.repo, All: true})
		switch {
		case fault.KindOf(err) == fault.Corrupt:
			caught["scrub"]++
			caught["suspect"] += len(r.Suspect)
			all = append(all, step{r.Healed, all[len(all)-1].want})
			if !lied {
				t.Errorf("seed %d: accused though nothing was a lie: %+v", seed, r)
			}
		case err != nil:
			t.Fatal(err)
		}
		if _, err := Scrub(t.Context(), ScrubRequest{Adapter: w.adapter, Volume: w.id, Repository: w.repo, All: true}); err != nil {
			t.Errorf("seed %d: a second scrub: %v", seed, err)
		}
	}
	for i := range steps {
		for _, c := range fresh[:40] {
			w.write(random(rng, 50), int64(c)*chunk+int64(rng.IntN(1000)))
		}
		fresh = fresh[40:]
		s, want := w.cut()
		q := w.request(s)
		q.chance = rand.NewPCG(seed, uint64(i))
		if rng.IntN(2) == 0 && i > 0 {
			hide := rng.IntN(40)
			q.Adapter = liar{Adapter: w.mem(), delta: func(d cbt.Delta) (cbt.Delta, error) {
				k := 0
				lied = true
				caught["lies"]++
				return filtered(func(e cbt.Extent) (cbt.Extent, bool) { k++; return e, k != hide%5+1 })(d)
			}}
		}
		r, err := Run(t.Context(), q)
		if err != nil {
			t.Fatal(err)
		}
		if len(r.Warnings) > 0 {
			caught["inline"]++
			caught["suspect"] += len(r.Suspect)
			if !lied {
				t.Errorf("seed %d: accused though nothing was a lie: %+v", seed, r)
			}
		}
		all = append(all, step{r.Backup, want})
		if rng.IntN(3) == 0 {
			scrub()
		}
	}
	scrub()
	for i, s := range all {
		b, err := w.repo.Backup(t.Context(), backupID(t, s.backup))
		if err != nil {
			t.Fatal(err)
		}
		at, err := s.want.differs(t.Context(), w.content(s.backup))
		if err != nil {
			t.Fatal(err)
		}
		right := at < 0
		if !right && b.Suspect == "" {
			t.Errorf("seed %d: backup %d is wrong and nobody says so", seed, i)
		}
		if right && b.Suspect != "" { // all snapshots are there to tell
			t.Errorf("seed %d: backup %d is right and suspect: %s", seed, i, b.Suspect)
		}
	}
	if _, err := w.repo.Backup(t.Context(), backupID(t, all[len(all)-1].backup)); err != nil {
		t.Error(err)
	}
	mustEqual(t, fmt.Sprintf("seed %d: the newest", seed), w.content(all[len(all)-1].backup), w.model)
}

// What an interrupted run was told is believed no more than anything else: here it was told that nothing had changed where
// a superblock is.
func TestResumedLies(t *testing.T) {
	t.Parallel()
	const place = 8 << 20
	w := newWorld(t, 64<<10, 130<<20)
	w.write([]byte("data"), place)
	s1, _ := w.cut()
	first := w.lookup(w.backup(s1).Backup)
	w.write([]byte("more"), place)
	w.write([]byte("more"), 100<<20)
	s2, want := w.cut()
	s, err := w.adapter.Snapshot(t.Context(), s2)
	if err != nil {
		t.Fatal(err)
	}
	image, err := w.repo.OpenImage(t.Context(), first)
	if err != nil {
		t.Fatal(err)
	}
	writer, err := w.repo.NewWriter(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer writer.Close(context.Background())
	index := writer.NewIndex(s.Size)
	segment, _ := image.Segment(0)
	if err := index.Add(segment); err != nil {
		t.Fatal(err)
	}
	unfinished := repository.Backup{
		ID: DefaultID(s), Volume: w.id, Snapshot: s2, Kind: repository.Incremental, Base: first.ID, BaseImage: first.Image,
		Size: s.Size, ChunkSize: w.repo.ChunkSize(), Data: first.Data, Created: s.Created,
	}
	if err := writer.Checkpoint(t.Context(), unfinished, index.Part(), &first); err != nil {
		t.Fatal(err)
	}
	r := w.backup(s2)
	if r.BytesResumed != repository.SegmentSize || r.Kind != repository.Full || len(r.Warnings) != 1 || !strings.Contains(r.Warnings[0], "an interrupted run took") || len(r.Suspect) > 0 {
		t.Errorf("%+v", r)
	}
	mustEqual(t, "image", w.content(r.Backup), want)
	if left, err := w.repo.Checkpoints(t.Context(), repository.Filter{}); err != nil || len(left) > 0 {
		t.Errorf("left: %+v, %v", left, err)
	}
}
