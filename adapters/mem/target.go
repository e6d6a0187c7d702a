package mem

import (
	"context"
	"slices"
	"sync"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/cbt"
	"stillpoint.io/stillpoint/fault"
)

// target is a volume being filled: a new one that nobody finds yet, or a live one. A new one outlives the process that
// began it; a handle is one process's hold on it.
type target struct {
	volume    *Volume
	overwrite bool
	clone     bool
	holder    *Adapter
}

// Begin makes a target or opens it again.
func (a *Adapter) Begin(ctx context.Context, spec adapters.VolumeSpec) (adapters.Target, error) {
	defer a.store.lock()()
	return a.begin(ctx, spec, nil)
}

// BeginClone shares the snapshot's tree.
func (a *Adapter) BeginClone(ctx context.Context, id adapters.SnapshotID, spec adapters.VolumeSpec) (adapters.Target, error) {
	defer a.store.lock()()
	s, err := a.readableAs(ctx, id, adapters.BlockForm)
	if err != nil {
		return nil, err
	}
	if spec.Overwrite || spec.Size < s.info.Size {
		return nil, fault.Errorf(fault.Invalid, "volume %s: a clone of %s is a new volume of at least %d bytes", spec.ID, id, s.info.Size)
	}
	return a.begin(ctx, spec, s)
}

// begin is called with the store locked. of is the snapshot that a new volume is a clone of, nil for none.
func (a *Adapter) begin(ctx context.Context, spec adapters.VolumeSpec, of *snapshot) (adapters.Target, error) {
	id, err := canonical(spec.ID.ID)
	if err != nil {
		return nil, err
	}
	if err := a.reach(ctx, adapters.VolumeID{Backend: spec.ID.Backend, ID: id}); err != nil {
		return nil, err
	}
	if spec.Token == "" || spec.Size <= 0 || spec.Size > SizeMax {
		return nil, fault.Errorf(fault.Invalid, "volume %s: a restore needs a token and a size of 1 to %d bytes, not %q and %d",
			spec.ID, int64(SizeMax), spec.Token, spec.Size)
	}
	k := key{id, spec.Token}
	t, live := a.store.targets[k], a.store.volumes[id]
	switch {
	case t != nil && t.holder != nil:
		return nil, fault.Errorf(fault.Busy, "volume %s: the restore %s is under way", spec.ID, spec.Token)
	case !spec.Overwrite && live != nil:
		return nil, fault.Errorf(fault.Busy, "volume %s exists; overwrite it or choose another id", spec.ID)
	case t != nil && t.clone != (of != nil):
		return nil, fault.Errorf(fault.Invalid, "volume %s: the token %s is that of another restore", spec.ID, spec.Token)
	case t != nil && t.volume.size != spec.Size:
		return nil, fault.Errorf(fault.Invalid, "volume %s: the restore %s was begun with %d bytes", spec.ID, spec.Token, t.volume.size)
	case spec.Overwrite && live == nil:
		return nil, fault.Errorf(fault.NotFound, "volume %s: nothing to overwrite", spec.ID)
	case spec.Overwrite:
		if err := live.overwritable(spec.Size); err != nil {
			return nil, err
		}
	}
	fresh := t == nil && !spec.Overwrite
	if t == nil {
		t = &target{volume: live, overwrite: spec.Overwrite}
		if live == nil {
			t.volume = &Volume{id: id, size: spec.Size, epoch: 1, origin: spec.Origin}
		}
		if of != nil {
			t.clone, t.volume.tree, t.volume.epoch = true, of.tree, of.epoch
			t.volume.tree.zero(of.info.Size, spec.Size, of.epoch)
		}
		set(&a.store.targets, k, t)
	}
	t.holder = a
	a.targets.Add(1)
	return &handle{adapter: a, target: t, key: k, size: spec.Size, fresh: fresh}, nil
}

func (v *Volume) overwritable(size int64) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	switch {
	case v.files != nil:
		return fault.Errorf(fault.Unsupported, "volume %s is a tree of files", v.id)
	case v.size < size:
		return fault.Errorf(fault.Invalid, "volume %s: its %d bytes are fewer than the %d to restore", v.id, v.size, size)
	case v.users > 0:
		return fault.Errorf(fault.Busy, "volume %s is in use; stop its user first", v.id)
	}
	return nil
}

