//go:build ceph && cgo

package rbd

import (
	"errors"
	"sync"
	"testing"
	"time"

	"stillpoint.io/stillpoint/agent/cut"
	"stillpoint.io/stillpoint/fault"
)

// stopOSD stops the OSD where it is, until resume is called or the test ends.
func stopOSD(t *testing.T) (resume func()) {
	t.Helper()
	must(t, cluster.PauseOSD())
	resume = sync.OnceFunc(func() {
		if err := cluster.ResumeOSD(); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(resume)
	return resume
}

// The OSD stops while all is frozen. What is frozen is thawed by the deadline, though the snapshot hangs; the cut is none,
// and when the OSD goes on nothing half-done stays.
func TestOSDStoppedInTheFreeze(t *testing.T) {
	s := newSite(t)
	s.rbd = open(t, "ceph-rbd", rbdParameters(cluster.Conf, images.Folder, "3s"))
	image, file := s.image(t, "xfs"), s.file(t, "ext4")
	book := keepLogbook(t, file.Mount)
	var once sync.Once
	frozen := make(chan func(), 1)
	image.adapter = meddler{s.rbd, func() error {
		once.Do(func() { frozen <- stopOSD(t) })
		return nil
	}}
	r := request("stopped", image, file)
	r.MaxFreeze = 3 * time.Second
	var watch sync.WaitGroup
	watch.Go(func() {
		resume := <-frozen
		defer resume()
		begun, at := book.begun.Load(), time.Now()
		for book.durable.Load() < begun+2 { // more than what was under way
			if time.Since(at) > r.MaxFreeze+5*time.Second {
				t.Errorf("%s is frozen for longer than the deadline of %v", file.Mount, r.MaxFreeze)
				return
			}
			time.Sleep(time.Millisecond)
		}
		t.Logf("thawed %v after the OSD stopped", time.Since(at).Round(time.Millisecond))
	})
	_, err := cut.Make(t.Context(), r, s.node)
	watch.Wait()
	if !errors.Is(err, fault.Unavailable) {
		t.Errorf("error %v (%v), want Unavailable", err, fault.KindOf(err))
	}
	t.Log(err)
	must(t, book.close())
	image.adapter = s.rbd
	s.recovers(t, image, file)
}

// recovers waits until nothing is left of a cut that failed, and makes another.
func (s *site) recovers(t *testing.T, legs ...leg) {
	t.Helper()
	eventually(t, "snapshots that belong to no cut to be gone", func() bool {
		for _, l := range legs {
			if l.adapter == s.rbd && run(t, "rbd", "snap", "list", "--all", l.id.ID) != "" {
				return false
			}
		}
		return true
	})
	eventually(t, "the backend to answer", func() bool {
		_, err := s.rbd.Volume(t.Context(), rbdID("absent"))
		return errors.Is(err, fault.NotFound)
	})
	if left := snapshots(t, legs...); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	for _, l := range legs {
		l.thawed(t)
	}
	if _, err := cut.Make(t.Context(), request("after", legs...), s.node); err != nil {
		t.Errorf("the cut after it: %v", err)
	}
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(60 * time.Second); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited a minute for %s", what)
		}
	}
}
