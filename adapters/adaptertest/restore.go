package adaptertest

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"testing"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

// begin begins a restore.
func (s *suite) begin(t testing.TB, a adapters.Adapter, spec adapters.VolumeSpec) adapters.Target {
	t.Helper()
	r, _ := adapters.As[adapters.Restorer](a)
	return begun(t)(r.Begin(t.Context(), spec))
}

// begun checks a beginning. The target is closed at the end of the test, which does nothing to one that was committed.
func begun(t testing.TB) func(adapters.Target, error) adapters.Target {
	return func(target adapters.Target, err error) adapters.Target {
		t.Helper()
		succeed(t, "Begin and BeginClone make a target, or open again what a dead process left", err)
		t.Cleanup(func() {
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			defer cancel()
			if err := target.Abort(ctx); err != nil {
				t.Errorf("broken promise: Abort after Commit, Abort or Close does nothing: %v", err)
			}
		})
		return target
	}
}

// fill writes want into the target, in parallel pieces, some unaligned; zeros are written only where they must be.
func fill(t testing.TB, target adapters.Target, want []byte, from, to int64) {
	t.Helper()
	const piece = 64<<10 + 512
	errs := make([]error, (to-from)/piece+1)
	var wg sync.WaitGroup
	for i := range errs {
		off := from + int64(i)*piece
		p := want[off:min(off+piece, to)]
		wg.Go(func() {
			switch {
			case len(p) == 0:
			case len(bytes.TrimLeft(p, "\x00")) > 0:
				errs[i] = target.WriteAt(t.Context(), p, off)
			case !target.ReadsZero():
				errs[i] = target.Zero(t.Context(), off, int64(len(p)))
			}
		})
	}
	wg.Wait()
	succeed(t, "WriteAt and Zero are safe in parallel", errors.Join(errs...))
}

// pattern is an image of n bytes with holes, and bytes at both ends.
func (s *suite) pattern(t testing.TB, n int64) []byte {
	p := random(seeded(t), n)
	clear(p[n/8 : n/4])
	clear(p[n/2 : n-n/8])
	return p
}

// commit commits, and checks what came of it by snapshotting and reading the new volume.
func (s *suite) commit(t testing.TB, a adapters.Adapter, target adapters.Target, id adapters.VolumeID, want []byte) {
	t.Helper()
	vol, err := target.Commit(t.Context())
	succeed(t, "Commit makes the volume visible", err)
	found, err := s.open(t).Volume(t.Context(), id)
	succeed(t, "Commit makes the volume visible", err)
	if vol.ID != found.ID || vol.Size != found.Size || vol.Size != int64(len(want)) {
		broken(t, "Commit answers with the volume", "%+v, and Volume with %+v, for %d bytes", vol, found, len(want))
	}
	succeed(t, "Close after Commit does nothing", target.Close())
	succeed(t, "Abort after Commit does nothing", target.Abort(t.Context()))
	if _, err := target.Commit(t.Context()); err == nil {
		broken(t, "Commit closes the target", "a second Commit succeeded")
	}
	if err := target.WriteAt(t.Context(), []byte{1}, 0); err == nil {
		broken(t, "Commit closes the target", "a write after it succeeded")
	}
	content(t, "a restored volume is what was written, holes included", s.read(t, a, s.snap(t, a, id, "restored").ID), want)
}

func (s *suite) restoreNew(t *testing.T) {
	a, id := s.open(t), s.Absent(t)
	want := s.pattern(t, s.Size)
	spec := adapters.VolumeSpec{ID: id, Size: s.Size, Token: "token: new/1"}
	target := s.begin(t, a, spec)
	fill(t, target, want, 0, s.Size)
	_, err := a.Volume(t.Context(), id)
	refuse(t, "a target is not a volume until Commit", err, fault.NotFound)
	_, err = a.CreateSnapshot(t.Context(), id, "early")
	refuse(t, "a target is not a volume until Commit", err, fault.NotFound)
	s.commit(t, a, target, id, want)

	r, _ := adapters.As[adapters.Restorer](a)
	for _, token := range []string{spec.Token, "another"} {
		spec.Token = token
		_, err = r.Begin(t.Context(), spec)
		refuse(t, "a volume that exists is not restored over unless that is asked", err, fault.Busy)
	}
}

