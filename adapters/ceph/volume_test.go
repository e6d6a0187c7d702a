//go:build ceph && cgo

package ceph

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ceph/go-ceph/rbd"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

// TestKeys opens backends by every way to name a cluster and a key, and by wrong ones.
func TestKeys(t *testing.T) {
	t.Parallel()
	v := makeImage(t, freeName("rbd", ""), 4<<20, nil)
	text, err := os.ReadFile(running.keyring)
	must(t, err)
	_, key, _ := strings.Cut(strings.TrimSpace(string(text)), "key = ")
	conf, err := os.ReadFile(running.Conf)
	must(t, err)
	monitors := ""
	for line := range strings.Lines(string(conf)) {
		if name, value, ok := strings.Cut(line, "="); ok && strings.TrimSpace(name) == "mon host" {
			monitors = strings.TrimSpace(value)
		}
	}
	wrongKey := "AQAVUCdhj8DLCBAAKA9WzcQG6u44EeNooNObug=="
	absent := filepath.Join(t.TempDir(), "absent")
	for name, c := range map[string]struct {
		parameters map[string]string
		key        string
		want       fault.Kind // Internal: it works
	}{
		"conf and keyring":       {map[string]string{"conf": running.Conf, "user": testUser, "keyring": running.keyring}, "", fault.Internal},
		"conf and key":           {map[string]string{"conf": running.Conf, "user": "client." + testUser}, key, fault.Internal},
		"monitors and key":       {map[string]string{"monitors": monitors, "user": testUser}, key, fault.Internal},
		"a wrong key":            {map[string]string{"monitors": monitors, "user": testUser, "timeout": "5s"}, wrongKey, fault.Invalid},
		"a user that is none":    {map[string]string{"monitors": monitors, "user": "nobody", "timeout": "5s"}, key, fault.Invalid},
		"a keyring that is none": {map[string]string{"monitors": monitors, "user": testUser, "keyring": absent, "timeout": "5s"}, "", fault.Invalid},
		"a conf that is none":    {map[string]string{"conf": absent}, "", fault.Invalid},
		"monitors that are none": {map[string]string{"monitors": "127.0.0.1:1", "user": testUser, "timeout": "1s"}, key, fault.Unavailable},
	} {
		t.Run(name, func(t *testing.T) {
			config := adapters.Config{Name: "r", Parameters: c.parameters, Secrets: map[string]adapters.Secret{}}
			if c.key != "" {
				config.Secrets["key"] = adapters.NewSecret(c.key)
			}
			a, err := RBD().Open(t.Context(), config)
			must(t, err)
			defer a.Close()
			_, err = a.Volume(t.Context(), v.ID())
			if c.want == fault.Internal && err != nil || c.want != fault.Internal && fault.KindOf(err) != c.want {
				t.Errorf("%v (%v)", err, fault.KindOf(err))
			}
			// What cannot be reached is never taken for deleted.
			err = a.DeleteSnapshot(t.Context(), adapters.SnapshotID{Volume: v.ID(), Name: "x"})
			if (err == nil) != (c.want == fault.Internal) {
				t.Errorf("DeleteSnapshot: %v", err)
			}
			if s := fmt.Sprintf("%v %+v", err, config); strings.Contains(s, key) || strings.Contains(s, wrongKey) {
				t.Errorf("the key shows in %q", s)
			}
		})
	}
}

func TestSettings(t *testing.T) {
	for _, parameters := range []map[string]string{{"timeout": "10ms"}, {"diff": "fast"}, {"pool": "a/b"}, {"timeout": "x"}} {
		if a, err := RBD().Open(t.Context(), adapters.Config{Name: "r", Parameters: parameters}); !errors.Is(err, fault.Invalid) {
			t.Errorf("%v: %v, %v", parameters, a, err)
		}
	}
	if s := open(t, nil).Capabilities().Source; !strings.Contains(s.Version, ".") || !s.Tracked {
		t.Errorf("Ceph's libraries do not tell their version: %+v", s)
	}
	if s := open(t, map[string]string{"diff": "exact"}).Capabilities().Source; s.Tracked {
		t.Errorf("%+v", s)
	}
}

