package mem

import (
	"context"
	"iter"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/cbt"
	"stillpoint.io/stillpoint/cbt/audit"
	"stillpoint.io/stillpoint/fault"
)

// Adapter is one process's view of a store. It is made by Store.Adapter.
type Adapter struct {
	store   *Store
	backend string
	closed  atomic.Bool
	images  atomic.Int64 // open ones
	targets atomic.Int64
}

var (
	_ adapters.Adapter  = (*Adapter)(nil)
	_ adapters.Gater    = (*Adapter)(nil)
	_ adapters.Stager   = (*Adapter)(nil)
	_ adapters.Differ   = (*Adapter)(nil)
	_ adapters.Opener   = (*Adapter)(nil)
	_ adapters.Restorer = (*Adapter)(nil)
	_ adapters.Cloner   = (*Adapter)(nil)
)

// Adapter opens the store as a backend of that name.
func (s *Store) Adapter(backend string) *Adapter { return &Adapter{store: s, backend: backend} }

// Capabilities describes the adapter.
func (a *Adapter) Capabilities() adapters.Capabilities {
	return adapters.Capabilities{
		Quiesce:     "nothing to quiesce: a write is in the volume when it returns",
		Changed:     "comparison of shared chunks of 64 KiB by address: exact",
		PointInTime: "CreateSnapshot's return: the volume's tree is shared under its lock",
		Confidence:  cbt.Exact,
		Source:      audit.Source{Name: "mem"},
		NodeLocal:   true,
	}
}

// Volume looks a volume up by NAME or LOCALITY/NAME.
func (a *Adapter) Volume(ctx context.Context, id adapters.VolumeID) (adapters.Volume, error) {
	defer a.store.lock()()
	v, err := a.volume(ctx, id)
	if err != nil {
		return adapters.Volume{}, err
	}
	return a.live(v), nil
}

// CreateSnapshot shares the volume's tree.
func (a *Adapter) CreateSnapshot(ctx context.Context, id adapters.VolumeID, wanted string) (adapters.Snapshot, error) {
	defer a.store.lock()()
	v, err := a.volume(ctx, id)
	if err != nil {
		return adapters.Snapshot{}, err
	}
	if wanted == "" {
		return adapters.Snapshot{}, fault.Errorf(fault.Invalid, "volume %s: a snapshot needs a name", id)
	}
	k := key{v.id, adapters.Name(wanted)}
	if s := a.store.snapshots[k]; s != nil {
		switch {
		case s.info.Mark == "":
			return adapters.Snapshot{}, fault.Errorf(fault.Busy, "volume %s: the name %s is taken by a snapshot that is not ours; choose another", id, k.name)
		case s.info.Wanted != wanted:
			return adapters.Snapshot{}, fault.Errorf(fault.Busy, "volume %s: the name %s is taken by the snapshot %q; choose another", id, k.name, s.info.Wanted)
		}
		return a.info(s), nil
	}
	if err := v.takeOver(ctx); err != nil {
		return adapters.Snapshot{}, err
	}
	delete(a.store.stages, key{v.id, wanted})
	s := v.snapshot(wanted, adapters.Cutting)
	set(&a.store.snapshots, k, s)
	return a.info(s), nil
}

// Publish turns the mark.
func (a *Adapter) Publish(ctx context.Context, id adapters.SnapshotID, notes adapters.Notes) error {
	defer a.store.lock()()
	s, err := a.snapshot(ctx, id)
	if err != nil {
		return err
	}
	notes.Unverified = slices.Clone(notes.Unverified)
	s.info.Mark, s.info.Notes = adapters.Verified, notes
	return nil
}

// Snapshot looks a snapshot of ours up.
func (a *Adapter) Snapshot(ctx context.Context, id adapters.SnapshotID) (adapters.Snapshot, error) {
	defer a.store.lock()()
	s, err := a.snapshot(ctx, id)
	if err != nil {
		return adapters.Snapshot{}, err
	}
	return a.info(s), nil
}

// DeleteSnapshot removes a snapshot of ours. Images of it that are open read no more.
func (a *Adapter) DeleteSnapshot(ctx context.Context, id adapters.SnapshotID) error {
	defer a.store.lock()()
	if err := a.reach(ctx, id.Volume); err != nil {
		return err
	}
	k := key{id.Volume.ID, id.Name}
	s := a.store.snapshots[k]
	if s == nil {
		return nil
	}
	if s.info.Mark == "" {
		return fault.Errorf(fault.Invalid, "snapshot %s is not ours and stays", id)
	}
	s.gone.Store(true)
	delete(a.store.snapshots, k)
	return nil
}

