package adaptertest

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

func (s *suite) capabilities(t *testing.T) {
	c := adapters.CapabilitiesOf(s.open(t))
	for what, text := range map[string]string{"Quiesce": c.Quiesce, "Changed": c.Changed, "PointInTime": c.PointInTime} {
		if strings.TrimSpace(text) == "" {
			broken(t, "an adapter says in words what it can", "Capabilities.%s is empty", what)
		}
	}
}

func (s *suite) volumes(t *testing.T) {
	a, v := s.open(t), s.create(t, s.Size)
	const promise = "Volume finds a volume by a typed id and answers with the canonical one"
	vol, err := a.Volume(t.Context(), v.ID())
	succeed(t, promise, err)
	if vol.Size != s.reported {
		broken(t, "Volume tells the size in bytes", "%d instead of %d", vol.Size, s.reported)
	}
	again, err := a.Volume(t.Context(), vol.ID)
	succeed(t, promise, err)
	if again.ID != vol.ID || vol.ID.Backend != s.Backend {
		broken(t, promise, "%v is canonical for %v, and %v for that", vol.ID, v.ID(), again.ID)
	}
	h, err := adapters.ParseHandle(vol.ID.String())
	if err != nil || h.Volume != vol.ID {
		broken(t, "a canonical id survives its handle", "%q reads as %+v, %v", vol.ID.String(), h, err)
	}
	snap := s.cut(t, a, v.ID(), "typed")
	if snap.ID.Volume != vol.ID {
		broken(t, "only canonical ids appear in handles", "snapshot %v of volume %v", snap.ID, vol.ID)
	}
	for _, id := range s.Wrong {
		_, err := a.Volume(t.Context(), adapters.VolumeID{Backend: s.Backend, ID: id})
		refuse(t, fmt.Sprintf("an id that can not be one is Invalid: %q", id), err, fault.Invalid)
	}
}

func (s *suite) list(t *testing.T) {
	a := s.open(t)
	s.create(t, s.Size)
	l, _ := adapters.As[adapters.Lister](a)
	for vol, err := range l.Volumes(t.Context()) {
		succeed(t, "Volumes lists without an error", err)
		again, err := a.Volume(t.Context(), vol.ID)
		succeed(t, "a listed volume can be looked up", err)
		if again.ID != vol.ID {
			broken(t, "listed ids are canonical", "%v instead of %v", vol.ID, again.ID)
		}
	}
}

func (s *suite) names(t *testing.T) {
	a, v := s.open(t), s.create(t, s.Size)
	for _, wanted := range []string{
		"a", strings.Repeat("n", adapters.NameMax), strings.Repeat("n", adapters.NameMax+1), strings.Repeat("n", 128),
		"Upper.Case_and dots", "..", "../../x", "a/b", "with@at%and%40", "two\nlines", strings.Repeat("ü", 64), "雪\u202e",
		"snapshot-0b3ad2dc-2c15-4c1b-9a9c-7f2d3c1ad6f4",
	} {
		snap := s.cut(t, a, v.ID(), wanted)
		if snap.Wanted != wanted || snap.ID.Name != adapters.Name(wanted) {
			broken(t, "any non-empty name of up to 128 bytes can be wanted, and is kept", "%q became %q, kept as %q", wanted, snap.ID.Name, snap.Wanted)
		}
		if h := snap.ID.String(); len(h) > adapters.HandleMax {
			broken(t, "a handle has at most 128 bytes", "%q has %d", h, len(h))
		}
		found, err := s.open(t).Snapshot(t.Context(), snap.ID)
		succeed(t, "another process finds the snapshot", err)
		if found.Wanted != wanted || found.ID != snap.ID {
			broken(t, "the wanted name is kept as a tag", "%q instead of %q", found.Wanted, wanted)
		}
	}
	long := strings.Repeat("n", 128)
	_, err := a.CreateSnapshot(t.Context(), v.ID(), adapters.Name(long))
	refuse(t, "a name taken by another wanted name is Busy", err, fault.Busy)
	_, err = a.CreateSnapshot(t.Context(), v.ID(), "")
	refuse(t, "an empty wanted name is Invalid", err, fault.Invalid)
}