// TestTypedIDs: what names a volume besides its canonical id.
func TestTypedIDs(t *testing.T) {
	t.Parallel()
	a, limited := open(t, nil), open(t, map[string]string{"pool": "rbd"})
	n := imageName{"rbd", "", csiImagePrefix + imageUUID}
	v := makeImage(t, n, 4<<20, nil)
	handle := fmt.Sprintf("0001-0009-rook-ceph-%016x-%s", v.io.GetPoolID(), imageUUID)
	for _, x := range []struct {
		a  *Adapter
		id string
	}{{a, n.String()}, {a, handle}, {limited, handle}, {limited, n.image}, {limited, n.String()}} {
		vol, err := x.a.Volume(t.Context(), adapters.VolumeID{Backend: "r", ID: x.id})
		if err != nil || vol.ID != v.ID() {
			t.Errorf("%s: %+v, %v", x.id, vol, err)
		}
	}
	s, err := a.CreateSnapshot(t.Context(), adapters.VolumeID{Backend: "r", ID: handle}, "csi")
	must(t, err)
	if s.ID.Volume != v.ID() {
		t.Errorf("%+v", s)
	}
	typed := adapters.SnapshotID{Volume: adapters.VolumeID{Backend: "r", ID: handle}, Name: s.ID.Name}
	if _, err := a.Changed(t.Context(), typed, s.ID, 0); err != nil {
		t.Errorf("two spellings of one volume: %v", err)
	}
	for id, want := range map[string]fault.Kind{
		fmt.Sprintf("0001-0009-rook-ceph-%016x-%s", 999, imageUUID):                                            fault.NotFound, // no such pool
		fmt.Sprintf("0001-0009-rook-ceph-%016x-%s", v.io.GetPoolID(), strings.Replace(imageUUID, "6", "7", 1)): fault.NotFound,
		"absent/x":     fault.NotFound,
		"rbd/absent/x": fault.NotFound, // no such namespace
	} {
		if _, err := a.Volume(t.Context(), adapters.VolumeID{Backend: "r", ID: id}); fault.KindOf(err) != want {
			t.Errorf("%s: %v (%v)", id, err, fault.KindOf(err))
		}
	}
}

// TestSnapshotUnderUse: the image is written by a client that holds its lock.
func TestSnapshotUnderUse(t *testing.T) {
	t.Parallel()
	a := open(t, nil)
	v := makeImage(t, freeName("rbd", ""), 8<<20, nil)
	stop, done := make(chan struct{}), make(chan error, 1)
	go func() {
		p := bytes.Repeat([]byte{0x5A}, 8<<20)
		for {
			select {
			case <-stop:
				done <- nil
				return
			default:
			}
			if _, err := v.WriteAt(p, 0); err != nil {
				done <- err
				return
			}
		}
	}()
	t.Cleanup(func() { // before the image is closed
		close(stop)
		must(t, <-done)
	})
	for i := range 3 {
		s, err := a.CreateSnapshot(t.Context(), v.ID(), fmt.Sprintf("s-%d", i))
		must(t, err)
		must(t, a.Publish(t.Context(), s.ID, adapters.Notes{}))
		must(t, a.DeleteSnapshot(t.Context(), s.ID))
	}
	if left := snapshotsOf(t, v); len(left) > 0 {
		t.Errorf("%q are left", left)
	}
}

