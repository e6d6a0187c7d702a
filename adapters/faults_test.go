package adapters_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

func TestFaultsText(t *testing.T) {
	for text, canonical := range map[string]string{
		"":                             "",
		"CreateSnapshot:2=unavailable": "",
		"ReadAt@1048576=corrupt":       "ReadAt@1MiB=corrupt",
		"Publish=hang, *:3+=not-found": "",
		" Gate=delay(50ms) ,":          "Gate=delay(50ms)",
		"ReadAt:1@0=short, WriteAt=short, Extents:7+@3KiB=busy, Commit=lost": "",
	} {
		if canonical == "" {
			canonical = text
		}
		f, err := adapters.ParseFaults(text)
		if err != nil || f.String() != canonical {
			t.Errorf("%q reads as %q, %v", text, f.String(), err)
		}
		if again, err := adapters.ParseFaults(f.String()); err != nil || !slices.Equal(f, again) {
			t.Errorf("%q does not survive: %+v, %v", text, again, err)
		}
	}
	for text, hint := range map[string]string{
		"CreateSnapshot":            "no effect",
		"CreateSnapshott=hang":      `did you mean "CreateSnapshot"`,
		"xyz=hang":                  "there is *, Abort",
		"Gate:0=hang":               "counted from 1",
		"Gate:x=hang":               "counted from 1",
		"Gate@1=hang":               "no places",
		"ReadAt@-1=hang":            "size in bytes",
		"ReadAt@1.5MiB=hang":        "size in bytes",
		"ReadAt@9999999999TiB=hang": "size in bytes",
		"Gate=short":                "only ReadAt",
		"Gate=delay(5)":             "duration",
		"Gate=delay(-5s)":           "duration",
		"Gate=unavailble":           `did you mean "unavailable"`,
		"Gate=":                     "unknown effect",
	} {
		if _, err := adapters.ParseFaults(text); !errors.Is(err, fault.Invalid) || !strings.Contains(err.Error(), hint) {
			t.Errorf("%q: %v", text, err)
		}
	}
}

func FuzzFaults(f *testing.F) {
	f.Add("CreateSnapshot:2=unavailable, ReadAt@1MiB=corrupt, Publish=hang")
	f.Add("*:3+=delay(1h2m), Extents:1@0=lost")
	f.Fuzz(func(t *testing.T, text string) {
		faults, err := adapters.ParseFaults(text)
		if err != nil {
			if !errors.Is(err, fault.Invalid) {
				t.Fatal(err)
			}
			return
		}
		again, err := adapters.ParseFaults(faults.String())
		if err != nil || !slices.Equal(faults, again) {
			t.Fatalf("%q is written %q: %v", text, faults, err)
		}
	})
}

// inject opens the fixture's snapshot through faults.
func inject(t *testing.T, text string) (adapters.Adapter, adapters.Image) {
	t.Helper()
	m, s := fixture(t)
	a := must(adapters.ParseFaults(text)).Decorate(m)
	o, _ := adapters.As[adapters.Opener](a)
	img := must(o.Open(t.Context(), s))
	t.Cleanup(func() { img.Close() })
	return a, img
}

func TestFaultsCount(t *testing.T) {
	a, _ := inject(t, "Volume:2=busy, Volume:4+=corrupt, *:6=exhausted")
	var got []fault.Kind
	for range 6 { // Open was the first call of *
		_, err := a.Volume(t.Context(), volume)
		got = append(got, fault.KindOf(err))
		if err != nil && !strings.Contains(err.Error(), "injected") {
			t.Error(err)
		}
	}
	// Every call that fits is counted, also one that an earlier fault fails.
	if want := []fault.Kind{0, fault.Busy, 0, fault.Corrupt, fault.Corrupt, fault.Corrupt}; !slices.Equal(got, want) {
		t.Errorf("%v instead of %v", got, want)
	}
}

func TestFaultsPlace(t *testing.T) {
	_, img := inject(t, "ReadAt@64KiB=corrupt")
	p := make([]byte, 4096)
	for off, bad := range map[int64]bool{0: false, 60 << 10: false, 64<<10 - 1: true, 64 << 10: true, 64<<10 + 1: false} {
		if _, err := img.ReadAt(t.Context(), p, off); errors.Is(err, fault.Corrupt) != bad {
			t.Errorf("a read at %d: %v", off, err)
		}
	}
}