// handle is a process's hold on a target.
type handle struct {
	adapter *Adapter
	target  *target
	key     key
	size    int64
	fresh   bool

	mu     sync.Mutex
	flight []cbt.Extent // ranges being written now
	closed bool
}

func (h *handle) WriteAt(ctx context.Context, p []byte, off int64) error {
	return h.change(ctx, off, int64(len(p)), func() error {
		_, err := h.target.volume.WriteAt(p, off)
		return err
	})
}

func (h *handle) Zero(ctx context.Context, off, length int64) error {
	return h.change(ctx, off, length, func() error { return h.target.volume.Zero(off, length) })
}

// ReadAt reads, under the same rules as a write.
func (h *handle) ReadAt(ctx context.Context, p []byte, off int64) error {
	return h.change(ctx, off, int64(len(p)), func() error {
		v := h.target.volume
		v.mu.Lock()
		defer v.mu.Unlock()
		v.tree.read(p, off)
		return nil
	})
}

// Fresh is true of a target's first handle.
func (h *handle) Fresh() bool { return h.fresh }

// change runs a write after checking that it is one the caller may make.
func (h *handle) change(ctx context.Context, off, length int64, write func() error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	e := cbt.Extent{Offset: off, Length: length}
	if err := h.take(e); err != nil {
		return err
	}
	defer h.give(e)
	return write()
}

func (h *handle) take(e cbt.Extent) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return fault.Errorf(fault.Invalid, "volume %s: written after the target was closed", h.key.volume)
	}
	if e.Offset < 0 || e.Length < 0 || e.End() > h.size {
		return fault.Errorf(fault.Invalid, "volume %s: %d bytes at %d are not within the target's %d", h.key.volume, e.Length, e.Offset, h.size)
	}
	for _, o := range h.flight {
		if e.Offset < o.End() && o.Offset < e.End() {
			return fault.Errorf(fault.Invalid, "volume %s: two writes at once to the bytes at %d", h.key.volume, max(e.Offset, o.Offset))
		}
	}
	h.flight = append(h.flight, e)
	return nil
}

func (h *handle) give(e cbt.Extent) {
	h.mu.Lock()
	defer h.mu.Unlock()
	i := slices.Index(h.flight, e)
	h.flight = slices.Delete(h.flight, i, i+1)
}

// ReadsZero is true of a new volume that is no clone.
func (h *handle) ReadsZero() bool { return !h.target.overwrite && !h.target.clone }

// Commit makes the volume visible.
func (h *handle) Commit(ctx context.Context) (adapters.Volume, error) {
	defer h.adapter.store.lock()()
	if !h.shut() {
		return adapters.Volume{}, fault.Errorf(fault.Invalid, "volume %s: committed after the target was closed", h.key.volume)
	}
	store := h.adapter.store
	if h.target.overwrite {
		delete(store.targets, h.key)
	}
	if err := h.adapter.usable(ctx); err != nil {
		return adapters.Volume{}, err
	}
	if live := store.volumes[h.key.volume]; live != nil && live != h.target.volume {
		return adapters.Volume{}, fault.Errorf(fault.Busy, "volume %s: somebody else made it meanwhile", h.key.volume)
	}
	delete(store.targets, h.key)
	set(&store.volumes, h.key.volume, h.target.volume)
	return h.adapter.live(h.target.volume), nil
}

// Abort forgets a new target.
func (h *handle) Abort(ctx context.Context) error {
	defer h.adapter.store.lock()()
	if h.shut() {
		delete(h.adapter.store.targets, h.key)
	}
	return nil
}

// Close keeps a new target for the next Begin.
func (h *handle) Close() error {
	defer h.adapter.store.lock()()
	if h.shut() && h.target.overwrite {
		delete(h.adapter.store.targets, h.key)
	}
	return nil
}

// shut closes the handle, with the store locked. It reports whether it was open.
func (h *handle) shut() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return false
	}
	h.closed = true
	h.target.holder = nil
	h.adapter.targets.Add(-1)
	return true
}
