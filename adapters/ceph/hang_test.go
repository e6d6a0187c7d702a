//go:build ceph && cgo

package ceph

import (
	"bytes"
	"context"
	"errors"
	"testing"
	"time"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/cbt"
	"stillpoint.io/stillpoint/fault"
)

// patience bounds every wait for something that must happen.
const patience = 90 * time.Second

// outages are the ways in which the OSD stops answering, and answers again.
var outages = map[string]struct{ begin, end func() error }{
	"stopped": {func() error { return running.PauseOSD() }, func() error { return running.ResumeOSD() }},
	"killed":  {func() error { return running.KillOSD() }, func() error { return running.StartOSD(context.Background()) }},
}

// outage is an OSD that can go away, and is back at the end of the test in any case.
type outage struct {
	t     *testing.T
	begin func()
	end   func()
}

// duringOutages runs a test with the OSD stopped and with it killed. The adapter's requests fail after two seconds.
func duringOutages(t *testing.T, test func(*testing.T, *Adapter, outage)) {
	for name, way := range outages {
		t.Run(name, func(t *testing.T) {
			away := false
			o := outage{t, func() { away = true; must(t, way.begin()) }, func() { away = false; must(t, way.end()) }}
			a := open(t, map[string]string{"timeout": "2s"}) // closed after the OSD is back
			t.Cleanup(func() {
				if away {
					o.end()
				}
				recovered(t, a)
			})
			test(t, a, o)
		})
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

func TestOutageInSnapshot(t *testing.T) {
	duringOutages(t, func(t *testing.T, a *Adapter, o outage) {
		v := makeImage(t, freeName("rbd", ""), 4<<20, nil)
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
		var s adapters.Snapshot
		eventually(t, func() (err error) {
			s, err = a.CreateSnapshot(t.Context(), v.ID(), "during")
			return err
		})
		if s.Mark != adapters.Cutting {
			t.Errorf("%+v", s)
		}
		eventually(t, func() error { return a.DeleteSnapshot(t.Context(), s.ID) })
		if left := snapshotsOf(t, v); len(left) != 1 || left[0] != "before" {
			t.Errorf("an abandoned snapshot left something behind: %q", left)
		}
	})
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

// TestTimeLimit: also without any deadline a call ends.
func TestTimeLimit(t *testing.T) {
	duringOutages(t, func(t *testing.T, a *Adapter, o outage) {
		v := makeImage(t, freeName("rbd", ""), 4<<20, nil)
		v.close()
		_, err := a.Volume(t.Context(), v.ID())
		must(t, err)
		o.begin()
		_, err = a.CreateSnapshot(t.Context(), v.ID(), "during")
		unavailable(t, "CreateSnapshot", err)
		o.end()
		recovered(t, a)
	})
}

func TestOutageInRead(t *testing.T) {
	duringOutages(t, func(t *testing.T, a *Adapter, o outage) {
		v := makeImage(t, freeName("rbd", ""), 4<<20, nil)
		want := randomBytes(4 << 20)
		_, err := v.WriteAt(want, 0)
		must(t, err)
		v.close()
		s, err := a.CreateSnapshot(t.Context(), v.ID(), "read")
		must(t, err)
		img, err := a.Open(t.Context(), s.ID)
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
			if img, err = a.Open(t.Context(), s.ID); err != nil {
				return err
			}
			defer img.Close()
			_, err = img.ReadAt(t.Context(), p, 0)
			return err
		})
		if !bytes.Equal(p, want) {
			t.Error("after the outage other bytes were read")
		}
	})
}

func TestOutageInDelta(t *testing.T) {
	duringOutages(t, func(t *testing.T, a *Adapter, o outage) {
		// More objects than the answers that are fetched ahead cover, with gaps that no span crosses.
		const objects = 40 * (spanGap + 2)
		v := makeImage(t, freeName("rbd", ""), objects<<order, nil)
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

		d, err := a.Changed(short(t), base.ID, target.ID, 0)
		must(t, err)
		var before []cbt.Extent
		err = nil
		for e, e2 := range d.Extents {
			if err = e2; err != nil {
				break
			}
			if before = append(before, e); len(before) == 1 {
				o.begin()
			}
		}
		unavailable(t, "a delta", err)
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
	})
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

func TestOutageInRestore(t *testing.T) {
	duringOutages(t, func(t *testing.T, a *Adapter, o outage) {
		n := freeName("rbd", "")
		cleanUp(t, ioctx(t, n), n)
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
	})
}

// TestCloseWhileCallsHang: the adapter is closed under calls that hang, which are then still to end well.
func TestCloseWhileCallsHang(t *testing.T) {
	for name, way := range outages {
		t.Run(name, func(t *testing.T) {
			v := makeImage(t, freeName("rbd", ""), 4<<20, nil)
			_, err := v.WriteAt(randomBytes(4096), 0)
			must(t, err)
			v.close()
			opened, err := RBD().Open(t.Context(), config(map[string]string{"timeout": "5s"}))
			must(t, err)
			a := opened.(*Adapter)
			s, err := a.CreateSnapshot(t.Context(), v.ID(), "before")
			must(t, err)
			img, err := a.Open(t.Context(), s.ID)
			must(t, err)

			must(t, way.begin())
			ctx := short(t)
			for range 8 {
				go img.ReadAt(ctx, make([]byte, 4096), 0)
			}
			_, err = img.ReadAt(ctx, make([]byte, 4096), 0)
			unavailable(t, "ReadAt", err)
			must(t, img.Close())
			hung := a.Close()
			must(t, way.end())
			unavailable(t, "Close", hung)
			if n := a.cluster.wait(patience); n > 0 {
				t.Fatalf("%d calls never end", n)
			}
			if _, err := a.Volume(t.Context(), v.ID()); !errors.Is(err, fault.Invalid) {
				t.Errorf("a call after Close: %v", err)
			}
			recovered(t, open(t, nil))
		})
	}
}
