package adaptertest

import (
	"testing"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

// beginClone begins a clone.
func (s *suite) beginClone(t testing.TB, a adapters.Adapter, id adapters.SnapshotID, spec adapters.VolumeSpec) adapters.Target {
	t.Helper()
	c, _ := adapters.As[adapters.Cloner](a)
	return begun(t)(c.BeginClone(t.Context(), id, spec))
}

// overwrite writes all of a volume.
func overwrite(t testing.TB, v Volume, p []byte) {
	t.Helper()
	if _, err := v.WriteAt(p, 0); err != nil {
		t.Fatal(err)
	}
}

// clone makes volumes of a snapshot: of its size and larger, written to before they are committed and after, in a process
// that dies and another. Neither the volume, nor the snapshot, nor its volume notices what happens to the others.
func (s *suite) clone(t *testing.T) {
	a, v := s.open(t), s.Create(t, s.Size)
	want := s.pattern(t, s.Size)
	overwrite(t, v, want)
	of := s.snap(t, a, v.ID(), "origin")
	overwrite(t, v, random(seeded(t), s.Size))

	for _, size := range []int64{s.Size, s.Size + 3*s.Step} {
		id := s.Absent(t)
		spec := adapters.VolumeSpec{ID: id, Size: size, Token: "token: clone"}
		first := s.beginClone(t, a, of.ID, spec)
		if !first.Fresh() || first.ReadsZero() {
			broken(t, "a clone is fresh, and does not read as zeros", "fresh %v, reads zero %v", first.Fresh(), first.ReadsZero())
		}
		all := append(append([]byte(nil), want...), make([]byte, size-s.Size)...)
		holds(t, first, all)
		change := random(seeded(t), s.Step)
		succeed(t, "a clone can be written to", first.WriteAt(t.Context(), change, s.Size-s.Step))
		copy(all[s.Size-s.Step:], change)
		_, err := a.Volume(t.Context(), id)
		refuse(t, "a target is not a volume until Commit", err, fault.NotFound)
		succeed(t, "Close keeps a new target", first.Close())

		other := s.open(t)
		second := s.beginClone(t, other, of.ID, spec)
		holds(t, second, all)
		s.commit(t, other, second, id, all)
	}
	content(t, "a snapshot does not change with what is cloned from it", s.read(t, a, of.ID), want)

	id := s.Absent(t)
	last := s.beginClone(t, a, of.ID, adapters.VolumeSpec{ID: id, Size: s.Size, Token: "token: last"})
	succeed(t, "a snapshot is deleted though there are clones of it", a.DeleteSnapshot(t.Context(), of.ID))
	s.commit(t, a, last, id, want)
}

func (s *suite) cloneErrors(t *testing.T) {
	a, v := s.open(t), s.Create(t, s.Size)
	of := s.snap(t, a, v.ID(), "origin")
	c, _ := adapters.As[adapters.Cloner](a)
	id := s.Absent(t)
	good := adapters.VolumeSpec{ID: id, Size: s.Size, Token: "token: clone"}
	for what, change := range map[string]func(*adapters.VolumeSpec){
		"smaller than its snapshot": func(q *adapters.VolumeSpec) { q.Size -= s.Step },
		"over a volume":             func(q *adapters.VolumeSpec) { q.ID, q.Overwrite = v.ID(), true },
		"without a token":           func(q *adapters.VolumeSpec) { q.Token = "" },
	} {
		spec := good
		change(&spec)
		_, err := c.BeginClone(t.Context(), of.ID, spec)
		refuse(t, "a clone "+what+" is Invalid", err, fault.Invalid)
	}
	_, err := c.BeginClone(t.Context(), adapters.SnapshotID{Volume: of.ID.Volume, Name: "nothing"}, good)
	refuse(t, "a clone of what does not exist is NotFound", err, fault.NotFound)
	there := good
	there.ID = v.ID()
	_, err = c.BeginClone(t.Context(), of.ID, there)
	refuse(t, "a volume that exists is Busy", err, fault.Busy)

	target := s.begin(t, a, good)
	succeed(t, "Close keeps a new target", target.Close())
	_, err = c.BeginClone(t.Context(), of.ID, good)
	refuse(t, "a token that Begin was given is not one for a clone", err, fault.Invalid, fault.Busy)
	again := s.begin(t, a, good)
	succeed(t, "Abort removes a new target", again.Abort(t.Context()))
	given := s.beginClone(t, a, of.ID, good)
	succeed(t, "Abort removes a clone", given.Abort(t.Context()))
	_, err = a.Volume(t.Context(), id)
	refuse(t, "Abort removes a clone", err, fault.NotFound)
}
