package backup

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"path/filepath"
	"sync/atomic"
	"testing"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/adapters/mem"
	"stillpoint.io/stillpoint/agent/repository"
	"stillpoint.io/stillpoint/fault"
)

func target(id string) adapters.VolumeID { return adapters.VolumeID{Backend: "mem", ID: id} }

// Over an existing volume that is larger and full of something else, from a backup and from a snapshot: everything
// that the source does not have reads as zeros, to the volume's end.
func TestRestoreOverwrites(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 64<<10, 9<<20+4097)
	rng := rand.New(rand.NewPCG(5, 6))
	w.write(random(rng, 3<<20), 100)
	w.write(make([]byte, 1<<20), 6<<20) // written zeros
	w.write([]byte{1}, 9<<20+4096)
	s, want := w.cut()
	r := w.backup(s)
	for name, source := range map[string]Source{"backup": FromBackup(w.repo, backupID(t, r.Backup)), "snapshot": FromSnapshot(w.adapter, s)} {
		v, err := w.store.Create("old-"+name, 70<<20+512)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := v.WriteAt(bytes.Repeat([]byte{0xA5}, 70<<20+512), 0); err != nil {
			t.Fatal(err)
		}
		q := RestoreRequest{Source: source, Target: w.adapter, Volume: target("old-" + name), Overwrite: true}
		got, err := Restore(t.Context(), q)
		if err != nil {
			t.Fatal(err)
		}
		if got.Size != 70<<20+512 || got.BytesZeroed == 0 || got.BytesWritten < 3<<20 || got.Volume != "mem:local/old-"+name {
			t.Errorf("%s: %+v", name, got)
		}
		mustEqual(t, name, w.volumeContent(adapters.VolumeID{Backend: "mem", ID: "local/old-" + name}), want.resized(70<<20+512))
	}
}

// A snapshot becomes a new volume of its backend without a byte being moved, unless that is asked for; where the backend
// cannot it is copied.
func TestRestoreClones(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 64<<10, 3<<20)
	w.write(random(rand.New(rand.NewPCG(6, 6)), 2<<20), 4096)
	s, want := w.cut()
	for name, q := range map[string]RestoreRequest{
		"clone":   {Target: w.adapter},
		"larger":  {Target: w.adapter, Size: 5 << 20},
		"copy":    {Target: w.adapter, Copy: true},
		"cannot":  {Target: copier{w.adapter.(*mem.Adapter)}},
		"another": {Target: w.store.Adapter("other")},
	} {
		cloned := name == "clone" || name == "larger"
		q.Source = FromSnapshot(w.adapter, s)
		q.Volume = adapters.VolumeID{Backend: "mem", ID: name}
		if name == "another" {
			q.Volume.Backend = "other"
		}
		r, err := Restore(t.Context(), q)
		if err != nil || r.Cloned != cloned || (r.BytesWritten == 0) != cloned {
			t.Errorf("%s: %+v, %v", name, r, err)
			continue
		}
		mustEqual(t, name, w.volumeContent(adapters.VolumeID{Backend: "mem", ID: "local/" + name}), want.resized(r.Size))
	}
	twice := RestoreRequest{Source: FromSnapshot(w.adapter, s), Target: w.adapter, Volume: target("clone")}
	if _, err := Restore(t.Context(), twice); fault.KindOf(err) != fault.Busy {
		t.Errorf("over a volume that exists: %v", err)
	}
}

// copier is a backend that cannot share a snapshot's blocks with this volume.
type copier struct{ *mem.Adapter }

func (copier) BeginClone(context.Context, adapters.SnapshotID, adapters.VolumeSpec) (adapters.Target, error) {
	return nil, fault.Errorf(fault.Unsupported, "another pool")
}

