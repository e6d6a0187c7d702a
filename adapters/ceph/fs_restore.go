//go:build ceph && cgo

package ceph

import (
	"context"
	"fmt"
	"math"
	"sync"
	"syscall"
	"time"

	fsadmin "github.com/ceph/go-ceph/cephfs/admin"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

// treeSite is where a tree grows, and where it goes at last.
type treeSite struct{ tmp, final string }

// BeginTree makes the place of a tree: within a new subvolume, or beside a directory that is to be.
func (a *FSAdapter) BeginTree(ctx context.Context, spec adapters.TreeSpec) (adapters.TreeTarget, error) {
	if spec.Token == "" {
		return nil, fault.Errorf(fault.Invalid, "volume %s: a restore needs a token", spec.ID)
	}
	t, err := callFS(ctx, a, spec.ID, "", func(one *call, m *mount, name treeName) (*treeTarget, error) {
		l, err := m.lock(name)
		if err != nil {
			return nil, err
		}
		t := &treeTarget{adapter: a, name: name, lease: l, writes: map[*call]struct{}{}}
		one.onAbandon(l.release)
		if t.treeSite, err = m.begin(name); err != nil {
			return nil, err
		}
		t.left, err = m.clearSite(one, t.tmp)
		return t, err
	})
	if err != nil {
		return nil, err
	}
	return t, nil
}

// restoringUser owns the data of a subvolume that a restore has made and not yet filled: nobody else makes such a one.
const (
	restoringUser = 0x53746c6c
	restoringMode = 0o1000
)

func isRestoring(n node) bool {
	return n.uid == restoringUser && uint32(n.mode)&0o7777 == restoringMode
}

// begin finds or makes the place of a tree. Busy if the volume is there.
func (m *mount) begin(name treeName) (treeSite, error) {
	if name.dir != "" {
		if _, err := m.stat(name.dir); err == nil {
			return treeSite{}, fault.Errorf(fault.Busy, "it exists; choose another name")
		} else if !isAbsent(err) {
			return treeSite{}, err
		}
		parent, _ := splitPath(name.dir)
		if st, err := m.stat(below(parent, "")); parent != "" && (err != nil || !st.isDirectory()) {
			return treeSite{}, fault.Errorf(fault.NotFound, "there is no directory %s to restore into: %v", parent, err)
		}
		return treeSite{below(parent, "/"+growing+"-"+adapters.ShortName(name.String())), name.dir}, nil
	}
	if _, err := m.stat(name.top()); isAbsent(err) {
		o := &fsadmin.SubVolumeOptions{Mode: restoringMode, Uid: restoringUser, Gid: restoringUser}
		if err := fsadmin.NewFromConn(m.connection.rados).CreateSubVolume(name.fs, name.mgrGroup(), name.subvolume, o); err != nil {
			if isAbsent(err) {
				err = fault.Errorf(fault.NotFound, "%w; make its group first: `ceph fs subvolumegroup create %s %s`", err, name.fs, name.group)
			}
			return treeSite{}, err
		}
	} else if err != nil {
		return treeSite{}, err
	}
	d, err := m.describe(name, name.top())
	if err != nil {
		return treeSite{}, err
	}
	st, err := m.stat(below(name.top(), d.data))
	if err == nil && (d.data == "" || !isRestoring(st)) {
		err = fault.Errorf(fault.Busy, "it exists; choose another name")
	}
	return treeSite{below(name.top(), growing), below(name.top(), d.data)}, err
}

// clearSite makes the root of a tree, and puts aside what a dead process left there.
func (m *mount) clearSite(one *call, tmp string) (*leftTree, error) {
	for {
		err := m.lib.MakeDir(tmp, 0o700)
		if err == nil || errnoOf(err) != syscall.EEXIST {
			return nil, err
		}
		st, err := m.stat(tmp)
		if err != nil {
			return nil, err
		}
		if st.isDirectory() && st.uid == 0 && uint32(st.mode)&0o7777 == 0o700 {
			return m.setAside(one, tmp)
		}
		if err := m.removeAll(one, tmp); err != nil { // others may have come below it
			return nil, err
		}
	}
}

// treeTarget is a tree being made.
type treeTarget struct {
	treeSite
	adapter *FSAdapter
	name    treeName
	lease   *lease
	left    *leftTree
	self    *adapters.Entry // describes the root, at last

	mu     sync.RWMutex // held for reading by all that make something, so that closing waits for them
	closed bool

	writesMu sync.Mutex
	writes   map[*call]struct{} // under way
}

func (t *treeTarget) what() string { return "volume " + t.name.id(t.adapter.backend).String() }

// inTarget calls do with a path's place in the filesystem. It passes through directories only.
func inTarget[T any](ctx context.Context, t *treeTarget, path string, do func(one *call, m *mount, at string) (T, error)) (T, error) {
	var none T
	t.mu.RLock()
	defer t.mu.RUnlock()
	err := checkTreePath(path)
	if t.closed {
		err = fault.Errorf(fault.Invalid, "the target is closed")
	}
	if err == nil {
		err = t.lease.lost()
	}
	if err != nil {
		return none, fault.Errorf(fault.KindOf(err), "%s: %q: %w", t.what(), path, err)
	}
	return callMounted(ctx, t.adapter, t.name.fs, fmt.Sprintf("%s: %q", t.what(), path), func(one *call, m *mount) (T, error) {
		if dir, _ := splitPath(path); dir != "" {
			if st, err := m.walk(t.tmp, dir); err != nil {
				return none, err
			} else if !st.isDirectory() {
				return none, libError(syscall.ENOTDIR)
			}
		}
		return do(one, m, below(t.tmp, path))
	})
}

// make is inTarget for what is new. What is there already is Busy.
func (t *treeTarget) make(ctx context.Context, path string, do func(m *mount, at string) error) error {
	_, err := inTarget(ctx, t, path, func(_ *call, m *mount, at string) (none, error) {
		if path == "" {
			return none{}, libError(syscall.EEXIST)
		}
		return none{}, do(m, at)
	})
	return err
}

// Mkdir makes a directory.
func (t *treeTarget) Mkdir(ctx context.Context, path string) error {
	return t.make(ctx, path, func(m *mount, at string) error { return m.lib.MakeDir(at, 0o700) })
}

// Symlink makes a symbolic link.
func (t *treeTarget) Symlink(ctx context.Context, path, target string) error {
	if target == "" || len(target) > 4095 {
		return fault.Errorf(fault.Invalid, "%s: %q: a link's target has 1 to 4095 bytes, not %d", t.what(), path, len(target))
	}
	return t.make(ctx, path, func(m *mount, at string) error { return m.lib.Symlink(target, at) })
}

// Special makes a pipe, a socket or a device.
func (t *treeTarget) Special(ctx context.Context, path string, kind adapters.FileType, d adapters.Device) error {
	return t.make(ctx, path, func(m *mount, at string) error {
		switch kind {
		case adapters.Fifo, adapters.Socket, adapters.CharDevice, adapters.BlockDevice:
		default:
			return fault.Errorf(fault.Invalid, "a %s is nothing special", kind)
		}
		if d > math.MaxUint32 {
			return fault.Errorf(fault.Invalid, "CephFS keeps no device with the number %d", d)
		}
		for mode, k := range fileTypes {
			if k == kind {
				return makeNode(m.raw, at, mode|0o600, uint64(d))
			}
		}
		return libError(syscall.EINVAL)
	})
}

// Link gives a file another name.
func (t *treeTarget) Link(ctx context.Context, old, path string) error {
	if err := checkTreePath(old); err != nil {
		return err
	}
	return t.make(ctx, path, func(m *mount, at string) error {
		st, err := m.walk(t.tmp, old)
		if err == nil && st.isDirectory() {
			err = fault.Errorf(fault.Invalid, "%q is a directory, which has one name", old)
		}
		if err != nil {
			return err
		}
		return linkNode(m.raw, below(t.tmp, old), at)
	})
}

// Describe sets owner, mode, attributes and time. Those of the root are set by Commit.
func (t *treeTarget) Describe(ctx context.Context, path string, e adapters.Entry) error {
	if s := e.Modified.Unix(); s < 0 || s > math.MaxUint32 {
		return fault.Errorf(fault.Invalid, "%s: %q: CephFS keeps times from 1970 to 2106, and not %v", t.what(), path, e.Modified)
	}
	_, err := inTarget(ctx, t, path, func(_ *call, m *mount, at string) (none, error) {
		if path == "" {
			t.self = &e
			return none{}, nil
		}
		return none{}, m.dress(at, e)
	})
	return err
}

// dress sets owner, mode, attributes and time of what is at a path, in this order: a change of the owner takes set-user-id
// bits and capabilities away, and an access control list shows in the mode.
func (m *mount) dress(at string, e adapters.Entry) error {
	if err := setOwner(m.raw, at, e.UID, e.GID); err != nil {
		return err
	}
	link := e.Type == adapters.Symlink
	if err := setModeAndTime(m.raw, at, e.Mode&0o7777, !link, e.Modified); err != nil {
		return err
	}
	if err := m.setAttributes(at, e.Attributes); err != nil {
		return err
	}
	return setModeAndTime(m.raw, at, 0, false, e.Modified)
}

// setAttributes makes the attributes of what is at a path these, and no others.
func (m *mount) setAttributes(at string, want []adapters.Attribute) error {
	names, err := m.lib.LlistXattr(at)
	if err != nil {
		return err
	}
	for _, name := range names {
		if isKeptAttribute(name) && !hasAttribute(want, name) {
			if err := m.lib.LremoveXattr(at, name); err != nil && errnoOf(err) != syscall.ENODATA {
				return fmt.Errorf("removing the attribute %s: %w", name, err)
			}
		}
	}
	for _, a := range want {
		if err := setAttribute(m.raw, at, a.Name, a.Value); err != nil {
			return fmt.Errorf("setting the attribute %q: %w", a.Name, err)
		}
	}
	return nil
}

// settled is nil if no write that was abandoned is on its way.
func (t *treeTarget) settled() error {
	t.writesMu.Lock()
	defer t.writesMu.Unlock()
	for one := range t.writes {
		if one.isAbandoned() {
			return fault.Errorf(fault.Unavailable, "a write that was given up may still arrive; try again when Ceph answers")
		}
	}
	return t.lease.lost()
}

// Commit makes everything durable and moves the tree to its place.
func (t *treeTarget) Commit(ctx context.Context) (adapters.Volume, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return adapters.Volume{}, fault.Errorf(fault.Invalid, "%s: committed after the target was closed", t.what())
	}
	defer t.release()
	err := t.long(ctx, "finishing the restore", func(one *call, m *mount) error {
		if err := t.settled(); err != nil {
			return err
		}
		if err := t.left.remove(one, m); err != nil {
			return err
		}
		if err := m.lib.SyncFs(); err != nil {
			return err
		}
		if t.self != nil { // as late as that: until now, nobody else comes below it
			if err := m.dress(t.tmp, *t.self); err != nil {
				return err
			}
		}
		st, err := m.stat(t.final)
		switch {
		case err == nil && (t.name.dir != "" || !isRestoring(st)):
			return fault.Errorf(fault.Busy, "somebody else made it meanwhile; choose another name")
		case err != nil && (t.name.dir == "" || !isAbsent(err)):
			return err
		}
		if err := one.wanted(); err != nil {
			return err
		}
		if err := m.lib.Rename(t.tmp, t.final); err != nil {
			return err
		}
		return m.lib.SyncFs()
	})
	return t.adapter.volume(t.name), err
}

// long makes a call that takes as long as the tree is large.
func (t *treeTarget) long(ctx context.Context, doing string, f func(*call, *mount) error) error {
	began := time.Now()
	_, err := doLong(ctx, t.adapter.cluster.calls, func(one *call) (none, error) {
		m, err := t.adapter.mounts.get(one, t.name.fs)
		if err == nil {
			err = f(one, m)
		}
		return none{}, err
	})
	if err != nil {
		return t.adapter.cluster.fsFailure(err, began, "%s: %s", t.what(), doing)
	}
	return nil
}

// Abort removes what was made.
func (t *treeTarget) Abort(ctx context.Context) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return nil
	}
	defer t.release()
	return t.long(ctx, "giving the restore up", func(one *call, m *mount) error {
		if err := m.removeAll(one, t.tmp); err != nil || t.name.dir != "" {
			return err
		}
		return ignore(fsadmin.NewFromConn(m.connection.rados).RemoveSubVolume(t.name.fs, t.name.mgrGroup(), t.name.subvolume))
	})
}

// Close leaves what was made to the next BeginTree.
func (t *treeTarget) Close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.closed {
		t.release()
	}
	return nil
}

func (t *treeTarget) release() {
	t.closed = true
	t.lease.release()
}