// life walks one snapshot through its states, twice at every step, from more than one process.
func (s *suite) life(t *testing.T) {
	a, b, v := s.open(t), s.open(t), s.create(t, s.Size)
	v.scribble(t, seeded(t), 8)
	before := time.Now().Add(-24 * time.Hour) // the backend's clock is not ours

	const again = "CreateSnapshot of a name that exists returns it as it is"
	first := s.cut(t, a, v.ID(), "life")
	if first.Mark != adapters.Cutting || first.Size != s.reported || first.Created.Before(before) {
		broken(t, "a new snapshot is cutting and knows its size and age", "%+v", first)
	}
	want := append([]byte(nil), v.bytes...)
	v.scribble(t, seeded(t), 8)
	for _, x := range []adapters.Adapter{a, b} {
		second := s.cut(t, x, v.ID(), "life")
		if second.ID != first.ID || !second.Created.Equal(first.Created) || second.Mark != adapters.Cutting {
			broken(t, again, "%+v instead of %+v", second, first)
		}
		if _, ok := s.listed(t, x, adapters.Filter{})[first.ID]; ok {
			broken(t, "Snapshots skips those still cutting", "%s is listed", first.ID)
		}
		if _, ok := s.listed(t, x, adapters.Filter{Volume: first.ID.Volume, Cutting: true})[first.ID]; !ok {
			broken(t, "Snapshots lists cutting ones when asked", "%s is not listed", first.ID)
		}
	}

	notes := adapters.Notes{Cut: "one", Consistency: adapters.CrashConsistent, Unverified: []string{"dm-3 keeps no write counters", "ü"}}
	succeed(t, "Publish turns a cutting snapshot to verified", a.Publish(t.Context(), first.ID, notes))
	succeed(t, "publishing twice is success", b.Publish(t.Context(), first.ID, notes))
	notes.Cut, notes.Consistency = "two", adapters.FilesystemConsistent
	succeed(t, "publishing twice is success", b.Publish(t.Context(), first.ID, notes))
	for _, x := range []adapters.Adapter{a, b, s.open(t)} {
		found := s.ready(t, x, first.ID)
		if found.Mark != adapters.Verified || fmt.Sprint(found.Notes) != fmt.Sprint(notes) || !found.Created.Equal(first.Created) {
			broken(t, "Publish stores the notes, and the second ones win", "%+v instead of %+v", found, notes)
		}
		listed, ok := s.listed(t, x, adapters.Filter{Volume: first.ID.Volume})[first.ID]
		if !ok || listed.Mark != adapters.Verified || fmt.Sprint(listed.Notes) != fmt.Sprint(notes) || listed.Wanted != "life" {
			broken(t, "Snapshots lists verified ones with all that Snapshot tells", "listed %v: %+v", ok, listed)
		}
		if second := s.cut(t, x, v.ID(), "life"); second.Mark != adapters.Verified || !second.Created.Equal(first.Created) {
			broken(t, again, "%+v instead of %+v", second, found)
		}
	}
	if s.can["open"] {
		content(t, "what is written after CreateSnapshot is not in the snapshot", s.read(t, b, first.ID), want)
	}

	other := s.create(t, s.Size)
	s.snap(t, a, other.ID(), "life")
	for id := range s.listed(t, a, adapters.Filter{Volume: first.ID.Volume, Cutting: true}) {
		if id.Volume != first.ID.Volume {
			broken(t, "a listing by volume has only that volume's", "%s is listed for %s", id, first.ID.Volume)
		}
	}

	for _, x := range []adapters.Adapter{b, a, a} {
		succeed(t, "deleting what does not exist is success", x.DeleteSnapshot(t.Context(), first.ID))
		_, err := x.Snapshot(t.Context(), first.ID)
		refuse(t, "a deleted snapshot is NotFound", err, fault.NotFound)
		refuse(t, "publishing what does not exist is NotFound", x.Publish(t.Context(), first.ID, notes), fault.NotFound)
	}
	if anew := s.cut(t, a, v.ID(), "life"); anew.Mark != adapters.Cutting || anew.Notes.Cut != "" {
		broken(t, "a deleted name is free again, and remembers nothing", "%+v", anew)
	}
	succeed(t, "DeleteSnapshot removes a snapshot that is cutting", b.DeleteSnapshot(t.Context(), first.ID))
}

