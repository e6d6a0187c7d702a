package backup

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/repository"
)

// Random histories of a volume, each step backed up, every backup of all steps restored and compared at the end.
func TestHistories(t *testing.T) {
	for seed := range uint64(5) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			history(t, seed)
		})
	}
}

func history(t *testing.T, seed uint64) {
	rng := rand.New(rand.NewPCG(seed, 1))
	chunk := int64(64<<10) << rng.IntN(3)
	size := func() int64 { return 1 + rng.Int64N(5*repository.SegmentSize/4) }
	w := newWorld(t, chunk, size())
	type step struct {
		report Report
		want   *model
	}
	var steps []step
	kinds := map[repository.Kind]int{}
	for range 7 {
		for range rng.IntN(6) {
			off := rng.Int64N(w.model.size)
			length := 1 + rng.Int64N(min(w.model.size-off, 5*chunk))
			switch rng.IntN(5) {
			case 0:
				w.zero(off, length)
			case 1: // zeros that no backend knows of
				w.write(make([]byte, length), off)
			case 2: // what the volume has elsewhere
				from := rng.Int64N(w.model.size - length + 1)
				w.write(w.model.read(from, length), off)
			default:
				w.write(random(rng, length), off)
			}
		}
		switch rng.IntN(8) {
		case 0:
			w.resize(size())
		case 1: // by whole chunks
			w.resize((size() + chunk - 1) / chunk * chunk)
		}
		s, want := w.cut()
		q := w.request(s)
		q.Full = rng.IntN(5) == 0
		r, err := Run(t.Context(), q)
		if err != nil {
			t.Fatal(err)
		}
		if len(r.Warnings) > 0 {
			t.Fatalf("%+v", r)
		}
		kinds[r.Kind]++
		steps = append(steps, step{r, want})
		if rng.IntN(3) == 0 && len(steps) > 1 { // some bases go
			i := rng.IntN(len(steps) - 1)
			if err := w.repo.Forget(t.Context(), backupID(t, steps[i].report.Backup)); err != nil {
				t.Fatal(err)
			}
			steps = append(steps[:i], steps[i+1:]...)
		}
		if rng.IntN(3) == 0 { // and some snapshots
			if err := w.adapter.DeleteSnapshot(t.Context(), s); err != nil {
				t.Fatal(err)
			}
		}
	}
	if kinds[repository.Full] == 0 || kinds[repository.Incremental] == 0 {
		t.Errorf("one-sided history: %v", kinds)
	}
	for i, s := range steps {
		mustEqual(t, fmt.Sprintf("image of step %d", i), w.content(s.report.Backup), s.want)
		target := adapters.VolumeID{Backend: "mem", ID: fmt.Sprintf("restored-%d", i)}
		got, err := Restore(t.Context(), RestoreRequest{Source: FromBackup(w.repo, backupID(t, s.report.Backup)), Target: w.adapter, Volume: target})
		if err != nil {
			t.Fatal(err)
		}
		if got.Size != s.want.size {
			t.Fatalf("restored %d bytes of %d", got.Size, s.want.size)
		}
		v, err := w.adapter.Volume(t.Context(), target)
		if err != nil {
			t.Fatal(err)
		}
		mustEqual(t, fmt.Sprintf("restored step %d", i), w.volumeContent(v.ID), s.want)
		if _, err := Verify(t.Context(), VerifyRequest{Repository: w.repo, ID: backupID(t, s.report.Backup)}); err != nil {
			t.Fatal(err)
		}
	}
}