func TestFaultsShort(t *testing.T) {
	_, img := inject(t, "ReadAt:1=short, ReadAt:2@3=short")
	for _, want := range []int{4, 3} {
		p := bytes.Repeat([]byte{0xA5}, 8)
		n, err := img.ReadAt(t.Context(), p, 0)
		if n != want || !errors.Is(err, fault.Unavailable) || !errors.Is(err, io.ErrUnexpectedEOF) || !bytes.Equal(p[:n], []byte("first")[:n]) || p[n] != 0xA5 {
			t.Errorf("%d bytes, %v, %q", n, err, p)
		}
	}
	p := make([]byte, 5)
	if n, err := img.ReadAt(t.Context(), p, 0); n != 5 || err != nil || string(p) != "first" {
		t.Errorf("%d, %v, %q", n, err, p)
	}
}

// A lost answer is one whose call was made: the repetition must find what it did.
func TestFaultsLost(t *testing.T) {
	m, s := fixture(t)
	a := must(adapters.ParseFaults("CreateSnapshot:1=lost, Open:1=lost, Begin:1=lost, Commit:1=lost")).Decorate(m)
	_, err := a.CreateSnapshot(t.Context(), volume, "lost")
	if !errors.Is(err, fault.Unavailable) {
		t.Error(err)
	}
	if _, err := m.Snapshot(t.Context(), adapters.SnapshotID{Volume: volume, Name: "lost"}); err != nil {
		t.Errorf("the snapshot was not made: %v", err)
	}
	o, _ := adapters.As[adapters.Opener](a)
	if _, err := o.Open(t.Context(), s); !errors.Is(err, fault.Unavailable) {
		t.Error(err)
	}
	r, _ := adapters.As[adapters.Restorer](a)
	spec := adapters.VolumeSpec{ID: adapters.VolumeID{Backend: "b", ID: "local/new"}, Size: 1, Token: "t"}
	if _, err := r.Begin(t.Context(), spec); !errors.Is(err, fault.Unavailable) {
		t.Error(err)
	}
	target := must(r.Begin(t.Context(), spec))
	if _, err := target.Commit(t.Context()); !errors.Is(err, fault.Unavailable) {
		t.Error(err)
	}
	if _, err := m.Volume(t.Context(), spec.ID); err != nil {
		t.Errorf("the volume was not made: %v", err)
	}
	if err := m.Close(); err != nil {
		t.Errorf("what was opened before its answer was lost stays open: %v", err)
	}
}

func TestFaultsCutStreams(t *testing.T) {
	m, s := fixture(t)
	for _, n := range []string{"1", "2"} {
		if _, err := m.CreateSnapshot(t.Context(), volume, n); err != nil {
			t.Fatal(err)
		}
	}
	a := must(adapters.ParseFaults("Extents:2+@300KiB=unavailable, Snapshots@2=exhausted")).Decorate(m)
	d, _ := adapters.As[adapters.Differ](a)
	for round, want := range []int{2, 1, 1} {
		delta := must(d.Allocated(t.Context(), s, 0))
		n, last := 0, error(nil)
		for _, err := range delta.Extents {
			if last = err; err == nil {
				n++
			}
		}
		if n != want || (round > 0) != errors.Is(last, fault.Unavailable) {
			t.Errorf("round %d: %d extents, %v", round, n, last)
		}
	}
	n, last := 0, error(nil)
	for _, err := range a.Snapshots(t.Context(), adapters.Filter{Cutting: true}) {
		if last = err; err == nil {
			n++
		}
	}
	if n != 2 || !errors.Is(last, fault.Exhausted) {
		t.Errorf("%d snapshots, %v", n, last)
	}
}

func TestFaultsWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, _ := inject(t, "Publish=hang, Volume=delay(5s), Volume:2=hang")
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		start := time.Now()
		if _, err := a.Volume(ctx, volume); err != nil || time.Since(start) != 5*time.Second {
			t.Errorf("%v after %v", err, time.Since(start))
		}
		if _, err := a.Volume(ctx, volume); !errors.Is(err, context.DeadlineExceeded) || time.Since(start) != time.Minute {
			t.Errorf("%v after %v", err, time.Since(start))
		}
		if err := a.Publish(ctx, adapters.SnapshotID{Volume: volume, Name: "s"}, adapters.Notes{}); !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
	})
}
