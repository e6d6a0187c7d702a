package mem

import (
	"bytes"
	"context"
	"io"
	"iter"
	"maps"
	"sync"
	"sync/atomic"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/cbt"
	"stillpoint.io/stillpoint/fault"
)

var (
	_ adapters.Trees        = (*Adapter)(nil)
	_ adapters.TreeRestorer = (*Adapter)(nil)
)

// OpenTree opens a snapshot of a tree.
func (a *Adapter) OpenTree(ctx context.Context, id adapters.SnapshotID, base *adapters.SnapshotID) (adapters.Tree, error) {
	defer a.store.lock()()
	s, err := a.readableAs(ctx, id, adapters.TreeForm)
	if err != nil {
		return nil, err
	}
	t := &openTree{adapter: a, snapshot: s}
	if base != nil {
		b, err := a.readableAs(ctx, *base, adapters.TreeForm)
		if err != nil {
			return nil, err
		}
		if base.Volume != id.Volume {
			return nil, fault.Errorf(fault.Invalid, "snapshots %s and %s are of different volumes", base, id)
		}
		t.base = b.files
	}
	a.images.Add(1)
	return t, nil
}

// readableAs finds a snapshot that may be looked at as what it is.
func (a *Adapter) readableAs(ctx context.Context, id adapters.SnapshotID, form adapters.Form) (*snapshot, error) {
	s, err := a.readable(ctx, id)
	if err == nil && s.info.Form != form {
		err = fault.Errorf(fault.Unsupported, "snapshot %s is of the form %s", id, s.info.Form)
	}
	return s, err
}

// openTree is an open snapshot of a tree.
type openTree struct {
	adapter *Adapter
	*snapshot
	base   grove
	closed atomic.Bool
}

func (t *openTree) usable(ctx context.Context) error {
	switch {
	case t.closed.Load():
		return fault.Errorf(fault.Invalid, "snapshot %s: used after Close", t.info.ID)
	case t.gone.Load():
		return fault.Errorf(fault.NotFound, "snapshot %s: deleted while it was open", t.info.ID)
	}
	return ctx.Err()
}

func (t *openTree) Stat(ctx context.Context, path string) (adapters.Entry, error) {
	if err := t.usable(ctx); err != nil {
		return adapters.Entry{}, err
	}
	return t.files.look(path, t.base)
}

func (t *openTree) Entries(ctx context.Context, dir string) iter.Seq2[adapters.Entry, error] {
	return func(yield func(adapters.Entry, error) bool) {
		err := t.usable(ctx)
		if f := t.files[dir]; err == nil && (f == nil || f.entry.Type != adapters.Directory) {
			err = fault.Errorf(fault.NotFound, "path %q: there is no directory", dir)
		}
		if err != nil {
			yield(adapters.Entry{}, err)
			return
		}
		for _, path := range t.files.children(dir) {
			e, err := t.files.look(path, t.base)
			if err == nil {
				err = t.usable(ctx)
			}
			if !yield(e, err) || err != nil {
				return
			}
		}
	}
}

func (t *openTree) OpenFile(ctx context.Context, path string) (adapters.File, error) {
	if err := t.usable(ctx); err != nil {
		return nil, err
	}
	switch f := t.files[path]; {
	case f == nil:
		return nil, fault.Errorf(fault.NotFound, "path %q: there is nothing", path)
	case f.entry.Type != adapters.RegularFile:
		return nil, fault.Errorf(fault.Invalid, "path %q: a %s is not a regular file", path, f.entry.Type)
	default:
		t.adapter.images.Add(1)
		return &openFile{tree: t, data: f.data}, nil
	}
}

func (t *openTree) Close() error {
	if t.closed.Swap(true) {
		return fault.Errorf(fault.Invalid, "snapshot %s: closed twice", t.info.ID)
	}
	t.adapter.images.Add(-1)
	return nil
}

type openFile struct {
	tree   *openTree
	data   []byte
	closed atomic.Bool
}

func (f *openFile) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	if err := f.tree.usable(ctx); err != nil {
		return 0, err
	}
	if off < 0 || f.closed.Load() {
		return 0, fault.Errorf(fault.Invalid, "snapshot %s: read at %d, or after Close", f.tree.info.ID, off)
	}
	n := copy(p, f.data[min(off, int64(len(f.data))):])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (f *openFile) Size() int64 { return int64(len(f.data)) }

func (f *openFile) Close() error {
	if !f.closed.Swap(true) {
		f.tree.adapter.images.Add(-1)
	}
	return nil
}

// holeSize is the unit of holes in files, in bytes.
const holeSize = 4096

// Extents finds the holes by looking.
func (f *openFile) Extents(context.Context) cbt.Seq {
	return cbt.Coalesce(func(yield func(cbt.Extent, error) bool) {
		for off := 0; off < len(f.data); off += holeSize {
			p := f.data[off:min(off+holeSize, len(f.data))]
			if !yield(cbt.Extent{Offset: int64(off), Length: int64(len(p)), Zero: len(bytes.Trim(p, "\x00")) == 0}, nil) {
				return
			}
		}
	})
}

