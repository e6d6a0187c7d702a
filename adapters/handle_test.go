package adapters_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"unicode/utf8"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/adapters/mem"
	"stillpoint.io/stillpoint/fault"
)

func TestHandleRoundTrip(t *testing.T) {
	for _, id := range []string{
		"x", "/srv/pool/disk.img", "rbd/img1", "a:b", "~x", "~", "~~", "a~", "~@%", "%7E", "~%7E", "%", "@", "%40", "%25", "a@b%c", "%%@@", "%2540", "雪/ü", "with space",
		strings.Repeat("v", 128), strings.Repeat("@", 128), strings.Repeat("雪", 42),
	} {
		v := adapters.VolumeID{Backend: "pool-1", ID: id}
		h, err := adapters.ParseHandle(v.String())
		if err != nil || h.Volume != v || h.IsSnapshot() {
			t.Errorf("%q: %+v, %v", v.String(), h, err)
		}
		for _, wanted := range []string{"a", strings.Repeat("n", 128), "Ü@%"} {
			s := adapters.SnapshotID{Volume: v, Name: adapters.Name(wanted)}
			text := s.String()
			if len(text) > adapters.HandleMax || !utf8.ValidString(text) {
				t.Errorf("%q has %d bytes", text, len(text))
			}
			h, err := adapters.ParseHandle(text)
			switch {
			case err != nil:
				t.Errorf("%q: %v", text, err)
			case len(s.Full()) > adapters.HandleMax:
				if h.Short != adapters.ShortName(s.Full()) || !h.IsSnapshot() || h.Volume.Backend != v.Backend {
					t.Errorf("%q: %+v", text, h)
				}
			case h.Volume != v || h.Name != s.Name || !h.IsSnapshot():
				t.Errorf("%q: %+v instead of %+v", text, h, s)
			}
		}
	}
}

// The longest handles in the long form are exactly HandleMax; one byte more makes them short.
func TestHandleLongest(t *testing.T) {
	fixed := len("b:@") + adapters.NameMax
	name := strings.Repeat("n", adapters.NameMax)
	for over, short := range map[int]bool{-1: false, 0: false, 1: true} {
		s := adapters.SnapshotID{Volume: adapters.VolumeID{Backend: "b", ID: strings.Repeat("v", adapters.HandleMax-fixed+over)}, Name: name}
		if got := strings.HasPrefix(s.String(), "b:~"); got != short {
			t.Errorf("%d bytes: short is %v", len(s.Full()), got)
		}
	}
}

func TestHandleErrors(t *testing.T) {
	for _, s := range []string{
		"", ":", "x", "b:", ":x", "B:x", "-b:x", "b-:x", "b_c:x", strings.Repeat("b", 33) + ":x", "b:@n", "b:x@", "b:x@N", "b:x@a b", "b:x@y@z",
		"b:x@" + strings.Repeat("n", 27), "b:~", "b:~short", "b:~" + strings.Repeat("N", 26), "b:~" + strings.Repeat("n", 27), "b:a\nb", "b:a\x00", "b:\x7f",
		"b:\xff", "b:%", "b:%4", "b:%41", "b:%2", "b:a%7E", "b:%7e", "b:%7", "b:~x@n",
	} {
		if h, err := adapters.ParseHandle(s); !errors.Is(err, fault.Invalid) {
			t.Errorf("%q reads as %+v, %v", s, h, err)
		}
	}
}

func FuzzHandle(f *testing.F) {
	for _, s := range []string{"b:x", "b:x@n", "b:a%40b%25@n", "b:%7Ex", "b:~abcdefghijklmnopqrstuvwxyz", "b:%2540@n"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		h, err := adapters.ParseHandle(s)
		if err != nil {
			if !errors.Is(err, fault.Invalid) {
				t.Fatalf("%q: %v", s, err)
			}
			return
		}
		var back string
		switch {
		case h.Short != "":
			back = h.Volume.Backend + ":~" + h.Short
		case h.Name != "":
			back = adapters.SnapshotID{Volume: h.Volume, Name: h.Name}.Full()
		default:
			back = h.Volume.String()
		}
		if back != s {
			t.Fatalf("%q reads as %+v, which is written %q", s, h, back)
		}
	})
}

