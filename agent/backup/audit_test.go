package backup

import (
	"context"
	"math/rand/v2"
	"strings"
	"testing"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/adapters/mem"
	"stillpoint.io/stillpoint/agent/repository"
	"stillpoint.io/stillpoint/cbt"
	"stillpoint.io/stillpoint/cbt/audit"
	"stillpoint.io/stillpoint/fault"
)

// liar is an adapter whose answers go through filters. A filter that is nil changes nothing.
type liar struct {
	*mem.Adapter
	asked     func() // before the backend is asked for changed blocks
	delta     func(cbt.Delta) (cbt.Delta, error)
	allocated func(cbt.Delta) cbt.Delta
	open      func(adapters.Image) adapters.Image
}

func (l liar) Changed(ctx context.Context, base, target adapters.SnapshotID, from int64) (cbt.Delta, error) {
	if l.asked != nil {
		l.asked()
	}
	d, err := l.Adapter.Changed(ctx, base, target, from)
	if err != nil || l.delta == nil {
		return d, err
	}
	return l.delta(d)
}

func (l liar) Allocated(ctx context.Context, id adapters.SnapshotID, from int64) (cbt.Delta, error) {
	d, err := l.Adapter.Allocated(ctx, id, from)
	if err != nil || l.allocated == nil {
		return d, err
	}
	return l.allocated(d), nil
}

func (l liar) Open(ctx context.Context, id adapters.SnapshotID) (adapters.Image, error) {
	image, err := l.Adapter.Open(ctx, id)
	if err != nil || l.open == nil {
		return image, err
	}
	return l.open(image), nil
}

// Whatever a backend gets wrong about the changed blocks, the backup is right, and the report says what happened.
func TestWrongChangedBlocks(t *testing.T) {
	nothing := func(d cbt.Delta) (cbt.Delta, error) { d.Extents = cbt.Of(); return d, nil }
	for name, c := range map[string]struct {
		delta func(cbt.Delta) (cbt.Delta, error)
		words string
	}{
		"nothing changed": {nothing, "changed and are not among them"},
		"beyond the end": {func(d cbt.Delta) (cbt.Delta, error) {
			d.Extents = cbt.Of(cbt.Extent{Offset: d.TargetSize, Length: 1})
			return d, nil
		}, "extent"},
		"not ascending": {func(d cbt.Delta) (cbt.Delta, error) {
			d.Extents = cbt.Of(cbt.Extent{Offset: 1 << 20, Length: 5}, cbt.Extent{Offset: 5, Length: 5})
			return d, nil
		}, "extent"},
		"of another size": {func(d cbt.Delta) (cbt.Delta, error) { d.BaseSize--; return d, nil }, "bytes"},
		"state invalid": {func(d cbt.Delta) (cbt.Delta, error) {
			return d, fault.Errorf(fault.Unsupported, "the object map is invalid")
		}, "object map"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, 64<<10, 20<<20)
			rng := rand.New(rand.NewPCG(1, 2))
			w.write(random(rng, 10<<20), 5<<20)
			first, _ := w.cut()
			w.backup(first)
			w.write(random(rng, 3<<20), 9<<20)
			second, want := w.cut()
			q := w.request(second)
			q.Adapter = liar{Adapter: w.mem(), delta: c.delta}
			r, err := Run(t.Context(), q)
			if err != nil {
				t.Fatal(err)
			}
			if r.Kind != repository.Full || len(r.Warnings) != 1 || !strings.Contains(r.Warnings[0], c.words) || r.Base != "" {
				t.Errorf("%+v", r)
			}
			mustEqual(t, "image", w.content(r.Backup), want)
		})
	}
}

// Errors that are not the backend's word on the changed blocks stay errors.
func TestUnreachableChangedBlocks(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 64<<10, 1<<20)
	first, _ := w.cut()
	w.backup(first)
	second, _ := w.cut()
	q := w.request(second)
	q.Adapter = liar{Adapter: w.mem(), delta: func(d cbt.Delta) (cbt.Delta, error) {
		return d, fault.Errorf(fault.Unavailable, "the metadata service does not answer")
	}}
	if r, err := Run(t.Context(), q); fault.KindOf(err) != fault.Unavailable {
		t.Errorf("%+v, %v", r, err)
	}
}

// An incremental reads what changed, audits 64 MiB beside it, and stores what is new.
func TestIncrementalCounts(t *testing.T) {
	t.Parallel()
	const chunk = 64 << 10
	w := newWorld(t, chunk, 200<<20)
	rng := rand.New(rand.NewPCG(3, 4))
	w.write(random(rng, 40<<20), 0)
	first, _ := w.cut()
	full := w.backup(first)
	if full.BytesRead != 40<<20 || full.BytesNew != 40<<20 || full.BytesReused != 0 || full.BytesAudited < audit.Floor || full.BytesAudited > audit.Floor+10*chunk || full.BytesStored < 40<<20 {
		t.Errorf("%+v", full)
	}
	for i := range int64(10) {
		w.write(random(rng, 100), i*(3<<20)+777)
	}
	w.zero(39<<20, 1<<20)
	w.write(random(rng, chunk), 190<<20)
	second, want := w.cut()
	r := w.backup(second)
	if r.Kind != repository.Incremental || r.Base != full.Backup || r.BytesRead != 11*chunk || r.BytesNew != 11*chunk ||
		r.BytesReused != 39<<20-10*chunk || r.BytesAudited < audit.Floor || r.BytesAudited > audit.Floor+10*chunk || r.BytesStored > 2<<20 {
		t.Errorf("%+v", r)
	}
	mustEqual(t, "image", w.content(r.Backup), want)

	third, _ := w.cut()
	if r := w.backup(third); r.BytesRead != 0 || r.BytesNew != 0 || r.BytesReused != 39<<20+chunk {
		t.Errorf("nothing changed: %+v", r)
	}
	again := w.backup(third)
	if !again.Existed || again.Backup == "" || again.BytesRead != 0 {
		t.Errorf("the same snapshot again: %+v", again)
	}
	q := w.request(third)
	q.ID, q.Full = "by-hand", true
	r, err := Run(t.Context(), q)
	if err != nil || r.Kind != repository.Full || r.BytesNew != 0 || r.BytesReused != 39<<20+chunk || r.Backup != "backup:default/by-hand" {
		t.Errorf("a full one of known data: %+v, %v", r, err)
	}
	q.Snapshot = second
	if _, err := Run(t.Context(), q); fault.KindOf(err) != fault.Invalid {
		t.Errorf("an id of another snapshot: %v", err)
	}
}
