package adaptertest

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/cbt"
	"stillpoint.io/stillpoint/fault"
)

// moment is a snapshot together with what it must hold.
type moment struct {
	snap  adapters.Snapshot
	bytes []byte
}

// history changes a volume at random and snapshots it after every round. Some rounds change nothing, some resize.
func (s *suite) history(t testing.TB, a adapters.Adapter, r *rand.Rand, rounds int) []moment {
	t.Helper()
	v := s.create(t, s.Size)
	var all []moment
	for i := range rounds {
		switch i % 6 {
		case 0, 2: // 0: as it was born
		case 3:
			v.resize(t, int64(len(v.bytes))+s.Step*(1+r.Int64N(s.Size/s.Step)))
			v.scribble(t, r, 10)
		case 5:
			v.resize(t, max(s.Step, int64(len(v.bytes))-s.Step*(1+r.Int64N(s.Size/s.Step))))
			v.scribble(t, r, 2)
		default:
			v.scribble(t, r, 20)
		}
		all = append(all, moment{s.snap(t, a, v.ID(), fmt.Sprintf("moment-%d", i)), bytes.Clone(v.bytes)})
	}
	return all
}

// delta is the promise of promises: for every pair, base overwritten at the changed extents is target.
func (s *suite) delta(t *testing.T) {
	a := s.open(t)
	d, _ := adapters.As[adapters.Differ](a)
	moments := s.history(t, a, seeded(t), 7)
	for _, target := range moments {
		if target.snap.Size != int64(len(target.bytes)) {
			broken(t, "a snapshot knows the size it was taken at", "%d instead of %d", target.snap.Size, len(target.bytes))
		}
		if s.can["open"] {
			content(t, "an image is the volume at its instant", s.read(t, a, target.snap.ID), target.bytes)
		}
		allocated, err := d.Allocated(t.Context(), target.snap.ID, 0)
		succeed(t, "Allocated answers for a snapshot that is ready", err)
		verify(t, allocated, moment{}, target)
		for _, base := range moments {
			changed, err := d.Changed(t.Context(), base.snap.ID, target.snap.ID, 0)
			succeed(t, "Changed answers for any two snapshots of one volume", err)
			extents := verify(t, changed, base, target)
			if base.snap.ID == target.snap.ID && changed.Confidence == cbt.Exact && len(extents) > 0 {
				broken(t, "an exact delta of a snapshot with itself is empty", "%v", extents)
			}
		}
	}
}

// verify pulls a delta, checks it, and applies it to base; a base of no bytes and no name stands for zeros.
func verify(t testing.TB, d cbt.Delta, base, target moment) []cbt.Extent {
	t.Helper()
	name := fmt.Sprintf("%s from %q", target.snap.ID, base.snap.ID.Name)
	if d.BaseSize != int64(len(base.bytes)) || d.TargetSize != int64(len(target.bytes)) {
		broken(t, "a delta knows both sizes", "%s: %d and %d instead of %d and %d", name, d.BaseSize, d.TargetSize, len(base.bytes), len(target.bytes))
	}
	extents := collect(t, d, 0)
	image := make([]byte, len(target.bytes))
	copy(image, base.bytes)
	for _, e := range extents {
		copy(image[e.Offset:e.End()], target.bytes[e.Offset:e.End()])
		if i := bytes.IndexFunc(target.bytes[e.Offset:e.End()], func(r rune) bool { return r != 0 }); e.Zero && i >= 0 {
			broken(t, "a Zero extent reads as zeros", "%s: %+v does not at %d", name, e, e.Offset+int64(i))
		}
	}
	promise := "base overwritten with the target's bytes at the changed extents equals target"
	if base.snap.ID.Name == "" {
		promise = "what Allocated does not mention is zero"
	}
	content(t, promise+" ("+name+")", image, target.bytes)
	for _, e := range extents {
		if e.End() > d.BaseSize && e.Offset < d.BaseSize && base.snap.ID.Name != "" && d.TargetSize <= d.BaseSize {
			broken(t, "a delta ends at TargetSize", "%s: %+v", name, e)
		}
	}
	if base.snap.ID.Name != "" && d.TargetSize > d.BaseSize {
		at := d.BaseSize
		for _, e := range tail(extents, d.BaseSize) {
			if e.Offset > at {
				break
			}
			at = e.End()
		}
		if at < d.TargetSize {
			broken(t, "bytes between BaseSize and TargetSize count as changed", "%s: those at %d do not", name, at)
		}
	}
	return extents
}

