package backup

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/adapters/mem"
	"stillpoint.io/stillpoint/cbt"
	"stillpoint.io/stillpoint/cbt/audit"
	"stillpoint.io/stillpoint/fault"
)

var canaryVolume = adapters.VolumeID{Backend: "mem", ID: "canary"}

// An honest backend's canary sings, on a volume that is made for it and again on the same one, and leaves no snapshot.
func TestCanarySings(t *testing.T) {
	t.Parallel()
	store := &mem.Store{Pending: 30 * time.Millisecond}
	a := store.Adapter("mem")
	for i := range 3 {
		r, err := Canary(t.Context(), CanaryRequest{Adapter: a, Volume: canaryVolume, Size: 5<<30 + 4096})
		if err != nil || len(r.Missed) > 0 || r.Made != (i == 0) || r.Size != 5<<30+4096 || r.BytesListed < r.BytesWritten || r.BytesWritten == 0 || !strings.Contains(r.Verdict, "all of") {
			t.Fatalf("%+v, %v", r, err)
		}
		left := 0
		for range a.Snapshots(t.Context(), adapters.Filter{Cutting: true}) {
			left++
		}
		if left > 0 {
			t.Errorf("%d snapshots are left", left)
		}
	}
	if err := a.Close(); err != nil {
		t.Error(err)
	}
}

// A backend that lies has a canary that does not sing, whatever the lie.
func TestCanaryDies(t *testing.T) {
	for name, c := range map[string]struct {
		lie    liar
		missed string
	}{
		"misses everything": {liar{delta: filtered(func(e cbt.Extent) (cbt.Extent, bool) { return e, false })}, "the first block"},
		"misses the last block": {liar{delta: func(d cbt.Delta) (cbt.Delta, error) {
			end := d.TargetSize
			return filtered(func(e cbt.Extent) (cbt.Extent, bool) { return e, e.End() < end })(d)
		}}, "the last block"},
		"wrong offsets past a power of two": {liar{delta: moved(256<<20, 1<<20)}, "across 2^29"},
		"an empty page in the middle": {liar{delta: filtered(func(e cbt.Extent) (cbt.Extent, bool) {
			return e, e.Offset < 1<<20 || e.Offset > 16<<20
		})}, "across 2^21"},
		"the middle of a hole": {liar{delta: filtered(func(e cbt.Extent) (cbt.Extent, bool) {
			return e, e.Offset < 700<<20 || e.Offset > 900<<20
		})}, "a block in the middle of a hole"},
		"data as zero":            {liar{delta: filtered(func(e cbt.Extent) (cbt.Extent, bool) { e.Zero = true; return e, true })}, "the first block"},
		"forgets what was zeroed": {liar{delta: filtered(func(e cbt.Extent) (cbt.Extent, bool) { return e, !e.Zero })}, "data that was zeroed"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c.lie.Adapter = new(mem.Store).Adapter("mem")
			r, err := Canary(t.Context(), CanaryRequest{Adapter: c.lie, Volume: canaryVolume})
			if fault.KindOf(err) != fault.Corrupt || !strings.Contains(strings.Join(r.Missed, "; "), c.missed) || !strings.Contains(r.Verdict, "are not among") {
				t.Errorf("%+v, %v", r, err)
			}
			if err := c.lie.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	t.Run("bytes that are not in the snapshot", func(t *testing.T) {
		t.Parallel()
		a := liar{Adapter: new(mem.Store).Adapter("mem"), open: func(i adapters.Image) adapters.Image { return stale{i} }}
		if r, err := Canary(t.Context(), CanaryRequest{Adapter: a, Volume: canaryVolume}); fault.KindOf(err) != fault.Corrupt || !strings.Contains(r.Verdict, "are not in the snapshot") {
			t.Errorf("%+v, %v", r, err)
		}
	})
}

// stale is a snapshot that has lost what lies behind its first half.
type stale struct{ adapters.Image }

func (s stale) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	n, err := s.Image.ReadAt(ctx, p, off)
	if off >= s.Size()/2 {
		clear(p[:n])
	}
	return n, err
}

// A volume that is not a canary's is left as it is, and so is one that is too small.
func TestCanaryRefuses(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 64<<10, 4<<20)
	w.write([]byte("somebody's data"), 0)
	if r, err := Canary(t.Context(), CanaryRequest{Adapter: w.adapter, Volume: w.id}); fault.KindOf(err) != fault.Invalid || !strings.Contains(err.Error(), "left alone") {
		t.Errorf("%+v, %v", r, err)
	}
	mustEqual(t, "the volume", w.volumeContent(w.id), w.model)
	if names := w.store.Names(w.volume); len(names) != 1 { // the look of this test
		t.Errorf("left: %v", names)
	}
	if _, err := Canary(t.Context(), CanaryRequest{Adapter: w.adapter, Volume: canaryVolume, Size: audit.CanaryMin - 4096}); fault.KindOf(err) != fault.Invalid {
		t.Errorf("%v", err)
	}
	if _, err := w.adapter.Volume(t.Context(), canaryVolume); fault.KindOf(err) != fault.NotFound {
		t.Errorf("a volume was made: %v", err)
	}
}

// Cancelled or broken at any call, it leaves nothing open and no snapshot, and works the next time.
func TestCanaryInterrupted(t *testing.T) {
	t.Parallel()
	for _, how := range []string{"cancelled", "failed"} {
		done := false
		for n := 1; !done; n++ {
			store := new(mem.Store)
			inner := store.Adapter("mem")
			if _, err := Canary(t.Context(), CanaryRequest{Adapter: inner, Volume: canaryVolume, Size: 2 << 20}); err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			calls := 0
			a := adapters.Decorate(inner, adapters.Layer{Around: func(ctx context.Context, c adapters.Call, do adapters.Do) error {
				if calls++; calls == n {
					if how == "failed" {
						if c.Method == "Commit" { // it closes the target also when it fails
							do(ctx, c)
						}
						return fault.Errorf(fault.Unavailable, "broken at call %d, %s", n, c.Method)
					}
					cancel()
				}
				return do(ctx, c)
			}})
			_, err := Canary(ctx, CanaryRequest{Adapter: a, Volume: canaryVolume})
			cancel()
			done = calls < n
			if done != (err == nil) || err != nil && !errors.Is(err, context.Canceled) && !errors.Is(err, fault.Unavailable) {
				// The last calls delete snapshots, which a cancel no longer stops.
				if how != "cancelled" || err != nil {
					t.Errorf("%s at call %d of %d: %v", how, n, calls, err)
				}
			}
			if how == "cancelled" { // a broken call may have been the deletion itself
				for s := range inner.Snapshots(t.Context(), adapters.Filter{Cutting: true}) {
					t.Errorf("%s at call %d: %s is left", how, n, s.ID)
				}
			}
			if r, err := Canary(t.Context(), CanaryRequest{Adapter: inner, Volume: canaryVolume}); err != nil || len(r.Missed) > 0 {
				t.Errorf("after it was %s at call %d: %+v, %v", how, n, r, err)
			}
			if err := inner.Close(); err != nil {
				t.Errorf("%s at call %d: %v", how, n, err)
			}
			if n > 500 {
				t.Fatal("it never ends")
			}
		}
	}
}
