//go:build ceph && cgo

package ceph

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/ceph/go-ceph/rbd"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

// cloned makes a volume of a snapshot.
func cloned(t *testing.T, a *Adapter, of adapters.SnapshotID, n imageName, size int64) {
	t.Helper()
	cleanUp(t, ioctx(t, n), n)
	target, err := a.BeginClone(t.Context(), of, adapters.VolumeSpec{ID: n.id("r"), Size: size, Token: "clone"})
	must(t, err)
	_, err = target.Commit(t.Context())
	must(t, err)
}

// TestCloneAcross: a clone in another namespace reads its data from where they are, also when the snapshot is deleted, and
// has nothing else of the image that it is from.
func TestCloneAcross(t *testing.T) {
	t.Parallel()
	a := open(t, nil)
	v := makeImage(t, freeName("rbd", ""), 4<<20, nil)
	want := randomBytes(4 << 20)
	_, err := v.WriteAt(want, 0)
	must(t, err)
	s, err := a.CreateSnapshot(t.Context(), v.ID(), "origin")
	must(t, err)
	must(t, v.rbd.SetMetadata(restoreKey, restoring{Image: "of-the-parent", Volume: "rbd/x", Size: 1}.encode()))
	v.close()
	n := freeName("rbd", "twin")
	cloned(t, a, s.ID, n, 6<<20)

	must(t, a.DeleteSnapshot(t.Context(), s.ID))
	c, err := a.CreateSnapshot(t.Context(), n.id("r"), "of-the-clone")
	must(t, err)
	must(t, a.Publish(t.Context(), c.ID, adapters.Notes{}))
	if got := readAll(t, a, c.ID); !bytes.Equal(got, append(bytes.Clone(want), make([]byte, 2<<20)...)) {
		t.Error("the clone has other bytes")
	}
	w := openVolume(t, ioctx(t, n), n)
	if parent, err := w.rbd.GetParent(); err != nil || parent.Image.ImageName != v.name.image {
		t.Errorf("it is not a clone: %+v, %v", parent, err)
	}
	m := &image{rbd: w.rbd, pool: w.io}
	m.id, err = w.rbd.GetId()
	must(t, err)
	one := &call{ctx: t.Context()}
	if left, err := m.metadata(one, ".stillpoint."); err != nil || len(left) != 1 {
		t.Errorf("more than its own snapshot's record is left in its metadata: %q, %v", left, err)
	}
}

// TestClonesRefused: what is copied rather than cloned.
func TestClonesRefused(t *testing.T) {
	t.Parallel()
	a := open(t, nil)
	refused := func(what string, a *Adapter, of adapters.SnapshotID) {
		t.Helper()
		n := freeName("rbd", "")
		_, err := a.BeginClone(t.Context(), of, adapters.VolumeSpec{ID: n.id("r"), Size: 1 << 20, Token: "clone"})
		if !errors.Is(err, fault.Unsupported) {
			t.Errorf("a clone of %s: %v (%v)", what, err, fault.KindOf(err))
		}
	}
	v := makeImage(t, freeName("rbd", ""), 1<<20, map[rbd.ImageOption]uint64{rbd.ImageOptionFeatures: rbd.FeatureExclusiveLock})
	v.close()
	s, err := a.CreateSnapshot(t.Context(), v.ID(), "origin")
	must(t, err)
	refused("an image that has not the feature layering", a, s.ID)

	last := makeImage(t, freeName("rbd", ""), 1<<20, nil)
	last.close()
	s, err = a.CreateSnapshot(t.Context(), last.ID(), "origin")
	must(t, err)
	text, err := os.ReadFile(running.Conf)
	must(t, err)
	conf := filepath.Join(t.TempDir(), "ceph.conf")
	must(t, os.WriteFile(conf, append(text, "\n[client]\nrbd default clone format = 1\n"...), 0o600))
	refused("a snapshot under a configuration that wants the old kind", open(t, map[string]string{"conf": conf}), s.ID)

	for i := range depthMax {
		n := freeName("rbd", "")
		cloned(t, a, s.ID, n, 1<<20)
		s, err = a.CreateSnapshot(t.Context(), n.id("r"), fmt.Sprintf("link-%d", i))
		must(t, err)
	}
	refused("the last of a long chain", a, s.ID)
}

// TestOrphanRecords: records without a snapshot go with the next publication.
func TestOrphanRecords(t *testing.T) {
	t.Parallel()
	a := open(t, nil)
	v := makeImage(t, freeName("rbd", ""), 1<<20, nil)
	for _, name := range []string{"gone", "kept"} {
		_, err := a.CreateSnapshot(t.Context(), v.ID(), name)
		must(t, err)
	}
	must(t, v.rbd.GetSnapshot("gone").Remove())
	s, err := a.CreateSnapshot(t.Context(), v.ID(), "last")
	must(t, err)
	must(t, a.Publish(t.Context(), s.ID, adapters.Notes{}))
	id, err := v.rbd.GetId()
	must(t, err)
	left, err := (&image{rbd: v.rbd, pool: v.io, id: id}).metadata(&call{ctx: t.Context()}, recordPrefix)
	must(t, err)
	if len(left) != 2 {
		t.Errorf("the records of 2 snapshots should be left: %q", left)
	}
}