// resume starts the same streams at many offsets.
func (s *suite) resume(t *testing.T) {
	a, r := s.open(t), seeded(t)
	d, _ := adapters.As[adapters.Differ](a)
	moments := s.history(t, a, r, 5)
	first, last := moments[1].snap, moments[len(moments)-1].snap
	for what, ask := range map[string]func(from int64) (cbt.Delta, error){
		"Allocated": func(from int64) (cbt.Delta, error) { return d.Allocated(t.Context(), last.ID, from) },
		"Changed":   func(from int64) (cbt.Delta, error) { return d.Changed(t.Context(), first.ID, last.ID, from) },
	} {
		promise := what + " from an offset is the tail of the whole"
		delta, err := ask(0)
		succeed(t, promise, err)
		whole := collect(t, delta, 0)
		if len(whole) == 0 {
			t.Fatalf("the test's volume has nothing to resume")
		}
		offsets := []int64{0, 1, last.Size - 1, last.Size}
		for _, e := range whole {
			offsets = append(offsets, e.Offset, e.Offset+e.Length/2, e.End()-1, e.End())
		}
		for range 20 {
			offsets = append(offsets, r.Int64N(last.Size))
		}
		for _, from := range offsets {
			delta, err := ask(from)
			succeed(t, promise, err)
			got, want := coalesce(collect(t, delta, from)), coalesce(tail(whole, from))
			if !slices.Equal(got, want) {
				broken(t, promise, "from %d: %v instead of %v", from, got, want)
			}
		}
		delta, err = ask(0)
		succeed(t, promise, err)
		for range delta.Extents {
			break // leaving early must release what the stream holds: Close and DeleteSnapshot show it
		}
	}
}

// deletion removes snapshots in any order and looks at the rest every time.
func (s *suite) deletion(t *testing.T) {
	a, r := s.open(t), seeded(t)
	d, _ := adapters.As[adapters.Differ](a)
	moments := s.history(t, a, r, 5)
	for _, i := range []int{2, 0, 2, 0} { // the middle one, the oldest, the newest, the last that is left
		succeed(t, "snapshots are deleted in any order", a.DeleteSnapshot(t.Context(), moments[i].snap.ID))
		moments = slices.Delete(moments, i, i+1)
		for _, target := range moments {
			for _, base := range moments {
				delta, err := d.Changed(t.Context(), base.snap.ID, target.snap.ID, 0)
				succeed(t, "the deletion of a snapshot leaves the deltas of the others right", err)
				verify(t, delta, base, target)
			}
			delta, err := d.Allocated(t.Context(), target.snap.ID, 0)
			succeed(t, "the deletion of a snapshot leaves what others hold right", err)
			verify(t, delta, moment{}, target)
		}
	}
}

func (s *suite) deltaErrors(t *testing.T) {
	a, v, w := s.open(t), s.create(t, s.Size), s.create(t, s.Size)
	d, _ := adapters.As[adapters.Differ](a)
	one, two := s.snap(t, a, v.ID(), "one"), s.snap(t, a, w.ID(), "two")
	_, err := d.Changed(t.Context(), one.ID, two.ID, 0)
	refuse(t, "snapshots of two volumes cannot be compared", err, fault.Invalid)
	for _, from := range []int64{-1, s.Size + 1} {
		_, err = d.Changed(t.Context(), one.ID, one.ID, from)
		refuse(t, "from lies within the snapshot", err, fault.Invalid)
		_, err = d.Allocated(t.Context(), one.ID, from)
		refuse(t, "from lies within the snapshot", err, fault.Invalid)
	}
	missing := adapters.SnapshotID{Volume: one.ID.Volume, Name: "missing"}
	_, err = d.Changed(t.Context(), missing, one.ID, 0)
	refuse(t, "a base that is not there is NotFound", err, fault.NotFound)
}