func FuzzVolumeID(f *testing.F) {
	f.Add("x", "n")
	f.Add("a@b%c%40", strings.Repeat("n", 128))
	f.Fuzz(func(t *testing.T, id, wanted string) {
		v := adapters.VolumeID{Backend: "b", ID: id}
		h, err := adapters.ParseHandle(v.String())
		if err != nil {
			if id == "" || !utf8.ValidString(id) || strings.ContainsFunc(id, func(r rune) bool { return r < ' ' || r == 0x7f }) {
				return
			}
			t.Fatalf("%q: %v", id, err)
		}
		if h.Short == "" && h.Volume != v {
			t.Fatalf("%q became %q", id, h.Volume.ID)
		}
		if name := adapters.Name(wanted); len(name) > adapters.NameMax || name == "" || adapters.Name(name) != name {
			t.Fatalf("%q is named %q", wanted, name)
		}
	})
}

func TestName(t *testing.T) {
	for _, plain := range []string{"a", "a-1", "-", strings.Repeat("z", 26)} {
		if adapters.Name(plain) != plain {
			t.Errorf("%q became %q", plain, adapters.Name(plain))
		}
	}
	// Handles are kept by others for years: the derivation must never change.
	if got := adapters.Name("Ünicode"); got != adapters.ShortName("Ünicode") || len(got) != adapters.NameMax {
		t.Errorf("%q", got)
	}
	if got := adapters.ShortName(""); got != "4oymiquy7qobjgx36tejs35zeq" {
		t.Errorf("%q", got)
	}
}

func TestResolve(t *testing.T) {
	store := new(mem.Store)
	long := "local/" + strings.Repeat("v", 120)
	for _, id := range []string{"short", long} {
		if _, err := store.Create(id, 1<<20); err != nil {
			t.Fatal(err)
		}
	}
	a := store.Adapter("b")
	s, err := a.CreateSnapshot(t.Context(), adapters.VolumeID{Backend: "b", ID: long}, "one")
	if err != nil {
		t.Fatal(err)
	}
	for text, want := range map[string]adapters.SnapshotID{
		s.ID.String():      s.ID,
		s.ID.Full():        s.ID,
		"b:short@x":        {Volume: adapters.VolumeID{Backend: "b", ID: "local/short"}, Name: "x"},
		"b:local/gone@old": {Volume: adapters.VolumeID{Backend: "b", ID: "local/gone"}, Name: "old"},
	} {
		h, err := adapters.ParseHandle(text)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := adapters.Resolve(t.Context(), a, h); err != nil || got != want {
			t.Errorf("%s: %v, %v", text, got, err)
		}
	}
	for text, kind := range map[string]fault.Kind{
		"b:~" + adapters.ShortName("nobody"): fault.NotFound,
		"b:short":                            fault.Invalid,
		"b:far/away@x":                       fault.Unavailable,
		"c:short@x":                          fault.Invalid,
	} {
		h, err := adapters.ParseHandle(text)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := adapters.Resolve(t.Context(), a, h); !errors.Is(err, kind) {
			t.Errorf("%s: %v, %v", text, got, err)
		}
	}
	h, _ := adapters.ParseHandle(s.ID.String())
	faults, _ := adapters.ParseFaults("Snapshots=unavailable")
	if _, err := adapters.Resolve(t.Context(), faults.Decorate(a), h); !errors.Is(err, fault.Unavailable) || !strings.Contains(err.Error(), h.Short) {
		t.Errorf("%v", err)
	}
}

func TestSecretNeverShows(t *testing.T) {
	s := adapters.NewSecret("hunter2")
	for _, text := range []string{fmt.Sprint(s), fmt.Sprintf("%v %+v %#v %q %s %x %d", s, s, s, s, s, s, s),
		fmt.Sprintf("%+v", adapters.Config{Secrets: map[string]adapters.Secret{"k": s}}), s.LogValue().String(), string(must(s.MarshalText()))} {
		if strings.Contains(text, "hunter2") || strings.Contains(text, "68756e74") || !strings.Contains(text, "***") {
			t.Errorf("%q", text)
		}
	}
	if s.Reveal() != "hunter2" {
		t.Error("Reveal lost it")
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}
