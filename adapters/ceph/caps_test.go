//go:build ceph && cgo

package ceph

import (
	"bytes"
	"errors"
	"testing"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/cbt"
	"stillpoint.io/stillpoint/fault"
)

// as opens the adapter as a new user with these capabilities and no others.
func as(t *testing.T, name string, more map[string]string, capabilities ...string) *Adapter {
	t.Helper()
	key, err := running.UserWith(t.Context(), name, capabilities...)
	must(t, err)
	c := adapters.Config{Name: "r", Parameters: map[string]string{"conf": running.Conf, "user": name}, Secrets: map[string]adapters.Secret{"key": adapters.NewSecret(key)}}
	for k, v := range more {
		c.Parameters[k] = v
	}
	a, err := RBD().Open(t.Context(), c)
	must(t, err)
	t.Cleanup(func() { must(t, a.Close()) })
	return a.(*Adapter)
}

// TestCapabilities: the least capabilities that the README names are enough, for a pool and for a namespace, and who may only
// read can do all that only reads.
func TestCapabilities(t *testing.T) {
	t.Parallel()
	pool := as(t, "pool", map[string]string{"pool": "rbd"}, "mon", "profile rbd", "osd", "profile rbd pool=rbd")
	space := as(t, "space", nil, "mon", "profile rbd", "osd", "profile rbd pool=rbd namespace=twin")
	reader := as(t, "reader", nil, "mon", "profile rbd-read-only", "osd", "profile rbd-read-only")
	for name, c := range map[string]struct {
		a *Adapter
		n imageName
	}{"pool": {pool, freeName("rbd", "")}, "namespace": {space, freeName("rbd", "twin")}} {
		t.Run(name, func(t *testing.T) {
			v := makeImage(t, c.n, 1<<20, nil)
			want := randomBytes(1 << 20)
			_, err := v.WriteAt(want, 0)
			must(t, err)
			v.close()
			_, err = c.a.Gate(t.Context(), []adapters.VolumeID{v.ID()})
			must(t, err)
			s, err := c.a.CreateSnapshot(t.Context(), v.ID(), "snap")
			must(t, err)
			must(t, c.a.Publish(t.Context(), s.ID, adapters.Notes{}))
			for _, a := range []*Adapter{c.a, reader} {
				d, err := a.Allocated(t.Context(), s.ID, 0)
				must(t, err)
				if n, err := cbt.Sum(d.Extents); err != nil || n.Data != 1<<20 {
					t.Errorf("%+v, %v", n, err)
				}
				if !bytes.Equal(readAll(t, a, s.ID), want) {
					t.Error("other bytes were read")
				}
				listed := 0
				for _, err := range a.Snapshots(t.Context(), adapters.Filter{Volume: v.ID()}) {
					must(t, err)
					listed++
				}
				if listed != 1 {
					t.Errorf("%d snapshots are listed", listed)
				}
			}
			if _, err := reader.CreateSnapshot(t.Context(), v.ID(), "read-only"); !errors.Is(err, fault.Unsupported) {
				t.Errorf("a snapshot by who may only read: %v (%v)", err, fault.KindOf(err))
			}
			if err := reader.DeleteSnapshot(t.Context(), s.ID); !errors.Is(err, fault.Unsupported) {
				t.Errorf("a deletion by who may only read: %v (%v)", err, fault.KindOf(err))
			}
			clone := freeName("rbd", c.n.namespace)
			cloned(t, c.a, s.ID, clone, 1<<20)
			restored := freeName("rbd", c.n.namespace)
			cleanUp(t, v.io, restored)
			target, err := c.a.Begin(t.Context(), adapters.VolumeSpec{ID: restored.id("r"), Size: 1 << 20, Token: "caps"})
			must(t, err)
			must(t, target.WriteAt(t.Context(), want, 0))
			_, err = target.Commit(t.Context())
			must(t, err)
			must(t, c.a.DeleteSnapshot(t.Context(), s.ID))
		})
	}
	for s, err := range space.Snapshots(t.Context(), adapters.Filter{}) { // of all pools: those it may not see are left out
		must(t, err)
		if imageOf(t, s.ID.Volume).namespace != "twin" {
			t.Errorf("%s is listed", s.ID)
		}
	}
}