func (s *suite) foreign(t *testing.T) {
	if s.Foreign == nil {
		t.Skip("not tested: the harness makes no foreign snapshots")
	}
	a, v := s.open(t), s.create(t, s.Size)
	ours := s.snap(t, a, v.ID(), "ours")
	s.Foreign(t, v.Volume, "theirs")
	id := adapters.SnapshotID{Volume: ours.ID.Volume, Name: "theirs"}
	for range 2 { // the second time shows that the first harmed nothing
		for found := range s.listed(t, a, adapters.Filter{Cutting: true}) {
			if found == id {
				broken(t, "an unmarked snapshot is never listed", "%s is", id)
			}
		}
		_, err := a.Snapshot(t.Context(), id)
		refuse(t, "an unmarked snapshot is NotFound", err, fault.NotFound)
		refuse(t, "an unmarked snapshot is never published", a.Publish(t.Context(), id, adapters.Notes{}), fault.NotFound, fault.Invalid)
		refuse(t, "an unmarked snapshot is never deleted, and that is said", a.DeleteSnapshot(t.Context(), id), fault.Invalid)
		_, err = a.CreateSnapshot(t.Context(), v.ID(), "theirs")
		refuse(t, "a name taken by something that is not ours is Busy", err, fault.Busy)
		if o, ok := adapters.As[adapters.Opener](a); ok {
			_, err = o.Open(t.Context(), id)
			refuse(t, "an unmarked snapshot is never opened", err, fault.NotFound, fault.Invalid)
		}
		if d, ok := adapters.As[adapters.Differ](a); ok {
			_, err = d.Changed(t.Context(), id, ours.ID, 0)
			refuse(t, "an unmarked snapshot is no base", err, fault.NotFound, fault.Invalid)
			_, err = d.Allocated(t.Context(), id, 0)
			refuse(t, "an unmarked snapshot is never read", err, fault.NotFound, fault.Invalid)
		}
	}
}

func (s *suite) localities(t *testing.T) {
	if s.Twin == nil {
		t.Skip("not tested: the harness has one locality")
	}
	a, v := s.open(t), s.create(t, s.Size)
	w := &shadowed{Volume: s.Twin(t, v.Volume, s.Size), bytes: make([]byte, s.Size)}
	v.write(t, []byte("here"), 0)
	w.write(t, []byte("there"), 0)
	one, two := s.snap(t, a, v.ID(), "same"), s.snap(t, a, w.ID(), "same")
	const promise = "one name in two localities is two volumes"
	if one.ID == two.ID || one.ID.String() == two.ID.String() || one.ID.Volume == two.ID.Volume {
		broken(t, promise, "%s and %s", one.ID, two.ID)
	}
	if s.can["open"] {
		content(t, promise, s.read(t, a, one.ID), v.bytes)
		content(t, promise, s.read(t, a, two.ID), w.bytes)
	}
	if d, ok := adapters.As[adapters.Differ](a); ok {
		_, err := d.Changed(t.Context(), one.ID, two.ID, 0)
		refuse(t, "snapshots of two volumes cannot be compared", err, fault.Invalid)
	}
	succeed(t, "DeleteSnapshot removes a snapshot of ours", a.DeleteSnapshot(t.Context(), one.ID))
	_, err := a.Snapshot(t.Context(), two.ID)
	succeed(t, promise, err)
}

