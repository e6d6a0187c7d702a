//go:build ceph && cgo

package ceph

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/cbt"
	"stillpoint.io/stillpoint/fault"
	"stillpoint.io/stillpoint/integration/ceph"
)

// patience bounds every wait for something that must happen.
const patience = 90 * time.Second

// outages are the ways in which the OSD stops answering, and answers again, each with a cluster that is made for it.
var outages = map[string]struct {
	cluster    ceph.Options
	begin, end func(*site) error
}{
	"stopped": {ceph.Options{Lease: ceph.NeverKilled, Watch: 5}, func(s *site) error { return s.PauseOSD() }, func(s *site) error { return s.ResumeOSD() }},
	"killed":  {ceph.Options{Watch: 5}, func(s *site) error { return s.KillOSD() }, func(s *site) error { return s.StartOSD(context.Background()) }},
}

// scenarios are what the OSD goes away in the middle of. Each prepares itself, has the outage begin, has it end, and checks
// what came of it. The adapter's requests fail after two seconds.
var scenarios = map[string]func(*testing.T, *site, *Adapter, *outage){
	"snapshot":               outageInSnapshot,
	"call without a limit":   outageInCallWithoutLimit,
	"read":                   outageInRead,
	"delta":                  outageInDelta,
	"restore":                outageInRestore,
	"close while calls hang": closeWhileCallsHang,
}

// TestOutages has all scenarios go through one outage of each kind together, which is what one cluster would see, and
// takes as long as the longest of them.
func TestOutages(t *testing.T) {
	t.Parallel()
	var ways sync.WaitGroup
	for name, way := range outages {
		ways.Go(func() {
			t.Run(name, func(t *testing.T) {
				s, err := startSite(t.Context(), way.cluster)
				must(t, err)
				t.Cleanup(func() { must(t, s.close()) })
				begin := newGathering(len(scenarios), func() error { return way.begin(s) })
				end := newGathering(len(scenarios), func() error { return way.end(s) })
				var all sync.WaitGroup
				defer all.Wait()
				for name, scenario := range scenarios {
					all.Go(func() {
						o := &outage{begins: begin, ends: end}
						defer o.leave() // also one that does not run
						t.Run(name, func(t *testing.T) {
							o.t = t
							a := s.open(t, map[string]string{"timeout": "2s"})
							t.Cleanup(func() { recovered(t, a) })
							defer o.leave()
							scenario(t, s, a, o)
						})
					})
				}
			})
		})
	}
	ways.Wait()
}

// outage is an OSD that goes away when all scenarios are ready for that, and comes back when all are.
type outage struct {
	t            *testing.T
	begins, ends *gathering
	passed       int // of the two
}

func (o *outage) begin() { o.t.Helper(); o.passed = 1; must(o.t, o.begins.arrive()) }
func (o *outage) end()   { o.t.Helper(); o.passed = 2; must(o.t, o.ends.arrive()) }

// leave lets the others go on without a scenario that failed or is over.
func (o *outage) leave() {
	if o.passed < 1 {
		o.begins.leave()
	}
	if o.passed < 2 {
		o.ends.leave()
	}
	o.passed = 2
}

// gathering is a place where all wait for each other. The last one does something for all.
type gathering struct {
	mu      sync.Mutex
	missing int
	act     func() error
	done    chan struct{}
	err     error // readable when done is closed
}

func newGathering(members int, act func() error) *gathering {
	return &gathering{missing: members, act: act, done: make(chan struct{})}
}

func (g *gathering) arrive() error {
	g.leave()
	select {
	case <-g.done:
		return g.err
	case <-time.After(patience):
		return fmt.Errorf("the other scenarios do not come within %v", patience)
	}
}

func (g *gathering) leave() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.missing--; g.missing == 0 {
		g.err = g.act()
		close(g.done)
	}
}

// recovered waits until nothing hangs and Ceph answers.
func recovered(t *testing.T, a *Adapter) {
	t.Helper()
	if n := a.cluster.wait(patience); n > 0 {
		t.Fatalf("%d calls still hang %v after the OSD came back", n, patience)
	}
	absent := freeName("rbd", "").id("r")
	for end := time.Now().Add(patience); ; time.Sleep(50 * time.Millisecond) {
		_, err := a.Volume(context.Background(), absent) // also in a cleanup
		switch {
		case errors.Is(err, fault.NotFound):
			return
		case !errors.Is(err, fault.Unavailable) || time.Now().After(end):
			t.Fatalf("the backend does not recover: %v", err)
		}
	}
}

// eventually does something until it does not fail as Unavailable any more: what Retry does for every caller.
func eventually(t *testing.T, f func() error) {
	t.Helper()
	for end := time.Now().Add(patience); ; time.Sleep(50 * time.Millisecond) {
		err := f()
		if err == nil {
			return
		}
		if fault.KindOf(err) != fault.Unavailable && fault.KindOf(err) != fault.Busy || time.Now().After(end) {
			t.Fatalf("%v (%v)", err, fault.KindOf(err))
		}
	}
}