// Snapshots lists snapshots of ours in the localities that can be reached.
func (a *Adapter) Snapshots(ctx context.Context, f adapters.Filter) iter.Seq2[adapters.Snapshot, error] {
	return func(yield func(adapters.Snapshot, error) bool) {
		list, err := a.list(ctx, f)
		if err != nil {
			yield(adapters.Snapshot{}, err)
			return
		}
		for _, s := range list {
			if err := ctx.Err(); err != nil {
				yield(adapters.Snapshot{}, err)
				return
			}
			if !yield(s, nil) {
				return
			}
		}
	}
}

func (a *Adapter) list(ctx context.Context, f adapters.Filter) ([]adapters.Snapshot, error) {
	defer a.store.lock()()
	if err := a.usable(ctx); err != nil {
		return nil, err
	}
	if f.Volume != (adapters.VolumeID{}) {
		if err := a.reach(ctx, f.Volume); err != nil {
			return nil, err
		}
	}
	var list []adapters.Snapshot
	for k, s := range a.store.snapshots {
		switch {
		case s.info.Mark == "", s.info.Mark == adapters.Cutting && !f.Cutting:
		case f.Volume.ID != "" && k.volume != f.Volume.ID:
		case a.store.away[locality(k.volume)]:
		default:
			list = append(list, a.info(s))
		}
	}
	return list, nil
}

// Gate says that the volumes are there.
func (a *Adapter) Gate(ctx context.Context, ids []adapters.VolumeID) (adapters.Forecast, error) {
	defer a.store.lock()()
	for _, id := range ids {
		if _, err := a.volume(ctx, id); err != nil {
			return adapters.Forecast{}, err
		}
	}
	return adapters.Forecast{Frozen: time.Microsecond}, nil
}

// Stage keeps a tree ahead. It saves nothing, and is here so that callers meet a Stager.
func (a *Adapter) Stage(ctx context.Context, id adapters.VolumeID, wanted string) error {
	defer a.store.lock()()
	v, err := a.volume(ctx, id)
	if err != nil {
		return err
	}
	if wanted == "" {
		return fault.Errorf(fault.Invalid, "volume %s: a snapshot needs a name", id)
	}
	set(&a.store.stages, key{v.id, wanted}, v.snapshot(wanted, "").tree)
	return nil
}

// Unstage forgets it.
func (a *Adapter) Unstage(ctx context.Context, id adapters.VolumeID, wanted string) error {
	defer a.store.lock()()
	v, err := a.volume(ctx, id)
	if err != nil {
		return err
	}
	delete(a.store.stages, key{v.id, wanted})
	return nil
}

// Staged is how many stages the store holds: a cut leaves none behind.
func (s *Store) Staged() int {
	defer s.lock()()
	return len(s.stages)
}

// Allocated walks the snapshot's tree.
func (a *Adapter) Allocated(ctx context.Context, id adapters.SnapshotID, from int64) (cbt.Delta, error) {
	defer a.store.lock()()
	s, err := a.readableAs(ctx, id, adapters.BlockForm)
	if err != nil {
		return cbt.Delta{}, err
	}
	return a.delta(ctx, nil, s, from)
}

// Changed walks both trees and steps over what they share.
func (a *Adapter) Changed(ctx context.Context, base, target adapters.SnapshotID, from int64) (cbt.Delta, error) {
	defer a.store.lock()()
	b, err := a.readableAs(ctx, base, adapters.BlockForm)
	if err != nil {
		return cbt.Delta{}, err
	}
	t, err := a.readableAs(ctx, target, adapters.BlockForm)
	if err != nil {
		return cbt.Delta{}, err
	}
	if base.Volume != target.Volume {
		return cbt.Delta{}, fault.Errorf(fault.Invalid, "snapshots %s and %s are of different volumes", base, target)
	}
	return a.delta(ctx, b, t, from)
}

func (a *Adapter) delta(ctx context.Context, base, target *snapshot, from int64) (cbt.Delta, error) {
	size := target.info.Size
	if from < 0 || from > size {
		return cbt.Delta{}, fault.Errorf(fault.Invalid, "snapshot %s: from %d is not within its %d bytes", a.info(target).ID, from, size)
	}
	d := cbt.Delta{TargetSize: size, Granularity: chunkSize, Confidence: cbt.Exact}
	if base == nil {
		d.Extents = extents(ctx, nil, &target.tree, from, SizeMax, size)
		return d, nil
	}
	d.BaseSize = base.info.Size
	split := int64(SizeMax)
	if size > d.BaseSize {
		split = d.BaseSize &^ (chunkSize - 1)
	}
	d.Extents = extents(ctx, &base.tree, &target.tree, from, split, size)
	return d, nil
}

