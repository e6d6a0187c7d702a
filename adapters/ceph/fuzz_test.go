//go:build ceph && cgo

package ceph

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"testing"
	"time"

	"github.com/ceph/go-ceph/rbd"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/cbt"
)

// fuzzTime is how long TestDeltaFuzz runs for; STILLPOINT_RBD_FUZZ, such as 1h, is another time.
const fuzzTime = 15 * time.Second

// TestDeltaFuzz lets images live through random histories: writes, discards, shrinking and growing, clones, flattening,
// snapshots of strangers and of groups, deletions in any order. After each, for every pair of snapshots, in both
// directions, and from nothing, the delta is applied to the old content and must give the new one, as Ceph's own reads
// tell it. The adapter answers in three ways: as it does, asking every object, and believing object maps also where the
// sizes tell of a shrink, which it never does otherwise: what changes.changed says about shrinks is proved by that.
func TestDeltaFuzz(t *testing.T) {
	t.Parallel()
	length := fuzzTime
	if text := os.Getenv("STILLPOINT_RBD_FUZZ"); text != "" {
		var err error
		length, err = time.ParseDuration(text)
		must(t, err)
	}
	auto, exact, bold := open(t, nil), open(t, map[string]string{"diff": "exact"}), open(t, nil)
	bold.keepTwoLevel = true
	first := rand.Uint64()
	pairs, histories := 0, 0
	for end := time.Now().Add(length); time.Now().Before(end); histories++ {
		seed := first + uint64(histories)
		t.Run(fmt.Sprintf("seed-%d", seed), func(t *testing.T) {
			h := newHistory(t, auto, seed)
			for range 5 + h.r.IntN(4) {
				h.live()
			}
			for name, a := range map[string]*Adapter{"auto": auto, "exact": exact, "two-level": bold} {
				pairs += h.check(name, a)
			}
			if t.Failed() {
				t.Logf("the history was: %s", &h.log)
			}
		})
		if t.Failed() {
			break
		}
	}
	t.Logf("%d pairs in %d histories, from seed %d", pairs, histories, first)
	if histories == 0 || pairs == 0 {
		t.Error("nothing was tried")
	}
}

// moment is a snapshot with its content.
type moment struct {
	snap  adapters.Snapshot
	bytes []byte
}

// history is an image's life.
type history struct {
	t       *testing.T
	a       *Adapter
	r       *rand.Rand
	v       *volume
	moments []moment
	taken   int
	log     bytes.Buffer
}

const fuzzObject = 1 << order

func newHistory(t *testing.T, a *Adapter, seed uint64) *history {
	h := &history{t: t, a: a, r: rand.New(rand.NewPCG(seed, 0))}
	options := map[rbd.ImageOption]uint64{}
	switch h.r.IntN(8) {
	case 0: // without object maps
		options[rbd.ImageOptionFeatures] = rbd.FeatureLayering | rbd.FeatureExclusiveLock
	case 1: // striped
		options[rbd.ImageOptionStripeUnit], options[rbd.ImageOptionStripeCount] = 64<<10, 3
	}
	h.note("options %v", options)
	h.v = makeImage(t, freeName("rbd", ""), h.size(), options)
	return h
}

func (h *history) note(format string, args ...any) { fmt.Fprintf(&h.log, format+"; ", args...) }

// size is a new size of some objects, often not at the end of one.
func (h *history) size() int64 {
	n := int64(1+h.r.IntN(14)) * fuzzObject
	if h.r.IntN(2) == 0 {
		n += 512 * h.r.Int64N(fuzzObject/512)
	}
	return n
}

// live makes some changes and takes a snapshot.
func (h *history) live() {
	for range h.r.IntN(7) {
		h.change()
	}
	h.taken++
	wanted := fmt.Sprintf("m-%d", h.taken)
	s, err := h.a.CreateSnapshot(h.t.Context(), h.v.ID(), wanted)
	must(h.t, err)
	must(h.t, h.a.Publish(h.t.Context(), s.ID, adapters.Notes{Cut: wanted}))
	h.note("SNAPSHOT %s of %d", wanted, s.Size)
	h.moments = append(h.moments, moment{s, h.read(s.ID.Name, s.Size)})
}

// read reads a snapshot with nothing of the adapter.
func (h *history) read(snapshot string, size int64) []byte {
	img, err := rbd.OpenImageReadOnly(h.v.io, h.v.name.image, snapshot)
	must(h.t, err)
	defer img.Close()
	p := make([]byte, size)
	n, err := img.ReadAt(p, 0)
	must(h.t, err)
	if int64(n) != size {
		h.t.Fatalf("%d of %d bytes were read", n, size)
	}
	return p
}

