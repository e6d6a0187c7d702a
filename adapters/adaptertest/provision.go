package adaptertest

import (
	"bytes"
	"context"
	"io"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

// places: where new volumes go follows from their wanted name alone, and handles of them are short enough.
func (s *suite) places(t *testing.T) {
	a := s.provisioner(t)
	p, _ := adapters.As[adapters.Provisioner](a)
	seen := map[adapters.VolumeID]string{}
	for _, wanted := range []string{"a", "pvc-01234567-89ab-cdef-0123-456789abcdef", "snapshot", "sp-x", "-x", "..", "A/B", "ünïcode", strings.Repeat("x", 128), strings.Repeat("x", 127) + "y"} {
		id, err := p.Place(t.Context(), wanted)
		succeed(t, "every name has a place", err)
		if again, err := p.Place(t.Context(), wanted); err != nil || again != id {
			broken(t, "a name has one place", "%q: %s and %s, %v", wanted, id, again, err)
		}
		if other, taken := seen[id]; taken {
			broken(t, "two names have two places", "%q and %q: %s", wanted, other, id)
		}
		if len(id.String()) > adapters.HandleMax {
			broken(t, "a volume of ours has a handle of at most 128 bytes", "%s has %d", id, len(id.String()))
		}
		seen[id] = wanted
		_, err = p.Origin(t.Context(), id)
		refuse(t, "a volume that is not there has no origin", err, fault.NotFound)
		succeed(t, "deleting a volume that is not there is success", p.DeleteVolume(t.Context(), id))
		succeed(t, "detaching a volume that is not there is success", p.Detach(t.Context(), id))
		_, err = p.Attach(t.Context(), id)
		refuse(t, "a volume that is not there is not attached", err, fault.NotFound)
		_, err = p.Grow(t.Context(), id, s.Size)
		refuse(t, "a volume that is not there is not grown", err, fault.NotFound)
	}
}

// provisioner opens an adapter that has a place for new volumes.
func (s *suite) provisioner(t testing.TB) adapters.Adapter {
	t.Helper()
	if testing.Short() {
		t.Skip("needs block devices, and root: left out by -short")
	}
	if s.Provision == nil {
		t.Skip("not tested: the harness has no place for new volumes")
	}
	a := s.Provision(t)
	t.Cleanup(func() {
		if err := a.Close(); err != nil {
			broken(t, "Close of an idle adapter succeeds", "%v", err)
		}
	})
	return a
}

// provision lives the life of a volume of ours: made, attached, written to, snapshotted, grown, detached, deleted.
func (s *suite) provision(t *testing.T) {
	ctx, a := t.Context(), s.provisioner(t)
	p, _ := adapters.As[adapters.Provisioner](a)
	id, err := p.Place(ctx, "Wanted "+t.Name())
	succeed(t, "every name has a place", err)
	origin := adapters.Origin{Name: "Wanted " + t.Name(), Source: "some:source@handle"}
	want := s.pattern(t, s.Size)
	target := s.begin(t, a, adapters.VolumeSpec{ID: id, Size: s.Size, Token: "token", Origin: origin})
	fill(t, target, want, 0, s.Size)
	_, err = p.Origin(ctx, id)
	refuse(t, "a target is not a volume until Commit", err, fault.NotFound)
	v, err := target.Commit(ctx)
	succeed(t, "Commit", err)
	t.Cleanup(func() {
		ctx := context.WithoutCancel(ctx)
		succeed(t, "Detach", p.Detach(ctx, id))
		succeed(t, "DeleteVolume", p.DeleteVolume(ctx, id))
	})
	if v.ID != id || v.Size < s.Size {
		broken(t, "the volume is where it was to be", "%+v, not %s of %d bytes", v, id, s.Size)
	}
	if got, err := p.Origin(ctx, id); err != nil || got != origin {
		broken(t, "a volume knows for whom it was made", "%+v, %v", got, err)
	}

	path, err := p.Attach(ctx, id)
	succeed(t, "Attach", err)
	for _, other := range []adapters.Adapter{a, s.provisioner(t)} { // as a process that comes after a crash
		q, _ := adapters.As[adapters.Provisioner](other)
		if again, err := q.Attach(ctx, id); err != nil || again != path {
			broken(t, "attaching twice is once", "%s and %s, %v", path, again, err)
		}
	}
	var st unix.Stat_t
	succeed(t, "the device is there", unix.Stat(path, &st))
	if v, err = a.Volume(ctx, id); err != nil || st.Mode&unix.S_IFMT != unix.S_IFBLK || uint64(v.Device) != st.Rdev {
		broken(t, "an attached volume has the device", "%s is %d, the volume's is %d, %v", path, st.Rdev, v.Device, err)
	}
	content(t, "the device holds what the volume was made with", s.device(t, path)[:s.Size], want)
	refuse(t, "an attached volume is not deleted", p.DeleteVolume(ctx, id), fault.Busy)

	held, err := os.OpenFile(path, os.O_RDWR|unix.O_EXCL, 0) // as a mount does
	succeed(t, "the device can be used", err)
	refuse(t, "a device in use is not detached", p.Detach(ctx, id), fault.Busy)
	change := random(seeded(t), s.Step)
	_, err = held.WriteAt(change, s.Size-s.Step)
	succeed(t, "the device can be written to", err)
	succeed(t, "the device can be written to", held.Sync())
	copy(want[s.Size-s.Step:], change)
	snap := s.snap(t, a, id, "of an attached volume")
	content(t, "a snapshot holds what was written to the device", s.read(t, a, snap.ID)[:s.Size], want)

	before, more := v.Size, 3*max(s.Step, sector)
	for range 2 {
		v, err = p.Grow(ctx, id, before+more)
		succeed(t, "a volume in use is grown", err)
	}
	if now := s.device(t, path); int64(len(now)) != v.Size || v.Size < before+more {
		broken(t, "the device grows with the volume", "the volume has %d bytes, the device %d, asked for %d", v.Size, len(now), before+more)
	} else {
		content(t, "what is new reads as zeros", now[before:], make([]byte, v.Size-before))
	}
	if small, err := p.Grow(ctx, id, s.Step); err != nil || small.Size != v.Size {
		broken(t, "a volume that is large enough is left alone", "%d bytes became %d, %v", v.Size, small.Size, err)
	}
	succeed(t, "closing the device", held.Close())

	succeed(t, "Detach", p.Detach(ctx, id))
	succeed(t, "detaching twice is once", p.Detach(ctx, id))
	path, err = p.Attach(ctx, id)
	succeed(t, "a volume is attached again", err)
	content(t, "a volume holds what was written to its device", s.device(t, path)[:s.Size], want)
	succeed(t, "Detach", p.Detach(ctx, id))
	succeed(t, "DeleteVolume", p.DeleteVolume(ctx, id))
	succeed(t, "deleting twice is once", p.DeleteVolume(ctx, id))
	_, err = a.Volume(ctx, id)
	refuse(t, "a volume that was deleted is gone", err, fault.NotFound)
	content(t, "the snapshots of a deleted volume stay", s.read(t, a, snap.ID)[:s.Size], want)
	succeed(t, "the snapshots of a deleted volume can be deleted", a.DeleteSnapshot(ctx, snap.ID))
}

// strangers: a volume that we did not make is nobody's to change.
func (s *suite) strangers(t *testing.T) {
	ctx, a := t.Context(), s.provisioner(t)
	p, _ := adapters.As[adapters.Provisioner](a)
	v := s.Create(t, s.Size)
	_, err := p.Origin(ctx, v.ID())
	refuse(t, "a stranger's volume has no origin", err, fault.Invalid)
	_, err = p.Attach(ctx, v.ID())
	refuse(t, "a stranger's volume is not attached", err, fault.Invalid)
	refuse(t, "a stranger's volume is not detached", p.Detach(ctx, v.ID()), fault.Invalid)
	_, err = p.Grow(ctx, v.ID(), 2*s.Size)
	refuse(t, "a stranger's volume is not grown", err, fault.Invalid)
	refuse(t, "a stranger's volume is not deleted", p.DeleteVolume(ctx, v.ID()), fault.Invalid)
	_, err = a.Volume(ctx, v.ID())
	succeed(t, "a stranger's volume stays", err)
}

// sector is what sizes of block devices are multiples of, at the least, in bytes.
const sector = 4096

// device reads all of a block device, past what is cached of it.
func (s *suite) device(t testing.TB, path string) []byte {
	t.Helper()
	f, err := os.Open(path)
	succeed(t, "the device can be read", err)
	defer f.Close()
	unix.IoctlSetInt(int(f.Fd()), unix.BLKFLSBUF, 0)
	var b bytes.Buffer
	_, err = io.Copy(&b, f)
	succeed(t, "the device can be read", err)
	return b.Bytes()
}
