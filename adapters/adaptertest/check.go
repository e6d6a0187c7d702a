package adaptertest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/cbt"
	"stillpoint.io/stillpoint/fault"
)

// patience bounds every wait for something that must happen.
const patience = 60 * time.Second

// broken fails the test with the promise that was not kept.
func broken(t testing.TB, promise, format string, args ...any) {
	t.Helper()
	t.Fatalf("broken promise: %s: %s", promise, fmt.Sprintf(format, args...))
}

// succeed fails the test on an error that a promise rules out.
func succeed(t testing.TB, promise string, err error) {
	t.Helper()
	if err != nil {
		broken(t, promise, "%v (%v)", err, fault.KindOf(err))
	}
}

// refuse demands an error of one of the kinds.
func refuse(t testing.TB, promise string, err error, kinds ...fault.Kind) {
	t.Helper()
	if err == nil || !slices.Contains(kinds, fault.KindOf(err)) {
		broken(t, promise, "got %v (%v), want an error that is %v", err, fault.KindOf(err), kinds)
	}
}

// open opens the adapter and closes it at the end of the test.
func (s *suite) open(t testing.TB) adapters.Adapter {
	t.Helper()
	a := s.Open(t)
	t.Cleanup(func() {
		if err := a.Close(); err != nil {
			t.Errorf("broken promise: Close succeeds when everything opened was closed: %v", err)
		}
	})
	return a
}

// create makes a volume and remembers what is in it.
func (s *suite) create(t testing.TB, size int64) *shadowed {
	return &shadowed{Volume: s.Create(t, size), bytes: make([]byte, size)}
}

// cut takes a snapshot of that name, still cutting, and deletes it at the end.
func (s *suite) cut(t testing.TB, a adapters.Adapter, id adapters.VolumeID, wanted string) adapters.Snapshot {
	t.Helper()
	snap, err := a.CreateSnapshot(t.Context(), id, wanted)
	succeed(t, "CreateSnapshot fixes a point in time of any volume that there is", err)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := a.DeleteSnapshot(ctx, snap.ID); err != nil {
			t.Errorf("broken promise: DeleteSnapshot removes a snapshot of ours: %v", err)
		}
	})
	return snap
}

// snap takes a snapshot, publishes it and waits until it is ready.
func (s *suite) snap(t testing.TB, a adapters.Adapter, id adapters.VolumeID, wanted string) adapters.Snapshot {
	t.Helper()
	snap := s.cut(t, a, id, wanted)
	succeed(t, "Publish turns a cutting snapshot to verified",
		a.Publish(t.Context(), snap.ID, adapters.Notes{Cut: wanted, Consistency: adapters.CrashConsistent}))
	return s.ready(t, a, snap.ID)
}

// ready waits.
func (s *suite) ready(t testing.TB, a adapters.Adapter, id adapters.SnapshotID) adapters.Snapshot {
	t.Helper()
	for end := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		snap, err := a.Snapshot(t.Context(), id)
		succeed(t, "Snapshot finds a snapshot of ours", err)
		switch {
		case snap.State == adapters.Ready:
			return snap
		case snap.State == adapters.Failed:
			broken(t, "a snapshot becomes ready", "%s failed", id)
		case time.Now().After(end):
			broken(t, "a pending snapshot becomes ready", "%s is pending after %v", id, patience)
		}
	}
}

// read reads a whole snapshot through the adapter.
func (s *suite) read(t testing.TB, a adapters.Adapter, id adapters.SnapshotID) []byte {
	t.Helper()
	o, _ := adapters.As[adapters.Opener](a)
	img, err := o.Open(t.Context(), id)
	succeed(t, "Open opens a snapshot that is ready", err)
	defer func() { succeed(t, "an image closes", img.Close()) }()
	p := make([]byte, img.Size())
	n, err := img.ReadAt(t.Context(), p, 0)
	if err != nil && err != io.EOF || n != len(p) {
		broken(t, "ReadAt reads the whole image when asked", "%d of %d bytes: %v", n, len(p), err)
	}
	return p
}

// content fails the test where two images differ.
func content(t testing.TB, promise string, got, want []byte) {
	t.Helper()
	if len(got) != len(want) {
		broken(t, promise, "%d bytes instead of %d", len(got), len(want))
	}
	if bytes.Equal(got, want) {
		return
	}
	for i := range got {
		if got[i] != want[i] {
			broken(t, promise, "the byte at %d is %#02x instead of %#02x", i, got[i], want[i])
		}
	}
}

