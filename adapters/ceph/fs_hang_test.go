//go:build ceph && cgo

package ceph

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

// fsOutages are the ways in which CephFS stops answering.
var fsOutages = map[string]struct{ begin, end func() error }{
	"metadata server": {func() error { return running.PauseMDS() }, func() error { return running.ResumeMDS() }},
	"OSD":             {func() error { return running.PauseOSD() }, func() error { return running.ResumeOSD() }},
}

// duringFSOutages runs a test with each of them. Requests fail after two seconds, where they have a limit at all.
func duringFSOutages(t *testing.T, test func(t *testing.T, a *FSAdapter, begin, end func())) {
	for name, way := range fsOutages {
		t.Run(name, func(t *testing.T) {
			a := openFiles(t, map[string]string{"timeout": "2s", "lag": "0s"})
			away := false
			begin := func() { away = true; must(t, way.begin()) }
			end := func() { away = false; must(t, way.end()) }
			t.Cleanup(func() {
				if away {
					end()
				}
				fsRecovered(t, a)
			})
			test(t, a, begin, end)
		})
	}
}

// fsRecovered waits until nothing hangs and CephFS answers.
func fsRecovered(t *testing.T, a *FSAdapter) {
	t.Helper()
	if n := a.cluster.wait(patience); n > 0 {
		t.Fatalf("%d calls still hang %v after CephFS came back", n, patience)
	}
	for end := time.Now().Add(patience); ; time.Sleep(50 * time.Millisecond) {
		_, err := a.Volume(context.Background(), freeTree().id("f")) // also in a cleanup
		switch {
		case errors.Is(err, fault.NotFound):
			return
		case !errors.Is(err, fault.Unavailable) || time.Now().After(end):
			t.Fatalf("the backend does not recover: %v", err)
		}
	}
}

func TestFSOutageInSnapshot(t *testing.T) {
	duringFSOutages(t, func(t *testing.T, a *FSAdapter, begin, end func()) {
		v := makeTree(t)
		must(t, v.Write("f", []byte("x"), 0))
		_, err := a.CreateSnapshot(t.Context(), v.ID(), "before")
		must(t, err)

		begin()
		began := time.Now()
		_, err = a.CreateSnapshot(short(t), v.ID(), "during")
		unavailable(t, "CreateSnapshot", err)
		if all, _ := a.cluster.abandoned(); all > 0 { // no deadline: what answers, answers because something hangs
			_, err = a.Volume(t.Context(), v.ID())
			unavailable(t, "Volume", err)
		}
		if took := time.Since(began); took > 2*slow {
			t.Errorf("CreateSnapshot returned %v after a deadline of %v", took, slow+slow/2)
		}
		end()

		fsRecovered(t, a)
		var s adapters.Snapshot
		eventually(t, func() (err error) {
			s, err = a.CreateSnapshot(t.Context(), v.ID(), "during")
			return err
		})
		if s.Mark != adapters.Cutting {
			t.Errorf("%+v", s)
		}
		eventually(t, func() error { return a.DeleteSnapshot(t.Context(), s.ID) })
		names, err := testNames(v.mount, v.name.snapshot(""))
		if err != nil || len(names) != 1 || names[0] != "before" {
			t.Errorf("an abandoned snapshot left something behind: %q, %v", names, err)
		}
	})
}

func TestFSOutageInWalkAndRead(t *testing.T) {
	duringFSOutages(t, func(t *testing.T, a *FSAdapter, begin, end func()) {
		v := makeTree(t)
		want := randomBytes(9 << 20)
		must(t, v.Write("large", want, 0))
		for d := range 40 {
			must(t, v.Mkdir(fmt.Sprint("d", d)))
			must(t, v.Write(fmt.Sprintf("d%d/f", d), []byte("x"), 0))
		}
		s := cutFiles(t, a, v.ID(), "walk")
		tree, err := a.OpenTree(t.Context(), s.ID, nil)
		must(t, err)
		f, err := tree.OpenFile(t.Context(), "large")
		must(t, err)
		walk := func(ctx context.Context) (n int, err error) {
			for d := range 40 {
				for _, err := range tree.Entries(ctx, fmt.Sprint("d", d)) {
					if err != nil {
						return n, err
					}
					n++
				}
			}
			return n, nil
		}

		begin()
		p := make([]byte, len(want))
		_, err = f.ReadAt(short(t), p, 0)
		if err != nil || !bytes.Equal(p, want) { // with the metadata server away, the OSD is read all the same
			unavailable(t, "ReadAt", err)
		}
		clear(p)
		_, err = walk(short(t))
		unavailable(t, "Entries", err)
		_, err = a.OpenTree(short(t), s.ID, nil)
		unavailable(t, "OpenTree", err)
		f.Close() // may say that there was no answer
		end()

		fsRecovered(t, a)
		if !bytes.Equal(p, make([]byte, len(p))) {
			t.Error("an abandoned read wrote into its caller's buffer")
		}
		eventually(t, func() error {
			n, err := walk(t.Context())
			if err == nil && n != 40 {
				t.Errorf("%d entries", n)
			}
			return err
		})
		eventually(t, func() (err error) {
			if f, err = tree.OpenFile(t.Context(), "large"); err != nil {
				return err
			}
			defer f.Close()
			_, err = f.ReadAt(t.Context(), p, 0)
			return err
		})
		if !bytes.Equal(p, want) {
			t.Error("after the outage other bytes were read")
		}
		must(t, tree.Close())
	})
}