// restoreResume lets a restore die and another process finish it.
func (s *suite) restoreResume(t *testing.T) {
	id := s.Absent(t)
	want := s.pattern(t, s.Size)
	spec := adapters.VolumeSpec{ID: id, Size: s.Size, Token: "token: resume"}
	half := s.Size / 2 / s.Step * s.Step
	for step, a := range []adapters.Adapter{s.open(t), s.open(t)} {
		target := s.begin(t, a, spec)
		r, _ := adapters.As[adapters.Restorer](s.open(t))
		_, err := r.Begin(t.Context(), spec)
		refuse(t, "a target that another process holds is Busy", err, fault.Busy)
		if target.Fresh() != (step == 0) {
			broken(t, "Fresh is true of a target's first Begin only", "%v at the Begin after %d", target.Fresh(), step)
		}
		if step == 0 {
			fill(t, target, want, 0, half)
			holds(t, target, want[:half])
			succeed(t, "Close keeps a new target", target.Close())
			_, err := a.Volume(t.Context(), id)
			refuse(t, "a target is not a volume until Commit", err, fault.NotFound)
			continue
		}
		holds(t, target, want[:half])
		fill(t, target, want, half, s.Size)
		s.commit(t, a, target, id, want)
	}
}

// holds checks what a target reads back, in pieces of which some are unaligned.
func holds(t testing.TB, target adapters.Target, want []byte) {
	t.Helper()
	p := make([]byte, 64<<10+512)
	for off := 0; off < len(want); off += len(p) {
		p := p[:min(len(p), len(want)-off)]
		err := target.ReadAt(t.Context(), p, int64(off))
		if fault.KindOf(err) == fault.Unsupported {
			return
		}
		succeed(t, "ReadAt reads what a target holds", err)
		content(t, "ReadAt reads what a target holds", p, want[off:off+len(p)])
	}
}

func (s *suite) restoreAbort(t *testing.T) {
	a, id := s.open(t), s.Absent(t)
	spec := adapters.VolumeSpec{ID: id, Size: s.Size, Token: "token: abort"}
	target := s.begin(t, a, spec)
	old := bytes.Repeat([]byte{0xA5}, int(s.Size))
	fill(t, target, old, 0, s.Size)
	succeed(t, "Abort removes a new target", target.Abort(t.Context()))
	succeed(t, "Close after Abort does nothing", target.Close())
	_, err := a.Volume(t.Context(), id)
	refuse(t, "an aborted restore leaves nothing", err, fault.NotFound)
	target = s.begin(t, a, spec)
	want := s.pattern(t, s.Size)
	fill(t, target, want, 0, s.Size)
	s.commit(t, a, target, id, want)
}

// restoreOverwrite restores over a volume full of old bytes: every one that survives shows.
func (s *suite) restoreOverwrite(t *testing.T) {
	a, v := s.open(t), s.create(t, s.Size)
	v.write(t, bytes.Repeat([]byte{0xA5}, int(s.Size)), 0)
	before := s.snap(t, a, v.ID(), "before")
	old := bytes.Clone(v.bytes)

	size := s.Size / 2 / s.Step * s.Step // smaller than the volume: the rest stays
	spec := adapters.VolumeSpec{ID: before.ID.Volume, Size: size, Token: "token: overwrite", Overwrite: true}
	want := bytes.Clone(v.bytes)
	copy(want, s.pattern(t, size))
	target := s.begin(t, a, spec)
	if target.Fresh() {
		broken(t, "Fresh is true of a target's first Begin only", "it is true of a volume that is overwritten")
	}
	holds(t, target, old[:size])
	fill(t, target, want[:size], 0, size)
	s.commit(t, a, target, before.ID.Volume, want)
	content(t, "a restore over a volume leaves its snapshots as they were", s.read(t, a, before.ID), old)

	target = s.begin(t, a, spec) // Zero at any offset, also where it is not a block's
	for _, z := range [][2]int64{{1, 1}, {511, 4098}, {s.Step, s.Step}, {size - 1, 1}} {
		succeed(t, "Zero makes a range read as zeros", target.Zero(t.Context(), z[0], z[1]))
		clear(want[z[0] : z[0]+z[1]])
	}
	succeed(t, "Abort leaves an overwritten volume as far as it was written", target.Abort(t.Context()))
	content(t, "Zero makes exactly its range read as zeros", s.read(t, a, s.snap(t, a, v.ID(), "zeroed").ID), want)
}