// listed collects a listing.
func (s *suite) listed(t testing.TB, a adapters.Adapter, f adapters.Filter) map[adapters.SnapshotID]adapters.Snapshot {
	t.Helper()
	all := make(map[adapters.SnapshotID]adapters.Snapshot)
	for snap, err := range a.Snapshots(t.Context(), f) {
		succeed(t, "Snapshots lists without an error", err)
		if _, twice := all[snap.ID]; twice {
			broken(t, "a listing has every snapshot once", "%s is there twice", snap.ID)
		}
		all[snap.ID] = snap
	}
	return all
}

// collect pulls a delta through the checks that every delta must stand.
func collect(t testing.TB, d cbt.Delta, from int64) []cbt.Extent {
	t.Helper()
	const promise = "a delta is ascending, without overlap, within [from, TargetSize) and of its granularity"
	if d.Granularity < 1 {
		broken(t, promise, "granularity %d", d.Granularity)
	}
	var all []cbt.Extent
	at := from
	for e, err := range d.Extents {
		succeed(t, "a delta that is not cancelled ends without an error", err)
		switch {
		case e.Length <= 0 || e.Offset < at || e.End() > d.TargetSize:
			broken(t, promise, "extent %+v after offset %d, target of %d bytes", e, at, d.TargetSize)
		case e.Offset%d.Granularity != 0 && e.Offset != from || e.End()%d.Granularity != 0 && e.End() != d.TargetSize:
			broken(t, promise, "extent %+v is not of granularity %d", e, d.Granularity)
		}
		at = e.End()
		all = append(all, e)
	}
	return all
}

// coalesce joins neighbours, so that two streams can be compared.
func coalesce(extents []cbt.Extent) []cbt.Extent {
	var out []cbt.Extent
	for _, e := range extents {
		if n := len(out); n > 0 && out[n-1].End() == e.Offset && out[n-1].Zero == e.Zero {
			out[n-1].Length += e.Length
			continue
		}
		out = append(out, e)
	}
	return out
}

// tail is what a stream from an offset on must be.
func tail(extents []cbt.Extent, from int64) []cbt.Extent {
	var out []cbt.Extent
	for _, e := range extents {
		if e.End() > from {
			off := max(e.Offset, from)
			out = append(out, cbt.Extent{Offset: off, Length: e.End() - off, Zero: e.Zero})
		}
	}
	return out
}

// shadowed is a live volume together with what it must hold.
type shadowed struct {
	Volume
	bytes []byte
}

func (v *shadowed) write(t testing.TB, p []byte, off int64) {
	t.Helper()
	if n, err := v.WriteAt(p, off); err != nil || n != len(p) {
		t.Fatalf("the harness could not write %d bytes at %d: %d, %v", len(p), off, n, err)
	}
	copy(v.bytes[off:], p)
}

func (v *shadowed) zero(t testing.TB, off, length int64) {
	t.Helper()
	if err := v.Zero(off, length); err != nil {
		t.Fatalf("the harness could not zero %d bytes at %d: %v", length, off, err)
	}
	clear(v.bytes[off : off+length])
}

func (v *shadowed) resize(t testing.TB, size int64) {
	t.Helper()
	err := v.Resize(size)
	if errors.Is(err, errors.ErrUnsupported) {
		return
	}
	if err != nil {
		t.Fatalf("the harness could not resize to %d bytes: %v", size, err)
	}
	b := make([]byte, size)
	copy(b, v.bytes)
	v.bytes = b
}

// scribble makes n random changes: writes of random, constant and zero bytes, aligned and not; zeroed ranges.
func (v *shadowed) scribble(t testing.TB, r *rand.Rand, n int) {
	t.Helper()
	for range n {
		size := int64(len(v.bytes))
		off := r.Int64N(size)
		length := 1 + r.Int64N(min(size-off, 1<<(4+r.IntN(14))))
		if r.IntN(2) == 0 { // to whole blocks
			off = off &^ 4095
			length = min((length+4095)&^4095, size-off)
		}
		switch r.IntN(4) {
		case 0:
			v.zero(t, off, length)
		case 1:
			v.write(t, bytes.Repeat([]byte{byte(r.IntN(256))}, int(length)), off)
		default:
			v.write(t, random(r, length), off)
		}
	}
}

func random(r *rand.Rand, n int64) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(r.Uint32())
	}
	return p
}

// seeded gives a test the same random numbers in every run.
func seeded(t testing.TB) *rand.Rand {
	t.Helper()
	return rand.New(rand.NewChaCha8(sha256.Sum256([]byte(t.Name()))))
}
