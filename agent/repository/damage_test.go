package repository

import (
	"testing"
	"time"

	"stillpoint.io/stillpoint/fault"
)

// A record of damage holds until what was damaged is stored anew, and then goes with maintenance. Until then nobody builds
// on it; what took its place stays through every cycle.
func TestDamageRecords(t *testing.T) {
	t.Parallel()
	a := newAged(t)
	d := &disk{name: "v", chunks: make([]uint64, 100), random: true}
	for i := range d.chunks {
		d.chunks[i] = uint64(i)
	}
	first := a.backup(d, "first")
	image, err := a.repo.OpenImage(t.Context(), first)
	if err != nil {
		t.Fatal(err)
	}
	chunks, err := image.Chunks(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	bad := chunks[7]
	m, err := a.repo.OpenMedium(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second says nothing new
		if err := m.NoteDamage(t.Context(), []Chunk{bad, a.repo.ChunkOf([]byte("in no index"))}); err != nil {
			t.Fatal(err)
		}
	}
	if err := m.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	records := func(want int) {
		t.Helper()
		all, err := Records[damagedContents](t.Context(), a.repo, damagedRecord)
		if err != nil || len(all) != want {
			t.Errorf("%v, %v", all, err)
		}
	}
	hurt := func(want bool) {
		t.Helper()
		if why, err := a.repo.Hurt(t.Context(), first); err != nil || (why != "") != want {
			t.Errorf("hurt: %q, %v", why, err)
		}
	}
	where := func() string {
		t.Helper()
		pack, _, _, err := a.repo.Where(t.Context(), bad.String())
		if err != nil {
			t.Fatal(err)
		}
		return pack
	}
	records(1)
	hurt(true)
	a.leap(25 * time.Hour)
	a.maintain(MaintainOptions{Full: true})
	records(1)
	before := where()
	a.backup(d, "second")
	if now := where(); now == before {
		t.Error("it was not stored anew")
	}
	hurt(false)
	records(1)
	for range 5 {
		a.leap(25 * time.Hour)
		a.maintain(MaintainOptions{})
		a.check()
		records(0)
	}
	if err := a.repo.NoteDamageOf(t.Context(), fault.Errorf(fault.Corrupt, "of nothing in particular")); err != nil {
		t.Error(err)
	}
	records(0)
}