// BeginTree makes a target.
func (a *Adapter) BeginTree(ctx context.Context, spec adapters.TreeSpec) (adapters.TreeTarget, error) {
	id, err := canonical(spec.ID.ID)
	if err != nil {
		return nil, err
	}
	defer a.store.lock()()
	if err := a.reach(ctx, adapters.VolumeID{Backend: spec.ID.Backend, ID: id}); err != nil {
		return nil, err
	}
	switch {
	case spec.Token == "":
		return nil, fault.Errorf(fault.Invalid, "volume %s: a restore needs a token", spec.ID)
	case a.store.volumes[id] != nil:
		return nil, fault.Errorf(fault.Busy, "volume %s exists; choose another id", spec.ID)
	case a.store.planting[id]:
		return nil, fault.Errorf(fault.Busy, "volume %s: a restore of it is under way", spec.ID)
	}
	set(&a.store.planting, id, true)
	a.targets.Add(1)
	return &treeTarget{adapter: a, id: id, files: newGrove(), left: maps.Clone(a.store.planted[id])}, nil
}

// treeTarget is a tree being made.
type treeTarget struct {
	adapter *Adapter
	id      string

	mu     sync.Mutex
	files  grove
	left   grove // by an earlier target, and not taken over
	closed bool
}

// change runs a change of a target that is open.
func (t *treeTarget) change(ctx context.Context, do func(grove) error) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return fault.Errorf(fault.Invalid, "volume %s: changed after the target was closed", t.id)
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	return do(t.files)
}

func (t *treeTarget) Mkdir(ctx context.Context, path string) error {
	return t.change(ctx, func(g grove) error { return g.plant(path, adapters.Entry{Type: adapters.Directory}) })
}

func (t *treeTarget) Symlink(ctx context.Context, path, target string) error {
	return t.change(ctx, func(g grove) error {
		return g.plant(path, adapters.Entry{Type: adapters.Symlink, Mode: 0o777, Target: target})
	})
}

func (t *treeTarget) Special(ctx context.Context, path string, k adapters.FileType, d adapters.Device) error {
	return t.change(ctx, func(g grove) error { return g.plant(path, adapters.Entry{Type: k, Device: d}) })
}

func (t *treeTarget) Link(ctx context.Context, old, path string) error {
	return t.change(ctx, func(g grove) error { return g.link(old, path) })
}

func (t *treeTarget) Describe(ctx context.Context, path string, e adapters.Entry) error {
	return t.change(ctx, func(g grove) error { return g.describe(path, e) })
}

func (t *treeTarget) Create(ctx context.Context, path string, size int64) (adapters.FileTarget, error) {
	fresh := true
	err := t.change(ctx, func(g grove) error {
		if err := g.plant(path, adapters.Entry{Type: adapters.RegularFile}); err != nil {
			return err
		}
		if f := t.left[path]; f != nil && f.entry.Type == adapters.RegularFile && int64(len(f.data)) == size && size > 0 {
			fresh = false
			delete(t.left, path)
			return g.write(path, f.data, 0)
		}
		return g.truncate(path, size)
	})
	if err != nil {
		return nil, err
	}
	return &fileTarget{t, path, size, fresh}, nil
}

type fileTarget struct {
	t    *treeTarget
	path string
	size int64

	fresh bool
}

func (f *fileTarget) WriteAt(ctx context.Context, p []byte, off int64) error {
	return f.change(ctx, off, int64(len(p)), func(g grove) error { return g.write(f.path, p, off) })
}

func (f *fileTarget) ReadAt(ctx context.Context, p []byte, off int64) error {
	return f.change(ctx, off, int64(len(p)), func(g grove) error {
		copy(p, g[f.path].data[off:])
		return nil
	})
}

func (f *fileTarget) Zero(ctx context.Context, off, length int64) error {
	return f.change(ctx, off, length, func(g grove) error { return g.write(f.path, make([]byte, length), off) })
}

func (f *fileTarget) Fresh() bool { return f.fresh }

// change runs a change, or a look, at a range that is within the file.
func (f *fileTarget) change(ctx context.Context, off, length int64, do func(grove) error) error {
	if off < 0 || length < 0 || off > f.size-length {
		return fault.Errorf(fault.Invalid, "path %q: %d bytes at %d are not within its %d", f.path, length, off, f.size)
	}
	return f.t.change(ctx, do)
}

func (f *fileTarget) Close() error { return nil }

func (t *treeTarget) Commit(ctx context.Context) (adapters.Volume, error) {
	defer t.adapter.store.lock()()
	if !t.shut() {
		return adapters.Volume{}, fault.Errorf(fault.Invalid, "volume %s: committed after the target was closed", t.id)
	}
	if err := t.adapter.usable(ctx); err != nil {
		return adapters.Volume{}, err
	}
	if t.adapter.store.volumes[t.id] != nil {
		return adapters.Volume{}, fault.Errorf(fault.Busy, "volume %s: somebody else made it meanwhile", t.id)
	}
	delete(t.adapter.store.planted, t.id)
	v := &Volume{id: t.id, epoch: 1, files: maps.Clone(t.files)}
	set(&t.adapter.store.volumes, t.id, v)
	return t.adapter.live(v), nil
}

func (t *treeTarget) Abort(context.Context) error {
	defer t.adapter.store.lock()()
	if t.shut() {
		delete(t.adapter.store.planted, t.id)
	}
	return nil
}

func (t *treeTarget) Close() error {
	defer t.adapter.store.lock()()
	if t.shut() {
		left := maps.Clone(t.files)
		for path, f := range t.left {
			if left[path] == nil {
				left[path] = f
			}
		}
		set(&t.adapter.store.planted, t.id, left)
	}
	return nil
}

// shut closes the target, with the store locked. It reports whether it was open.
func (t *treeTarget) shut() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return false
	}
	t.closed = true
	delete(t.adapter.store.planting, t.id)
	t.adapter.targets.Add(-1)
	return true
}
