//go:build ceph && cgo

package ceph

import (
	"cmp"
	"context"
	"io"
	"iter"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/ceph/go-ceph/cephfs"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/cbt"
	"stillpoint.io/stillpoint/fault"
)

// OpenTree opens a published snapshot. With a base it may wait until the times of directories are to be believed, where
// that is worth while.
func (a *FSAdapter) OpenTree(ctx context.Context, id adapters.SnapshotID, base *adapters.SnapshotID) (adapters.Tree, error) {
	type opened struct {
		tree *fsTree
		wait time.Duration
	}
	o, err := callFS(ctx, a, id.Volume, "snapshot "+id.String(), func(one *call, m *mount, name treeName) (opened, error) {
		root, f, err := m.open(name, id)
		if err != nil {
			return opened{}, err
		}
		t := &fsTree{adapter: a, mount: m, id: id, root: root}
		if base == nil {
			return opened{tree: t}, nil
		}
		other, err := parseTreeName(base.Volume.ID, a.fs)
		if err == nil && (base.Volume.Backend != a.backend || other != name) {
			err = fault.Errorf(fault.Invalid, "it is compared with %s, a snapshot of another volume", base)
		}
		if err != nil {
			return opened{}, err
		}
		was, g, err := m.open(other, *base)
		if err != nil || g.created.After(f.created) {
			return opened{tree: t}, err
		}
		t.base, t.comparison = was, comparison{g.created, a.lag}
		text, err := m.lib.LgetXattr(t.root, "ceph.dir.rentries")
		if err != nil {
			return opened{}, err
		}
		entries, err := strconv.ParseInt(string(text), 10, 64)
		if err != nil {
			return opened{}, fault.Errorf(fault.Corrupt, "%q is no number of entries", text)
		}
		wait, ok := t.settling(time.Now(), f.created, entries)
		t.recursive = ok
		if !ok {
			wait = 0
		}
		return opened{t, wait}, nil
	})
	if err != nil {
		return nil, err
	}
	timer := time.NewTimer(o.wait)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	return o.tree, nil
}

// open finds the root of a published snapshot's tree.
func (m *mount) open(name treeName, id adapters.SnapshotID) (root string, f *fsFound, err error) {
	if f, err = m.ours(name, id); err != nil {
		return "", nil, err
	}
	if !f.published {
		return "", nil, fault.Errorf(fault.Invalid, "snapshot %s is still cutting: nobody may read it before it is published", id)
	}
	root = name.snapshot(id.Name)
	if name.dir == "" {
		d, err := m.describe(name, root)
		if err != nil {
			return "", nil, err
		}
		root = below(root, d.data)
	}
	st, err := m.stat(root)
	if err == nil && !st.isDirectory() {
		err = fault.Errorf(fault.Unsupported, "it is no tree")
	}
	return root, f, err
}

// fsTree is an open snapshot. Nothing of it is open.
type fsTree struct {
	comparison
	adapter   *FSAdapter
	mount     *mount
	id        adapters.SnapshotID
	root      string
	base      string // the base's root; empty: nothing is unchanged
	recursive bool   // whole directories may be
}

func (t *fsTree) Close() error { return nil }

// inTree makes a call about a path in the tree.
func inTree[T any](ctx context.Context, t *fsTree, path string, f func(*call, *mount) (T, error)) (T, error) {
	if err := checkTreePath(path); err != nil {
		var none T
		return none, fault.Errorf(fault.KindOf(err), "snapshot %s: %w", t.id, err)
	}
	return callMounted(ctx, t.adapter, t.mount.fs, "snapshot "+t.id.String()+": "+strconv.Quote(path), f)
}

// walk describes what is at a path below a root. It passes through directories only.
func (m *mount) walk(root, path string) (node, error) {
	for i, c := range path {
		if c == '/' {
			if st, err := m.stat(below(root, path[:i])); err != nil {
				return node{}, err
			} else if !st.isDirectory() {
				return node{}, libError(syscall.ENOTDIR)
			}
		}
	}
	return m.stat(below(root, path))
}

// Stat describes what is at a path.
func (t *fsTree) Stat(ctx context.Context, path string) (adapters.Entry, error) {
	return inTree(ctx, t, path, func(_ *call, m *mount) (adapters.Entry, error) {
		now, err := m.walk(t.root, path)
		if err != nil {
			return adapters.Entry{}, err
		}
		var was *node
		if t.base != "" {
			switch b, err := m.walk(t.base, path); {
			case err == nil:
				was = &b
			case !isAbsent(err) && errnoOf(err) != syscall.ENOTDIR:
				return adapters.Entry{}, err
			}
		}
		return t.entry(m, path, now, was)
	})
}