func TestRestoreSizes(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 64<<10, 5<<20)
	w.write([]byte("here"), 1<<20)
	s, want := w.cut()
	source := FromBackup(w.repo, backupID(t, w.backup(s).Backup))
	if _, err := w.store.Create("small", 5<<20-1); err != nil {
		t.Fatal(err)
	}
	for name, q := range map[string]RestoreRequest{
		"smaller, new":         {Volume: target("new"), Size: 5<<20 - 1},
		"smaller, overwritten": {Volume: target("small"), Overwrite: true},
	} {
		q.Source, q.Target = source, w.adapter
		if _, err := Restore(t.Context(), q); fault.KindOf(err) != fault.Invalid {
			t.Errorf("%s: %v", name, err)
		}
	}
	got, err := Restore(t.Context(), RestoreRequest{Source: source, Target: w.adapter, Volume: target("new"), Size: 6 << 20})
	if err != nil || got.Size != 6<<20 {
		t.Fatalf("%+v, %v", got, err)
	}
	mustEqual(t, "larger", w.volumeContent(adapters.VolumeID{Backend: "mem", ID: "local/new"}), want.resized(6<<20))

	for name, q := range map[string]RestoreRequest{
		"no such backup":   {Source: FromBackup(w.repo, "none"), Volume: target("x")},
		"no such snapshot": {Source: FromSnapshot(w.adapter, adapters.SnapshotID{Volume: s.Volume, Name: "none"}), Volume: target("x")},
		"no such volume":   {Source: source, Volume: target("none"), Overwrite: true},
	} {
		q.Target = w.adapter
		if _, err := Restore(t.Context(), q); fault.KindOf(err) != fault.NotFound {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// canceller cancels a context after some reads.
type canceller struct {
	*mem.Adapter
	left   *atomic.Int64
	cancel context.CancelFunc
}

type cancelledImage struct {
	adapters.Image
	c canceller
}

func (c canceller) Open(ctx context.Context, id adapters.SnapshotID) (adapters.Image, error) {
	i, err := c.Adapter.Open(ctx, id)
	return cancelledImage{i, c}, err
}

func (i cancelledImage) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	if i.c.left.Add(-1) == 0 {
		i.c.cancel()
	}
	return i.Image.ReadAt(ctx, p, off)
}

// Cancelled anywhere, a backup and a restore end with the context's error, hold nothing open, and the next is right.
func TestCancel(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 64<<10, 8<<20)
	rng := rand.New(rand.NewPCG(7, 8))
	w.write(random(rng, 8<<20), 0)
	s, want := w.cut()
	for n := range int64(9) {
		ctx, cancel := context.WithCancel(t.Context())
		left := new(atomic.Int64)
		left.Store(n)
		if n == 0 {
			cancel()
		}
		q := w.request(s)
		q.Adapter = canceller{w.adapter.(*mem.Adapter), left, cancel}
		if r, err := Run(ctx, q); n < 8 && !errors.Is(err, context.Canceled) {
			t.Errorf("backup cancelled at read %d: %+v, %v", n, r, err)
		}
		if n == 0 {
			left.Store(1)
		} else {
			left.Store(n)
		}
		ctx, cancel2 := context.WithCancel(t.Context())
		q2 := RestoreRequest{Source: FromSnapshot(canceller{w.adapter.(*mem.Adapter), left, cancel2}, s), Target: w.adapter, Volume: target("v"), Copy: true}
		if r, err := Restore(ctx, q2); n < 8 && !errors.Is(err, context.Canceled) {
			t.Errorf("restore cancelled at read %d: %+v, %v", n, r, err)
		}
		if n < 8 {
			if _, err := w.adapter.Volume(t.Context(), target("v")); fault.KindOf(err) != fault.NotFound {
				t.Errorf("cancelled, and the volume is there: %v", err)
			}
		}
		cancel()
		cancel2()
	}
	q := w.request(s)
	q.ID = "after"
	r, err := Run(t.Context(), q)
	if err != nil {
		t.Fatal(err)
	}
	mustEqual(t, "after", w.content(r.Backup), want)
}

// gate is an adapter whose snapshots are read only when somebody opens the gate.
type gate struct {
	*mem.Adapter
	reached chan struct{} // a read is waiting
	open    chan struct{}
}

type gatedImage struct {
	adapters.Image
	g gate
}

func (g gate) Open(ctx context.Context, id adapters.SnapshotID) (adapters.Image, error) {
	i, err := g.Adapter.Open(ctx, id)
	return gatedImage{i, g}, err
}

func (i gatedImage) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	select {
	case i.g.reached <- struct{}{}:
	default:
	}
	<-i.g.open
	return i.Image.ReadAt(ctx, p, off)
}

// Two backups of one volume at once: the second is refused, in this process and in another one of this host; a backup of
// another volume is not.
func TestAtOnce(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 64<<10, 8<<20)
	rng := rand.New(rand.NewPCG(9, 10))
	w.write(random(rng, 8<<20), 0)
	s, want := w.cut()
	locks := filepath.Join(t.TempDir(), "locks")
	open := func(locks string) *repository.Repository {
		r, err := repository.Open(t.Context(), w.at, passphrase, repository.OpenOptions{Host: "test", Locks: locks})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { r.Close(context.Background()) })
		return r
	}
	here, there, elsewhere := open(locks), open(locks), open("")
	g := gate{w.adapter.(*mem.Adapter), make(chan struct{}, 1), make(chan struct{})}
	finished := make(chan error)
	go func() {
		_, err := Run(t.Context(), Request{Adapter: g, Snapshot: s, Repository: here})
		finished <- err
	}()
	<-g.reached
	for name, r := range map[string]*repository.Repository{"in this process": here, "in another": there} {
		for _, id := range []string{"", "another-id"} {
			if _, err := Run(t.Context(), Request{Adapter: w.adapter, Snapshot: s, Repository: r, ID: id}); fault.KindOf(err) != fault.Busy {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
	other, err := w.store.Create("other", 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	cut, err := w.adapter.CreateSnapshot(t.Context(), adapters.VolumeID{Backend: "mem", ID: other.ID()}, "x")
	if err == nil {
		err = w.adapter.Publish(t.Context(), cut.ID, adapters.Notes{})
	}
	if err == nil {
		_, err = Run(t.Context(), Request{Adapter: w.adapter, Snapshot: cut.ID, Repository: there})
	}
	if err != nil {
		t.Errorf("another volume: %v", err)
	}
	// A host that shares no locks makes the same backup: one remains, and both are told of it.
	r, err := Run(t.Context(), Request{Adapter: w.adapter, Snapshot: s, Repository: elsewhere})
	if err != nil {
		t.Error(err)
	}
	close(g.open)
	if err := <-finished; err != nil {
		t.Error(err)
	}
	mustEqual(t, "the one", w.content(r.Backup), want)
	if all, err := w.repo.Backups(t.Context(), repositoryFilter); err != nil || len(all) != 2 {
		t.Errorf("%d backups: %v", len(all), err)
	}
}