func (s *suite) unreachable(t *testing.T) {
	if s.Unreachable == nil {
		t.Skip("not tested: the harness reaches every locality")
	}
	a, id := s.open(t), s.Unreachable(t)
	snap := adapters.SnapshotID{Volume: id, Name: "x"}
	const promise = "what is out of reach is Unavailable, and never taken for deleted"
	refuse(t, promise, a.DeleteSnapshot(t.Context(), snap), fault.Unavailable)
	_, err := a.Snapshot(t.Context(), snap)
	refuse(t, promise, err, fault.Unavailable, fault.NotFound)
	_, err = a.Volume(t.Context(), id)
	refuse(t, promise, err, fault.Unavailable, fault.NotFound)
}

// concurrency does everything to the same and to different names at once.
func (s *suite) concurrency(t *testing.T) {
	a, b, v := s.open(t), s.open(t), s.create(t, s.Size)
	const workers = 8
	all := func(do func(i int, x adapters.Adapter) error) {
		t.Helper()
		errs := make([]error, workers)
		var wg sync.WaitGroup
		for i := range workers {
			wg.Go(func() { errs[i] = do(i, []adapters.Adapter{a, b}[i%2]) })
		}
		wg.Wait()
		succeed(t, "every method may be called in parallel with itself", errors.Join(errs...))
	}
	own := func(i int) string { return fmt.Sprintf("own-%d", i) }
	snaps := make([]adapters.Snapshot, workers)
	mine := make([]adapters.Snapshot, workers)
	for range 3 {
		all(func(i int, x adapters.Adapter) (err error) {
			snaps[i], err = x.CreateSnapshot(t.Context(), v.ID(), "same")
			return err
		})
		for _, snap := range snaps {
			if snap.ID != snaps[0].ID || !snap.Created.Equal(snaps[0].Created) {
				broken(t, "parallel CreateSnapshots of one name make one snapshot", "%+v and %+v", snap, snaps[0])
			}
		}
		all(func(i int, x adapters.Adapter) (err error) {
			mine[i], err = x.CreateSnapshot(t.Context(), v.ID(), own(i))
			return err
		})
		all(func(i int, x adapters.Adapter) error {
			return errors.Join(x.Publish(t.Context(), snaps[i].ID, adapters.Notes{Cut: own(i)}),
				x.Publish(t.Context(), mine[i].ID, adapters.Notes{Cut: own(i)}))
		})
		if n := len(s.listed(t, a, adapters.Filter{Volume: snaps[0].ID.Volume})); n != workers+1 {
			broken(t, "what was made in parallel is there", "%d snapshots instead of %d", n, workers+1)
		}
		all(func(i int, x adapters.Adapter) error {
			return errors.Join(x.DeleteSnapshot(t.Context(), snaps[i].ID), x.DeleteSnapshot(t.Context(), mine[i].ID))
		})
		all(func(i int, x adapters.Adapter) error { // a creation may find the name or make it anew, a deletion succeeds
			if i%4 < 2 {
				return x.DeleteSnapshot(t.Context(), snaps[0].ID)
			}
			_, err := x.CreateSnapshot(t.Context(), v.ID(), "same")
			return err
		})
		succeed(t, "DeleteSnapshot succeeds", a.DeleteSnapshot(t.Context(), snaps[0].ID))
		if left := s.listed(t, a, adapters.Filter{Volume: snaps[0].ID.Volume, Cutting: true}); len(left) != 0 {
			broken(t, "what was deleted in parallel is gone", "%v", left)
		}
	}
}

func (s *suite) gate(t *testing.T) {
	a, v, w := s.open(t), s.create(t, s.Size), s.create(t, s.Size)
	g, _ := adapters.As[adapters.Gater](a)
	f, err := g.Gate(t.Context(), []adapters.VolumeID{v.ID(), w.ID()})
	succeed(t, "Gate lets healthy volumes pass", err)
	if f.Frozen < 0 {
		broken(t, "a forecast is a time", "%v", f.Frozen)
	}
	absent := s.Absent(t)
	_, err = g.Gate(t.Context(), []adapters.VolumeID{v.ID(), absent})
	refuse(t, "Gate stops a cut with a volume that is not there", err, fault.NotFound)
	if !strings.Contains(err.Error(), absent.ID) {
		broken(t, "Gate's error names the volume", "%v does not name %s", err, absent.ID)
	}
}