// named is what is in a directory, and what the base has there.
type named struct {
	name     string
	now, was node
	known    bool
}

const (
	entriesAtOnce = 64 // of a directory, described in one call
	asksAtOnce    = 16 // of these, described in parallel
)

// Entries lists a directory.
func (t *fsTree) Entries(ctx context.Context, dir string) iter.Seq2[adapters.Entry, error] {
	return func(yield func(adapters.Entry, error) bool) {
		all, err := inTree(ctx, t, dir, func(one *call, m *mount) ([]named, error) { return t.list(one, m, dir) })
		if err != nil {
			yield(adapters.Entry{}, err)
			return
		}
		for some := range slices.Chunk(all, entriesAtOnce) {
			entries, err := inTree(ctx, t, dir, func(one *call, m *mount) ([]adapters.Entry, error) { return t.describe(one, m, dir, some) })
			if err != nil {
				yield(adapters.Entry{}, err)
				return
			}
			for _, e := range entries {
				if !yield(e, nil) {
					return
				}
			}
		}
	}
}

// list lists a directory in a tree's order.
func (t *fsTree) list(one *call, m *mount, dir string) ([]named, error) {
	now, err := m.readDir(one, t.root, dir)
	if err != nil {
		return nil, err
	}
	var was map[string]node
	if t.base != "" {
		if was, err = m.readDir(one, t.base, dir); err != nil && !isAbsent(err) && errnoOf(err) != syscall.ENOTDIR {
			return nil, err
		}
	}
	all := make([]named, 0, len(now))
	for name, n := range now {
		b, known := was[name]
		all = append(all, named{name, n, b, known})
	}
	slices.SortFunc(all, func(a, b named) int {
		if x, y := a.now.isDirectory(), b.now.isDirectory(); x != y {
			if x {
				return -1
			}
			return 1
		}
		return cmp.Compare(a.name, b.name)
	})
	return all, nil
}

// readDir reads what is in a directory below a root.
func (m *mount) readDir(one *call, root, dir string) (map[string]node, error) {
	if st, err := m.walk(root, dir); err != nil {
		return nil, err
	} else if !st.isDirectory() {
		return nil, libError(syscall.ENOTDIR)
	}
	d, err := m.lib.OpenDir(below(root, dir))
	if err != nil {
		return nil, err
	}
	defer d.Close()
	all := map[string]node{}
	for {
		if err := one.wanted(); err != nil {
			return nil, err
		}
		e, err := d.ReadDirPlus(wantedStat, cephfs.AtSymlinkNofollow)
		if err != nil {
			return nil, err
		}
		if e == nil {
			return all, nil
		}
		if e.Name() != "." && e.Name() != ".." {
			all[e.Name()] = nodeOf(e.Statx())
		}
	}
}

// describe makes entries of some names in a directory.
func (t *fsTree) describe(one *call, m *mount, dir string, some []named) ([]adapters.Entry, error) {
	entries, errs := make([]adapters.Entry, len(some)), make([]error, len(some))
	turns := make(chan struct{}, asksAtOnce)
	var group sync.WaitGroup
	for i, n := range some {
		turns <- struct{}{}
		group.Go(func() {
			defer func() { <-turns }()
			if errs[i] = one.wanted(); errs[i] != nil {
				return
			}
			var was *node
			if n.known {
				was = &n.was
			}
			entries[i], errs[i] = t.entry(m, strings.TrimPrefix(dir+"/"+n.name, "/"), n.now, was)
		})
	}
	group.Wait()
	for _, err := range errs {
		if err != nil {
			return nil, err
		}
	}
	return entries, nil
}