func (s *suite) restoreInUse(t *testing.T) {
	if s.Use == nil {
		t.Skip("not tested: the harness puts no volume in use")
	}
	a, v := s.open(t), s.create(t, s.Size)
	vol, err := a.Volume(t.Context(), v.ID())
	succeed(t, "Volume finds a volume", err)
	release := s.Use(t, v.Volume)
	r, _ := adapters.As[adapters.Restorer](a)
	spec := adapters.VolumeSpec{ID: vol.ID, Size: s.Size, Token: "in use", Overwrite: true}
	_, err = r.Begin(t.Context(), spec)
	refuse(t, "a volume in use is not overwritten", err, fault.Busy)
	release()
	succeed(t, "Close releases the volume", s.begin(t, a, spec).Close())
}

func (s *suite) restoreErrors(t *testing.T) {
	a, v := s.open(t), s.create(t, s.Size)
	r, _ := adapters.As[adapters.Restorer](a)
	vol, err := a.Volume(t.Context(), v.ID())
	succeed(t, "Volume finds a volume", err)
	for promise, c := range map[string]struct {
		spec adapters.VolumeSpec
		kind fault.Kind
	}{
		"what is not there is not overwritten":  {adapters.VolumeSpec{ID: s.Absent(t), Size: s.Size, Token: "x", Overwrite: true}, fault.NotFound},
		"a volume too small is not overwritten": {adapters.VolumeSpec{ID: vol.ID, Size: s.Size + s.Step, Token: "x", Overwrite: true}, fault.Invalid},
		"a volume that exists is not made":      {adapters.VolumeSpec{ID: vol.ID, Size: s.Size, Token: "x"}, fault.Busy},
		"a volume has a size":                   {adapters.VolumeSpec{ID: s.Absent(t), Size: 0, Token: "x"}, fault.Invalid},
		"a restore has a token":                 {adapters.VolumeSpec{ID: s.Absent(t), Size: s.Size}, fault.Invalid},
	} {
		_, err := r.Begin(t.Context(), c.spec)
		refuse(t, promise, err, c.kind)
	}
	target := s.begin(t, a, adapters.VolumeSpec{ID: s.Absent(t), Size: s.Size, Token: "bounds"})
	refuse(t, "a write beyond the target is Invalid", target.WriteAt(t.Context(), make([]byte, 2), s.Size-1), fault.Invalid)
	refuse(t, "a Zero beyond the target is Invalid", target.Zero(t.Context(), s.Size-1, 2), fault.Invalid)
	if err := target.ReadAt(t.Context(), make([]byte, 2), s.Size-1); fault.KindOf(err) != fault.Unsupported {
		refuse(t, "a read beyond the target is Invalid", err, fault.Invalid)
	}
	refuse(t, "a write before the target is Invalid", target.WriteAt(t.Context(), make([]byte, 2), -1), fault.Invalid)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := target.WriteAt(ctx, make([]byte, 4096), 0); !errors.Is(err, context.Canceled) {
		broken(t, "ctx cancels a write", "%v", err)
	}
	if err := target.Zero(ctx, 0, 4096); !errors.Is(err, context.Canceled) {
		broken(t, "ctx cancels a Zero", "%v", err)
	}
	succeed(t, "Abort removes a new target", target.Abort(t.Context()))
}