func (s *suite) stage(t *testing.T) {
	a, v := s.open(t), s.create(t, s.Size)
	st, _ := adapters.As[adapters.Stager](a)
	r := seeded(t)
	staged := func(want int) {
		t.Helper()
		if s.Staged != nil {
			if n := s.Staged(t, v.Volume); n != want {
				broken(t, "what is staged is thrown away by Unstage and CreateSnapshot, and kept once until then", "%d instead of %d", n, want)
			}
		}
	}
	succeed(t, "unstaging what was not staged is success", st.Unstage(t.Context(), v.ID(), "staged"))
	for range 3 {
		v.scribble(t, r, 8)
		succeed(t, "staging may be repeated", st.Stage(t.Context(), v.ID(), "staged"))
		staged(1)
	}
	succeed(t, "Unstage throws away", st.Unstage(t.Context(), v.ID(), "staged"))
	succeed(t, "unstaging twice is success", st.Unstage(t.Context(), v.ID(), "staged"))
	staged(0)
	succeed(t, "staging may be repeated", st.Stage(t.Context(), v.ID(), "staged"))
	if l := s.listed(t, a, adapters.Filter{Cutting: true}); len(l) != 0 {
		broken(t, "what is staged is not a snapshot", "%v", l)
	}
	v.scribble(t, r, 8)
	snap := s.snap(t, a, v.ID(), "staged")
	staged(0)
	if s.can["open"] {
		content(t, "a staged snapshot is of CreateSnapshot's instant, not of Stage's", s.read(t, a, snap.ID), v.bytes)
	}
	succeed(t, "unstaging after CreateSnapshot is success", st.Unstage(t.Context(), v.ID(), "staged"))
	refuse(t, "staging a volume that is not there is NotFound", st.Stage(t.Context(), s.Absent(t), "staged"), fault.NotFound)
}

// each names a call of every method that takes a context, on the given volume and snapshots.
func (s *suite) each(ctx context.Context, a adapters.Adapter, v adapters.VolumeID, base, snap adapters.SnapshotID) map[string]error {
	errs := make(map[string]error)
	_, errs["Volume"] = a.Volume(ctx, v)
	_, errs["CreateSnapshot"] = a.CreateSnapshot(ctx, v, "each")
	errs["Publish"] = a.Publish(ctx, snap, adapters.Notes{})
	_, errs["Snapshot"] = a.Snapshot(ctx, snap)
	errs["DeleteSnapshot"] = a.DeleteSnapshot(ctx, snap)
	for _, err := range a.Snapshots(ctx, adapters.Filter{Volume: v}) {
		errs["Snapshots"] = err
	}
	if g, ok := adapters.As[adapters.Gater](a); ok {
		_, errs["Gate"] = g.Gate(ctx, []adapters.VolumeID{v})
	}
	if st, ok := adapters.As[adapters.Stager](a); ok {
		errs["Stage"] = st.Stage(ctx, v, "each")
	}
	if d, ok := adapters.As[adapters.Differ](a); ok {
		_, errs["Allocated"] = d.Allocated(ctx, snap, 0)
		_, errs["Changed"] = d.Changed(ctx, base, snap, 0)
	}
	if o, ok := adapters.As[adapters.Opener](a); ok {
		img, err := o.Open(ctx, snap)
		if err == nil {
			img.Close()
		}
		errs["Open"] = err
	}
	if r, ok := adapters.As[adapters.Restorer](a); ok {
		target, err := r.Begin(ctx, adapters.VolumeSpec{ID: v, Size: s.Size, Token: "each", Overwrite: true})
		if err == nil {
			target.Close()
		}
		errs["Begin"] = err
	}
	return errs
}