// entry makes the entry of an inode.
func (t *fsTree) entry(m *mount, path string, now node, was *node) (adapters.Entry, error) {
	_, name := splitPath(path)
	at := below(t.root, path)
	e := adapters.Entry{Name: name, Mode: uint32(now.mode) & 0o7777, UID: now.uid, GID: now.gid, Modified: now.modified}
	kind, ok := fileTypes[uint32(now.mode)&syscall.S_IFMT]
	if !ok {
		return e, fault.Errorf(fault.Corrupt, "%q has the mode %o, which no file has", path, now.mode)
	}
	e.Type = kind
	if now.links > 1 && kind != adapters.Directory {
		e.Link = now.number
	}
	var err error
	switch kind {
	case adapters.RegularFile:
		e.Size = int64(now.size)
	case adapters.Symlink:
		e.Target, err = m.lib.Readlink(at)
	case adapters.CharDevice, adapters.BlockDevice:
		e.Device = adapters.Device(now.device)
	}
	if err == nil {
		e.Attributes, err = m.attributes(at)
	}
	if err != nil || was == nil {
		return e, err
	}
	if kind != adapters.Directory {
		e.Unchanged = t.file(now, *was)
	} else if t.recursive && t.file(now, *was) {
		below, err := m.time(at, "ceph.dir.rctime")
		if err != nil {
			return e, err
		}
		e.Unchanged = t.directory(now, *was, below)
		e.ButLinks = e.Unchanged
	}
	return e, nil
}

// fileTypes are the types by the bits of a mode.
var fileTypes = map[uint32]adapters.FileType{
	syscall.S_IFREG: adapters.RegularFile, syscall.S_IFDIR: adapters.Directory, syscall.S_IFLNK: adapters.Symlink, syscall.S_IFIFO: adapters.Fifo,
	syscall.S_IFSOCK: adapters.Socket, syscall.S_IFCHR: adapters.CharDevice, syscall.S_IFBLK: adapters.BlockDevice,
}

// attributes reads the extended attributes of what is at a path, itself if it is a link.
func (m *mount) attributes(path string) ([]adapters.Attribute, error) {
	names, err := m.lib.LlistXattr(path)
	if err != nil || len(names) == 0 {
		return nil, err
	}
	var all []adapters.Attribute
	for _, name := range names {
		if !isKeptAttribute(name) {
			continue
		}
		value, err := m.lib.LgetXattr(path, name)
		if err != nil {
			return nil, err
		}
		all = append(all, adapters.Attribute{Name: name, Value: value})
	}
	slices.SortFunc(all, func(a, b adapters.Attribute) int { return strings.Compare(a.Name, b.Name) })
	return all, nil
}

// OpenFile opens a regular file.
func (t *fsTree) OpenFile(ctx context.Context, path string) (adapters.File, error) {
	f, err := inTree(ctx, t, path, func(one *call, m *mount) (*fsFile, error) {
		st, err := m.walk(t.root, path)
		if err != nil {
			return nil, err
		}
		if uint32(st.mode)&syscall.S_IFMT != syscall.S_IFREG {
			return nil, fault.Errorf(fault.Invalid, "it is no regular file")
		}
		f, err := m.lib.Open(below(t.root, path), syscall.O_RDONLY|syscall.O_NOFOLLOW, 0)
		if err != nil {
			return nil, err
		}
		m.hold()
		open := &fsFile{tree: t, path: path, size: int64(st.size), openFile: openFile{mount: m, lib: f}}
		one.onAbandon(func() { open.shut() })
		return open, nil
	})
	if err != nil {
		return nil, err // not f: a nil of its type is no nil File
	}
	return f, nil
}

// fsFile is an open file of a snapshot.
type fsFile struct {
	openFile
	tree *fsTree
	path string
	size int64
}

func (f *fsFile) Size() int64 { return f.size }

// ReadAt reads. A large read is made in pieces, one after the other.
func (f *fsFile) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fault.Errorf(fault.Invalid, "snapshot %s: %q: read at %d", f.tree.id, f.path, off)
	}
	began, end := time.Now(), max(0, min(int64(len(p)), f.size-off))
	if err := f.read(ctx, p[:end], off); err != nil {
		return 0, f.tree.adapter.cluster.fsFailure(err, began, "snapshot %s: %q: reading %d bytes at %d", f.tree.id, f.path, end, off)
	}
	if int(end) < len(p) {
		return int(end), io.EOF
	}
	return int(end), nil
}

// Extents is one extent of data: CephFS does not tell where holes are.
func (f *fsFile) Extents(ctx context.Context) cbt.Seq {
	return func(yield func(cbt.Extent, error) bool) {
		if err := ctx.Err(); err != nil {
			yield(cbt.Extent{}, err)
		} else if f.size > 0 {
			yield(cbt.Extent{Length: f.size}, nil)
		}
	}
}

func (f *fsFile) Close() error { return f.close() }