// Close ends the view. It reports what was left open.
func (a *Adapter) Close() error {
	if a.closed.Swap(true) {
		return fault.Errorf(fault.Invalid, "backend %s: closed twice", a.backend)
	}
	if images, targets := a.images.Load(), a.targets.Load(); images+targets > 0 {
		return fault.Errorf(fault.Invalid, "backend %s: closed with %d images and %d targets still open", a.backend, images, targets)
	}
	return nil
}

// Kill ends the view as the death of its process would: nothing is closed, and what it held is let go.
func (a *Adapter) Kill() {
	defer a.store.lock()()
	a.closed.Store(true)
	for _, t := range a.store.targets {
		if t.holder == a {
			t.holder = nil
		}
	}
}

// The helpers below are called with the store locked.

func (s *Store) lock() (unlock func()) {
	s.mu.Lock()
	return s.mu.Unlock
}

// usable checks what every call promises.
func (a *Adapter) usable(ctx context.Context) error {
	if a.closed.Load() {
		return fault.Errorf(fault.Invalid, "backend %s: used after Close", a.backend)
	}
	return ctx.Err()
}

// reach checks a canonical id: ours, well-formed, and in a locality that can be reached.
func (a *Adapter) reach(ctx context.Context, id adapters.VolumeID) error {
	if err := a.usable(ctx); err != nil {
		return err
	}
	if id.Backend != a.backend {
		return fault.Errorf(fault.Invalid, "volume %s: this is backend %q", id, a.backend)
	}
	full, err := canonical(id.ID)
	if err != nil {
		return err
	}
	if full != id.ID {
		return fault.Errorf(fault.Invalid, "volume %s: not the canonical id, which is %s", id, full)
	}
	return a.store.reach(full)
}

// reach says whether a locality exists and answers.
func (s *Store) reach(id string) error {
	at := locality(id)
	if s.away[at] {
		return fault.Errorf(fault.Unavailable, "locality %s: out of reach", at)
	}
	if at == Local {
		return nil
	}
	for other := range s.volumes {
		if locality(other) == at {
			return nil
		}
	}
	return fault.Errorf(fault.Unavailable, "locality %s: unknown here", at)
}

func locality(id string) string {
	l, _, _ := strings.Cut(id, "/")
	return l
}

// volume finds a live volume by the id that a person may have typed.
func (a *Adapter) volume(ctx context.Context, id adapters.VolumeID) (*Volume, error) {
	if err := a.usable(ctx); err != nil {
		return nil, err
	}
	full, err := canonical(id.ID)
	if err != nil {
		return nil, err
	}
	id.ID = full
	if err := a.reach(ctx, id); err != nil {
		return nil, err
	}
	if v := a.store.volumes[full]; v != nil {
		return v, nil
	}
	return nil, fault.Errorf(fault.NotFound, "volume %s: not in the store", id)
}

// snapshot finds a snapshot of ours.
func (a *Adapter) snapshot(ctx context.Context, id adapters.SnapshotID) (*snapshot, error) {
	if err := a.reach(ctx, id.Volume); err != nil {
		return nil, err
	}
	if s := a.store.snapshots[key{id.Volume.ID, id.Name}]; s != nil && s.info.Mark != "" {
		return s, nil
	}
	return nil, fault.Errorf(fault.NotFound, "snapshot %s: not in the store", id)
}

// readable finds a snapshot whose data may be looked at: published, and ready.
func (a *Adapter) readable(ctx context.Context, id adapters.SnapshotID) (*snapshot, error) {
	s, err := a.snapshot(ctx, id)
	if err != nil {
		return nil, err
	}
	info := a.info(s)
	switch {
	case info.Mark != adapters.Verified:
		return nil, fault.Errorf(fault.Invalid, "snapshot %s is still cutting: nobody may read it before it is published", id)
	case info.State != adapters.Ready:
		return nil, fault.Errorf(fault.Unavailable, "snapshot %s is not ready yet; wait for it", id)
	}
	return s, nil
}

// live describes a volume as this adapter's backend names it.
func (a *Adapter) live(v *Volume) adapters.Volume {
	v.mu.Lock()
	defer v.mu.Unlock()
	live := adapters.Volume{ID: adapters.VolumeID{Backend: a.backend, ID: v.id}, Form: v.files.form(), Size: v.size, Freeze: adapters.FreezeNone}
	if v.device != nil {
		var st unix.Stat_t
		if unix.Stat(v.device.path, &st) == nil {
			live.Freeze, live.Device, live.Path = adapters.FreezeNests, adapters.Device(st.Rdev), v.device.path
		}
	}
	return live
}

// info describes a snapshot as this adapter's backend names it.
func (a *Adapter) info(s *snapshot) adapters.Snapshot {
	info := s.info
	info.ID.Volume.Backend = a.backend
	info.Notes.Unverified = slices.Clone(info.Notes.Unverified)
	if time.Since(info.Created) >= a.store.Pending {
		info.State = adapters.Ready
	}
	return info
}