func (s *suite) errors(t *testing.T) {
	a, v := s.open(t), s.create(t, s.Size)
	snap := s.snap(t, a, v.ID(), "errors")

	absent := s.Absent(t)
	missing := adapters.SnapshotID{Volume: absent, Name: "missing"}
	for method, err := range s.each(t.Context(), a, absent, missing, missing) {
		switch {
		case method == "DeleteSnapshot":
			succeed(t, "deleting what does not exist is success", err)
		case method == "Snapshots" && err == nil:
		default:
			refuse(t, method+" on a volume that is not there is NotFound", err, fault.NotFound)
		}
	}
	missing = adapters.SnapshotID{Volume: snap.ID.Volume, Name: "missing"}
	for method, err := range s.each(t.Context(), a, absent, snap.ID, missing) {
		switch method {
		case "Publish", "Snapshot", "Allocated", "Changed", "Open":
			refuse(t, method+" of a snapshot that is not there is NotFound", err, fault.NotFound)
			if !strings.Contains(err.Error(), "missing") {
				broken(t, "an error names the snapshot", "%s: %v", method, err)
			}
		}
	}
	stranger := adapters.VolumeID{Backend: s.Backend + "-x", ID: snap.ID.Volume.ID}
	strange := adapters.SnapshotID{Volume: stranger, Name: snap.ID.Name}
	for method, err := range s.each(t.Context(), a, stranger, strange, strange) {
		refuse(t, method+" of another backend's handle is Invalid", err, fault.Invalid)
	}
	_, err := a.Snapshot(t.Context(), snap.ID)
	succeed(t, "another backend's handle deletes nothing here", err)
}

// cancel calls everything with a context that has ended, and then again with one that has not.
func (s *suite) cancel(t *testing.T) {
	a, v := s.open(t), s.create(t, s.Size)
	v.scribble(t, seeded(t), 8)
	base := s.snap(t, a, v.ID(), "base")
	snap := s.snap(t, a, v.ID(), "cancel")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	start := time.Now()
	for method, err := range s.each(ctx, a, snap.ID.Volume, base.ID, snap.ID) {
		if !errors.Is(err, context.Canceled) {
			broken(t, "a method whose context has ended returns the context's error", "%s: %v", method, err)
		}
	}
	if took := time.Since(start); took > patience {
		broken(t, "a method whose context has ended returns at once", "all of them took %v", took)
	}
	_, err := a.Snapshot(t.Context(), snap.ID)
	succeed(t, "a cancelled DeleteSnapshot that returned an error at once can be repeated", err)
	if d, ok := adapters.As[adapters.Differ](a); ok {
		ctx, cancel := context.WithCancel(t.Context())
		delta, err := d.Allocated(ctx, snap.ID, 0)
		succeed(t, "Allocated answers", err)
		cancel()
		n := 0
		for _, err := range delta.Extents {
			if n++; err != nil && !errors.Is(err, context.Canceled) {
				broken(t, "a delta whose context ended stops with the context's error", "%v", err)
			}
		}
	}
	if o, ok := adapters.As[adapters.Opener](a); ok {
		img, err := o.Open(t.Context(), snap.ID)
		succeed(t, "Open opens a snapshot that is ready", err)
		if _, err := img.ReadAt(ctx, make([]byte, 4096), 0); !errors.Is(err, context.Canceled) {
			broken(t, "ctx cancels a read", "%v", err)
		}
		p := make([]byte, 4096)
		_, err = img.ReadAt(t.Context(), p, 0)
		succeed(t, "a read can be repeated after a cancelled one", err)
		content(t, "a read after a cancelled one is right", p, v.bytes[:4096])
		succeed(t, "an image closes", img.Close())
	}
	for method, err := range s.each(t.Context(), a, snap.ID.Volume, base.ID, base.ID) {
		switch method {
		case "Allocated", "Changed", "Open": // deleted in between, or not: the order is each's own
		default:
			succeed(t, method+" can be repeated after a cancelled call", err)
		}
	}
	s.cut(t, a, v.ID(), "each") // so that it is deleted
	if st, ok := adapters.As[adapters.Stager](a); ok {
		succeed(t, "Unstage throws away", st.Unstage(t.Context(), v.ID(), "each"))
	}
}