// short is a context that ends while the OSD is away, and later than a call needs that gets an answer.
func short(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), slow+slow/2)
	t.Cleanup(cancel)
	return ctx
}

// unavailable demands that a call gave up because Ceph does not answer.
func unavailable(t *testing.T, what string, err error) {
	t.Helper()
	if !errors.Is(err, fault.Unavailable) && fault.KindOf(err) != fault.Unavailable {
		t.Errorf("%s while the OSD is away: %v (%v)", what, err, fault.KindOf(err))
	}
}

func outageInSnapshot(t *testing.T, s *site, a *Adapter, o *outage) {
	v := s.makeImage(t, freeName("rbd", ""), 4<<20, nil)
	v.close()
	_, err := a.CreateSnapshot(t.Context(), v.ID(), "before")
	must(t, err)

	o.begin()
	_, err = a.CreateSnapshot(short(t), v.ID(), "during")
	unavailable(t, "CreateSnapshot", err)
	if all, _ := a.cluster.abandoned(); all > 0 {
		// No deadline: what answers, answers because something hangs.
		_, err := a.Volume(t.Context(), v.ID())
		unavailable(t, "Volume", err)
		_, err = a.CreateSnapshot(t.Context(), v.ID(), "another")
		unavailable(t, "CreateSnapshot", err)
	}
	o.end()

	recovered(t, a)
	var snap adapters.Snapshot
	eventually(t, func() (err error) {
		snap, err = a.CreateSnapshot(t.Context(), v.ID(), "during")
		return err
	})
	if snap.Mark != adapters.Cutting {
		t.Errorf("%+v", snap)
	}
	eventually(t, func() error { return a.DeleteSnapshot(t.Context(), snap.ID) })
	if left := snapshotsOf(t, v); len(left) != 1 || left[0] != "before" {
		t.Errorf("an abandoned snapshot left something behind: %q", left)
	}
}

// snapshotsOf lists the names of all that an image has.
func snapshotsOf(t *testing.T, v *volume) (names []string) {
	t.Helper()
	again := openVolume(t, v.io, v.name)
	defer again.close()
	all, err := again.rbd.GetSnapshotNames()
	must(t, err)
	for _, s := range all {
		names = append(names, s.Name)
	}
	return names
}

// outageInCallWithoutLimit: also without any deadline a call ends.
func outageInCallWithoutLimit(t *testing.T, s *site, a *Adapter, o *outage) {
	v := s.makeImage(t, freeName("rbd", ""), 4<<20, nil)
	v.close()
	_, err := a.Volume(t.Context(), v.ID())
	must(t, err)
	o.begin()
	_, err = a.CreateSnapshot(t.Context(), v.ID(), "during")
	unavailable(t, "CreateSnapshot", err)
	o.end()
	recovered(t, a)
}

func outageInRead(t *testing.T, s *site, a *Adapter, o *outage) {
	v := s.makeImage(t, freeName("rbd", ""), 4<<20, nil)
	want := randomBytes(4 << 20)
	_, err := v.WriteAt(want, 0)
	must(t, err)
	v.close()
	snap, err := a.CreateSnapshot(t.Context(), v.ID(), "read")
	must(t, err)
	img, err := a.Open(t.Context(), snap.ID)
	must(t, err)
	p := make([]byte, len(want))
	if _, err := img.ReadAt(t.Context(), p, 0); err != nil || !bytes.Equal(p, want) {
		t.Fatalf("before: %v", err)
	}

	o.begin()
	clear(p)
	_, err = img.ReadAt(short(t), p, 0)
	unavailable(t, "ReadAt", err)
	must(t, img.Close()) // the call that hangs keeps the image
	o.end()

	recovered(t, a)
	if !bytes.Equal(p, make([]byte, len(p))) {
		t.Error("an abandoned read wrote into its caller's buffer")
	}
	eventually(t, func() (err error) {
		if img, err = a.Open(t.Context(), snap.ID); err != nil {
			return err
		}
		defer img.Close()
		_, err = img.ReadAt(t.Context(), p, 0)
		return err
	})
	if !bytes.Equal(p, want) {
		t.Error("after the outage other bytes were read")
	}
}