// TestClusterTurn: a change waits for one of another process, which is another client, and gives its turn back.
func TestClusterTurn(t *testing.T) {
	t.Parallel()
	a := open(t, nil)
	v := makeImage(t, freeName("rbd", ""), 1<<20, nil)
	giveBack, err := clusterTurn(&call{ctx: t.Context()}, v.io, v.name.image)
	must(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := a.CreateSnapshot(ctx, v.ID(), "early"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a snapshot was made while another process had its turn: %v", err)
	}
	giveBack()
	for _, name := range []string{"one", "two"} {
		_, err := a.CreateSnapshot(t.Context(), v.ID(), name)
		must(t, err)
	}
	n := freeName("rbd", "")
	if _, err := clusterTurn(&call{ctx: t.Context()}, v.io, n.image); !isAbsent(err) {
		t.Errorf("of an image that is none: %v", err)
	}
	if _, err := a.CreateSnapshot(t.Context(), n.id("r"), "x"); !errors.Is(err, fault.NotFound) {
		t.Errorf("a snapshot of an image that is none: %v", err)
	}
	if _, err := v.io.Stat(nameObject + n.image); !isAbsent(err) {
		t.Errorf("the name of an image that is none was made: %v", err)
	}
}

// TestClones: snapshots that have clones, of the new and of the old kind, and clones that have records of their parent.
func TestClones(t *testing.T) {
	t.Parallel()
	a := open(t, nil)
	v := makeImage(t, freeName("rbd", ""), 4<<20, nil)
	want := randomBytes(4 << 20)
	_, err := v.WriteAt(want, 0)
	must(t, err)
	v.close()
	for format := range uint64(2) {
		format++
		s, err := a.CreateSnapshot(t.Context(), v.ID(), fmt.Sprintf("parent-%d", format))
		must(t, err)
		must(t, a.Publish(t.Context(), s.ID, adapters.Notes{}))
		if format == 1 {
			w := openVolume(t, v.io, v.name)
			must(t, w.rbd.GetSnapshot(s.ID.Name).Protect())
			w.close()
		}
		n := freeName("rbd", "")
		o := rbd.NewRbdImageOptions()
		must(t, o.SetUint64(rbd.ImageOptionCloneFormat, format))
		must(t, rbd.CloneImage(v.io, v.name.image, s.ID.Name, v.io, n.image, o))
		o.Destroy()
		cleanUp(t, v.io, n)

		if _, err := a.Snapshot(t.Context(), adapters.SnapshotID{Volume: n.id("r"), Name: s.ID.Name}); !errors.Is(err, fault.NotFound) {
			t.Errorf("a clone has the snapshot of its parent: %v", err)
		}
		for s, err := range a.Snapshots(t.Context(), adapters.Filter{Volume: n.id("r"), Cutting: true}) {
			t.Errorf("listed of a clone: %+v, %v", s, err)
		}
		err = a.DeleteSnapshot(t.Context(), s.ID)
		if format == 1 {
			if !errors.Is(err, fault.Busy) {
				t.Errorf("a snapshot with clones of the old kind: %v", err)
			}
			if again, err := a.Snapshot(t.Context(), s.ID); err != nil || again.Mark != adapters.Verified {
				t.Errorf("it is not as it was: %+v, %v", again, err)
			}
		} else {
			must(t, err)
			if _, err := a.Snapshot(t.Context(), s.ID); !errors.Is(err, fault.NotFound) {
				t.Errorf("a deleted snapshot in the trash: %v", err)
			}
			must(t, a.DeleteSnapshot(t.Context(), s.ID))
		}

		c, err := a.CreateSnapshot(t.Context(), n.id("r"), "of-a-clone")
		must(t, err)
		if !bytes.Equal(readAll(t, a, c.ID), want) {
			t.Error("the clone has other bytes")
		}
	}
}

func readAll(t *testing.T, a *Adapter, id adapters.SnapshotID) []byte {
	t.Helper()
	img, err := a.Open(t.Context(), id)
	must(t, err)
	defer img.Close()
	p := make([]byte, img.Size())
	_, err = img.ReadAt(t.Context(), p, 0)
	must(t, err)
	return p
}

// TestListing lists images of several pools and namespaces, more than a page has, among unmarked ones.
func TestListing(t *testing.T) {
	t.Parallel()
	a := open(t, nil)
	a.page = 8
	marked := map[adapters.SnapshotID]bool{}
	prefix := fmt.Sprintf("list-%d-", images.Add(1))
	for i := range 40 {
		n := imageName{"rbd", "", fmt.Sprintf("%s%03d", prefix, i)}
		if i%2 == 1 {
			n.namespace = "twin"
		}
		if i%8 != 0 && i%8 != 1 {
			io := ioctx(t, n)
			o := rbd.NewRbdImageOptions()
			must(t, rbd.CreateImage(io, n.image, 1<<20, o))
			o.Destroy()
			t.Cleanup(func() { must(t, rbd.RemoveImage(io, n.image)) })
			continue
		}
		makeImage(t, n, 1<<20, nil).close()
		s, err := a.CreateSnapshot(t.Context(), n.id("r"), "listed")
		must(t, err)
		must(t, a.Publish(t.Context(), s.ID, adapters.Notes{}))
		marked[s.ID] = true
	}
	n := 0
	for s, err := range a.Snapshots(t.Context(), adapters.Filter{}) {
		must(t, err)
		if strings.Contains(s.ID.Volume.ID, prefix) {
			if !marked[s.ID] {
				t.Errorf("%s is listed twice, or is not ours", s.ID)
			}
			delete(marked, s.ID)
			n++
		}
	}
	if len(marked) > 0 {
		t.Errorf("%d were listed, these not: %v", n, marked)
	}
	for range a.Snapshots(t.Context(), adapters.Filter{}) {
		break
	}
}

// TestSweep: what dead processes left goes when it is old, and not before.
func TestSweep(t *testing.T) {
	t.Parallel()
	a := open(t, nil)
	v := makeImage(t, freeName("rbd", ""), 1<<20, nil)
	draft := draftName("x")
	_, err := v.rbd.CreateSnapshot(draft)
	must(t, err)
	for range a.Snapshots(t.Context(), adapters.Filter{Volume: v.ID(), Cutting: true}) {
		t.Error("a draft is listed")
	}
	s, err := a.CreateSnapshot(t.Context(), v.ID(), "x")
	must(t, err)
	must(t, a.Publish(t.Context(), s.ID, adapters.Notes{}))
	if left := snapshotsOf(t, v); !slices.Contains(left, draft) {
		t.Errorf("a young draft was taken away: %q", left)
	}
	must(t, a.cutOff(t.Context(), v.name, time.Now().Add(time.Minute)))
	if left := snapshotsOf(t, v); !slices.Equal(left, []string{"x"}) {
		t.Errorf("an old draft was not taken away, or more was: %q", left)
	}
}

// cutOff sweeps as if it were later.
func (a *Adapter) cutOff(ctx context.Context, n imageName, at time.Time) error {
	_, err := callOn(ctx, a, n.id(a.backend), "", func(one *call, name imageName) (none, error) {
		m, err := a.cluster.open(one, name, forChange)
		if err != nil {
			return none{}, err
		}
		one.later(m.release)
		return none{}, m.sweep(one, at)
	})
	return err
}

// TestOverwriteClone: zeros over a parent's data are zeros, and the snapshots before it stay.
func TestOverwriteClone(t *testing.T) {
	t.Parallel()
	a := open(t, nil)
	parent := makeImage(t, freeName("rbd", ""), 4<<20, nil)
	old := bytes.Repeat([]byte{0xA5}, 4<<20)
	_, err := parent.WriteAt(old, 0)
	must(t, err)
	_, err = parent.rbd.CreateSnapshot("base")
	must(t, err)
	n := freeName("rbd", "")
	o := rbd.NewRbdImageOptions()
	defer o.Destroy()
	must(t, o.SetUint64(rbd.ImageOptionCloneFormat, 2))
	must(t, rbd.CloneImage(parent.io, parent.name.image, "base", parent.io, n.image, o))
	cleanUp(t, parent.io, n)
	before, err := a.CreateSnapshot(t.Context(), n.id("r"), "before")
	must(t, err)

	target, err := a.Begin(t.Context(), adapters.VolumeSpec{ID: n.id("r"), Size: 4 << 20, Token: "x", Overwrite: true})
	must(t, err)
	defer target.Close()
	if target.ReadsZero() || target.Fresh() {
		t.Error("a clone that is overwritten reads as zeros")
	}
	want := bytes.Clone(old)
	for _, z := range [][2]int64{{0, 1 << order}, {1<<order + 1, 3 << order}, {5<<order - 4096, 8192}, {7 << order, 100}, {8<<order + 4096, 2 << order}, {4<<20 - 1, 1}} {
		must(t, target.Zero(t.Context(), z[0], z[1]))
		clear(want[z[0] : z[0]+z[1]])
	}
	must(t, target.WriteAt(t.Context(), []byte("new"), 12<<order))
	copy(want[12<<order:], "new")
	_, err = target.Commit(t.Context())
	must(t, err)
	after, err := a.CreateSnapshot(t.Context(), n.id("r"), "after")
	must(t, err)
	if !bytes.Equal(readAll(t, a, after.ID), want) {
		t.Error("Zero over a parent's data left some of it, or took too much")
	}
	if !bytes.Equal(readAll(t, a, before.ID), old) {
		t.Error("the snapshot before it changed")
	}
}

// withoutLock are the options of an image that has no exclusive lock.
var withoutLock = map[rbd.ImageOption]uint64{rbd.ImageOptionFeatures: rbd.FeatureLayering}

// TestRestoreWithoutLock restores over an image that has no exclusive lock, and into a namespace.
func TestRestoreWithoutLock(t *testing.T) {
	t.Parallel()
	a := open(t, nil)
	v := makeImage(t, freeName("rbd", "twin"), 1<<20, withoutLock)
	v.close()
	fresh := freeName("rbd", "twin")
	cleanUp(t, v.io, fresh)
	want := randomBytes(1 << 20)
	for _, spec := range []adapters.VolumeSpec{
		{ID: v.ID(), Size: 1 << 20, Token: "x", Overwrite: true},
		{ID: fresh.id("r"), Size: 1 << 20, Token: "x"},
	} {
		target, err := a.Begin(t.Context(), spec)
		must(t, err)
		must(t, target.WriteAt(t.Context(), want, 0))
		if _, err := a.Begin(t.Context(), spec); !errors.Is(err, fault.Busy) {
			t.Errorf("a second Begin: %v", err)
		}
		_, err = target.Commit(t.Context())
		must(t, err)
		s, err := a.CreateSnapshot(t.Context(), spec.ID, "restored")
		must(t, err)
		if !bytes.Equal(readAll(t, a, s.ID), want) {
			t.Errorf("%s has other bytes", spec.ID)
		}
		w := openVolume(t, v.io, imageOf(t, spec.ID))
		if text, err := w.rbd.GetMetadata(restoreKey); !isAbsent(err) {
			t.Errorf("the restored volume says that it is one: %q, %v", text, err)
		}
		w.close()
	}
}

func imageOf(t testing.TB, id adapters.VolumeID) imageName {
	n, err := parseImageName(id.ID, "")
	must(t, err)
	return n
}

// TestInvalidObjectMap: object maps that Ceph itself distrusts are not used.
func TestInvalidObjectMap(t *testing.T) {
	t.Parallel()
	a := open(t, nil)
	v := makeImage(t, freeName("rbd", ""), 4<<20, map[rbd.ImageOption]uint64{rbd.ImageOptionFeatures: rbd.FeatureLayering | rbd.FeatureExclusiveLock})
	_, err := v.WriteAt(randomBytes(1<<20), 0)
	must(t, err)
	one, err := a.CreateSnapshot(t.Context(), v.ID(), "one")
	must(t, err)
	must(t, v.rbd.UpdateFeatures(rbd.FeatureObjectMap|rbd.FeatureFastDiff, true)) // invalid until they are rebuilt
	_, err = v.WriteAt(randomBytes(4096), 8<<order)
	must(t, err)
	two, err := a.CreateSnapshot(t.Context(), v.ID(), "two")
	must(t, err)
	all, err := a.known(t.Context(), 0, two.ID, one.ID)
	must(t, err)
	d, err := a.openDiff(t.Context(), two.ID, all[0], &all[1])
	must(t, err)
	defer d.shut()
	if set, err := d.changedObjects(t.Context(), all[1]); set != nil || err != nil {
		t.Errorf("invalid object maps were believed: %v, %v", set, err)
	}
	if got := collect(t, a, one.ID, two.ID, 0); len(got) != 1 || got[0].Offset > 8<<order || got[0].End() < 8<<order+4096 {
		t.Errorf("%+v", got)
	}
}

// TestTwoLevel: what is asked exactly is what object maps show, and the bytes are the changed ones.
func TestTwoLevel(t *testing.T) {
	t.Parallel()
	a := open(t, nil)
	v := makeImage(t, freeName("rbd", ""), 64<<20, nil)
	_, err := v.WriteAt(randomBytes(64<<20), 0)
	must(t, err)
	one, err := a.CreateSnapshot(t.Context(), v.ID(), "one")
	must(t, err)
	_, err = v.WriteAt(randomBytes(8192), 100<<order)
	must(t, err)
	_, err = v.rbd.Discard(200<<order, 1<<order)
	must(t, err)
	two, err := a.CreateSnapshot(t.Context(), v.ID(), "two")
	must(t, err)
	all, err := a.known(t.Context(), 0, two.ID, one.ID)
	must(t, err)
	d, err := a.openDiff(t.Context(), two.ID, all[0], &all[1])
	must(t, err)
	defer d.shut()
	set, err := d.changedObjects(t.Context(), all[1])
	must(t, err)
	if got := members(set); !slices.Equal(got, []int64{100, 200, 255}) { // 255: the last that did not change, see changed
		t.Errorf("the objects %v are asked about", got)
	}
	got := collect(t, a, one.ID, two.ID, 0)
	if len(got) != 2 || got[0].Offset != 100<<order || got[0].Length != 8192 || got[0].Zero || got[1].Offset != 200<<order || got[1].Length != 1<<order || !got[1].Zero {
		t.Errorf("%+v", got)
	}
}