func (h *history) change() {
	t, r, img := h.t, h.r, h.v.rbd
	current, err := img.GetSize()
	must(t, err)
	size := int64(current)
	off := r.Int64N(size)
	length := 1 + r.Int64N(min(size-off, 1<<(9+r.IntN(12))))
	switch k := r.IntN(24); {
	case k < 10:
		h.note("write %d+%d", off, length)
		_, err = img.WriteAt(fill(r, length), off)
	case k < 13:
		h.note("discard %d+%d", off, length)
		_, err = img.Discard(uint64(off), uint64(length))
	case k < 15:
		off -= off % fuzzObject
		length = min(size-off, fuzzObject*(1+r.Int64N(4)))
		h.note("discard objects %d+%d", off, length)
		_, err = img.Discard(uint64(off), uint64(length))
	case k < 18:
		to := h.size()
		h.note("resize %d to %d", size, to)
		err = img.Resize(uint64(to))
	case k == 18: // of a stranger
		h.note("foreign snapshot")
		_, err = img.CreateSnapshot(fmt.Sprintf("foreign-%d", r.Uint32()))
	case k == 19: // a group's
		h.note("group snapshot")
		err = h.group()
	case k == 20 && len(h.moments) > 0:
		i := r.IntN(len(h.moments))
		h.note("delete %s", h.moments[i].snap.ID.Name)
		err = h.a.DeleteSnapshot(t.Context(), h.moments[i].snap.ID)
		h.moments = append(h.moments[:i:i], h.moments[i+1:]...)
	case k == 21 && len(h.moments) > 0:
		h.clone(h.moments[r.IntN(len(h.moments))])
	case k == 22:
		if parent, e := img.GetParent(); e == nil && parent != nil {
			h.note("flatten")
			err = img.Flatten()
		}
	}
	must(t, err)
}

// fill is n bytes, random or zero.
func fill(r *rand.Rand, n int64) []byte {
	p := make([]byte, n)
	if r.IntN(5) > 0 {
		for i := range p {
			p[i] = byte(r.Uint32())
		}
	}
	return p
}

// group takes a snapshot of a group with the image in it.
func (h *history) group() error {
	name := "group-of-" + h.v.name.image
	if err := rbd.GroupCreate(h.v.io, name); err == nil {
		if err := rbd.GroupImageAdd(h.v.io, name, h.v.io, h.v.name.image); err != nil {
			return err
		}
		io, image := h.v.io, h.v.name.image
		h.t.Cleanup(func() {
			snaps, err := rbd.GroupSnapList(io, name)
			must(h.t, err)
			for _, s := range snaps {
				must(h.t, rbd.GroupSnapRemove(io, name, s.Name))
			}
			must(h.t, rbd.GroupImageRemove(io, name, io, image))
			must(h.t, rbd.GroupRemove(io, name))
		})
	}
	return rbd.GroupSnapCreate(h.v.io, name, fmt.Sprintf("s-%d", h.r.Uint32()))
}

// clone goes on with a clone of a snapshot, sometimes with the snapshot in the trash.
func (h *history) clone(of moment) {
	t := h.t
	n := freeName("rbd", "")
	o := rbd.NewRbdImageOptions()
	defer o.Destroy()
	must(t, o.SetUint64(rbd.ImageOptionCloneFormat, 2))
	must(t, o.SetUint64(rbd.ImageOptionOrder, order))
	must(t, rbd.CloneImage(h.v.io, h.v.name.image, of.snap.ID.Name, h.v.io, n.image, o))
	cleanUp(t, h.v.io, n)
	trash := h.r.IntN(2) == 0
	if trash {
		must(t, h.a.DeleteSnapshot(t.Context(), of.snap.ID))
	}
	h.note("CLONE of %s, in the trash: %v", of.snap.ID.Name, trash)
	h.v, h.moments = openVolume(t, h.v.io, n), nil
}

// check applies all deltas of an adapter, and returns how many.
func (h *history) check(way string, a *Adapter) (pairs int) {
	for _, target := range h.moments {
		d, err := a.Allocated(h.t.Context(), target.snap.ID, 0)
		must(h.t, err)
		h.apply(way, d, moment{}, target, 0)
		for _, base := range h.moments {
			d, err := a.Changed(h.t.Context(), base.snap.ID, target.snap.ID, 0)
			must(h.t, err)
			h.apply(way, d, base, target, 0)
			if way == "auto" {
				from := h.r.Int64N(target.snap.Size)
				d, err = a.Changed(h.t.Context(), base.snap.ID, target.snap.ID, from)
				must(h.t, err)
				h.apply(way, d, base, target, from)
			}
			pairs++
		}
	}
	return pairs
}

// apply checks a delta from an offset on.
func (h *history) apply(way string, d cbt.Delta, base, target moment, from int64) {
	h.t.Helper()
	image := make([]byte, len(target.bytes))
	copy(image, base.bytes)
	for e, err := range cbt.Check(d.Extents, from, d.TargetSize) {
		must(h.t, err)
		copy(image[e.Offset:e.End()], target.bytes[e.Offset:e.End()])
		if e.Zero && len(bytes.Trim(target.bytes[e.Offset:e.End()], "\x00")) > 0 {
			h.t.Errorf("%s, %q to %q: %+v is not zero", way, base.snap.ID.Name, target.snap.ID.Name, e)
		}
	}
	if bytes.Equal(image[from:], target.bytes[from:]) {
		return
	}
	for i := from; i < int64(len(image)); i++ {
		if image[i] != target.bytes[i] {
			h.t.Errorf("%s, %q to %q from %d: the byte at %d (object %d) is wrong", way, base.snap.ID.Name, target.snap.ID.Name, from, i, i/fuzzObject)
			return
		}
	}
}