func outageInDelta(t *testing.T, s *site, a *Adapter, o *outage) {
	// More objects than the answers that are fetched ahead cover, with gaps that no span crosses.
	const objects = (waiting + asking) * (spanGap + 2)
	v := s.makeImage(t, freeName("rbd", ""), objects<<order, nil)
	base, err := a.CreateSnapshot(t.Context(), v.ID(), "base")
	must(t, err)
	for i := int64(0); i < objects; i += spanGap + 2 {
		_, err := v.WriteAt([]byte{1}, i<<order)
		must(t, err)
	}
	v.close()
	target, err := a.CreateSnapshot(t.Context(), v.ID(), "target")
	must(t, err)
	whole := collect(t, a, base.ID, target.ID, 0)

	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	d, err := a.Changed(ctx, base.ID, target.ID, 0)
	must(t, err)
	var before []cbt.Extent
	for e, e2 := range d.Extents {
		if err = e2; err != nil {
			break
		}
		if before = append(before, e); len(before) == 1 {
			o.begin()
			defer time.AfterFunc(slow+slow/2, cancel).Stop()
		}
	}
	if !errors.Is(err, context.Canceled) { // or Ceph's own limit was quicker
		unavailable(t, "a delta", err)
	}
	o.end()

	recovered(t, a)
	if len(before) == 0 || len(before) == len(whole) {
		t.Fatalf("the delta did not break off in its middle: %d of %d extents", len(before), len(whole))
	}
	eventually(t, func() error { // all the objects
		d, err := a.Changed(t.Context(), base.ID, target.ID, 0)
		if err == nil {
			_, err = cbt.Sum(d.Extents)
		}
		return err
	})
	rest := collect(t, a, base.ID, target.ID, before[len(before)-1].End())
	if all := append(before, rest...); !equalExtents(all, whole) {
		t.Errorf("a delta that was taken up again has %d extents instead of %d", len(all), len(whole))
	}
}

func collect(t *testing.T, a *Adapter, base, target adapters.SnapshotID, from int64) (all []cbt.Extent) {
	t.Helper()
	d, err := a.Changed(t.Context(), base, target, from)
	must(t, err)
	for e, err := range cbt.Coalesce(d.Extents) {
		must(t, err)
		all = append(all, e)
	}
	return all
}

func equalExtents(a, b []cbt.Extent) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if a[i] != b[i] {
			return false
		}
	}
	return true
}

func outageInRestore(t *testing.T, s *site, a *Adapter, o *outage) {
	n := freeName("rbd", "")
	cleanUp(t, s.ioctx(t, n), n)
	spec := adapters.VolumeSpec{ID: n.id("r"), Size: 4 << 20, Token: "outage"}
	target, err := a.Begin(t.Context(), spec)
	must(t, err)
	want := randomBytes(4 << 20)
	must(t, target.WriteAt(t.Context(), want[:1<<20], 0))

	o.begin()
	old := bytes.Repeat([]byte{0xA5}, 1<<20)
	unavailable(t, "WriteAt", target.WriteAt(short(t), old, 1<<20))
	unavailable(t, "a WriteAt after one that was abandoned", target.WriteAt(short(t), want[1<<20:2<<20], 1<<20))
	o.end()

	recovered(t, a)
	// What the outage interrupted is not certain; what is written now is. The exclusive lock may be lost, and with it
	// the target: the next Begin then finds what was written.
	eventually(t, func() error {
		if target == nil {
			if target, err = a.Begin(t.Context(), spec); err != nil {
				target = nil
				return err
			}
		}
		err := target.WriteAt(t.Context(), want[1<<20:], 1<<20)
		if err == nil {
			_, err = target.Commit(t.Context())
		}
		if err != nil {
			must(t, target.Close())
			target = nil
		}
		return err
	})
	p := make([]byte, len(want))
	eventually(t, func() error {
		s, err := a.CreateSnapshot(t.Context(), n.id("r"), "restored")
		if err != nil {
			return err
		}
		img, err := a.Open(t.Context(), s.ID)
		if err != nil {
			return err
		}
		defer img.Close()
		_, err = img.ReadAt(t.Context(), p, 0)
		return err
	})
	if !bytes.Equal(p, want) {
		t.Error("the restored image has other bytes")
	}
}

// closeWhileCallsHang: an adapter is closed under calls that hang, which are then still to end well.
func closeWhileCallsHang(t *testing.T, s *site, _ *Adapter, o *outage) {
	v := s.makeImage(t, freeName("rbd", ""), 4<<20, nil)
	_, err := v.WriteAt(randomBytes(4096), 0)
	must(t, err)
	v.close()
	opened, err := RBD().Open(t.Context(), s.config(map[string]string{"timeout": "5s"}))
	must(t, err)
	a := opened.(*Adapter)
	snap, err := a.CreateSnapshot(t.Context(), v.ID(), "before")
	must(t, err)
	img, err := a.Open(t.Context(), snap.ID)
	must(t, err)

	o.begin()
	ctx := short(t)
	for range 8 {
		go img.ReadAt(ctx, make([]byte, 4096), 0)
	}
	_, err = img.ReadAt(ctx, make([]byte, 4096), 0)
	unavailable(t, "ReadAt", err)
	must(t, img.Close())
	unavailable(t, "Close", a.Close())
	o.end()
	if n := a.cluster.wait(patience); n > 0 {
		t.Fatalf("%d calls never end", n)
	}
	if _, err := a.Volume(t.Context(), v.ID()); !errors.Is(err, fault.Invalid) {
		t.Errorf("a call after Close: %v", err)
	}
}
