package reflink

import (
	"context"
	"errors"
	"os"
	"path"
	"time"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/adapters/treefs"
	"stillpoint.io/stillpoint/fault"
)

// perSubvolume is what the snapshot of a subvolume takes, once its data is on the disk: a commit of the filesystem.
const perSubvolume = 50 * time.Millisecond

// treeName is the name of a snapshot's subvolume, in the folder in which name is that of its record.
func treeName(name string) string { return name + ".tree" }

// snapshotTree makes a snapshot of a subvolume. The record is there first, and locked until the subvolume is: so what a
// dead process leaves is a record without a subvolume, which everybody takes for nothing and the next one removes. An
// error that is EEXIST says that the name is taken.
func (p place) snapshotTree(source *os.File, wanted string) (adapters.Snapshot, error) {
	folder, err := p.makeFolder()
	if err != nil {
		return adapters.Snapshot{}, err
	}
	defer folder.Close()
	fd, err := unix.Openat(int(folder.Fd()), ".", unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o400)
	if err != nil {
		return adapters.Snapshot{}, err
	}
	e := &entry{folder: folder, name: fileName(p.id.ID, adapters.Name(wanted))}
	e.file = os.NewFile(uintptr(fd), e.name)
	defer e.file.Close()
	if err := unix.Flock(fd, unix.LOCK_EX); err != nil {
		return adapters.Snapshot{}, err
	}
	defer unix.Flock(fd, unix.LOCK_UN) // a child process that is just being started may have a copy
	r := record{Version: recordVersion, Volume: p.id.ID, Wanted: wanted, Mark: adapters.Cutting, Created: time.Now().UTC(), Tree: true}
	if err := r.write(e.file); err != nil {
		return adapters.Snapshot{}, err
	}
	if err := unix.Linkat(fd, "", int(folder.Fd()), e.name, unix.AT_EMPTY_PATH); err != nil {
		return adapters.Snapshot{}, err
	}
	if err := snapshotSubvolume(folder, treeName(e.name), source); err != nil {
		if err == unix.EEXIST {
			err = fault.Errorf(fault.Busy, "%s in the snapshot folder is in the way; move it away", treeName(e.name))
		}
		return adapters.Snapshot{}, errors.Join(err, unix.Unlinkat(int(folder.Fd()), e.name, 0))
	}
	return r.snapshot(p.id.Backend), nil
}

// hasTree reports whether the record's subvolume is there.
func (e *entry) hasTree() (bool, error) {
	var st unix.Stat_t
	err := unix.Fstatat(int(e.folder.Fd()), treeName(e.name), &st, unix.AT_SYMLINK_NOFOLLOW)
	if err == unix.ENOENT {
		return false, nil
	}
	return err == nil && st.Mode&unix.S_IFMT == unix.S_IFDIR && st.Ino == subvolRoot, err
}

// sweep removes a record that has no subvolume, unless its maker or remover still lives: then it waits for that one.
func (e *entry) sweep(ctx context.Context) error {
	there, err := e.lock(ctx)
	if err != nil || there || !e.half {
		return err
	}
	if err := setFlag(e.file, flagImmutable, false); err != nil {
		return err
	}
	err = unix.Unlinkat(int(e.folder.Fd()), e.name, 0)
	if err == unix.ENOENT {
		return nil
	}
	return err
}

// gateTree checks that a snapshot of a subvolume can be made: there is room, and a place for it.
func gateTree(at place, m mount) error {
	folder, err := at.makeFolder()
	if err != nil {
		return err
	}
	defer folder.Close()
	return room(folder, m.point)
}

// OpenTree opens a published snapshot of a subvolume.
func (a *Adapter) OpenTree(ctx context.Context, id adapters.SnapshotID, base *adapters.SnapshotID) (adapters.Tree, error) {
	at, root, err := a.openTree(ctx, id)
	if err != nil {
		return nil, err
	}
	o := treefs.Options{What: "snapshot " + id.String(), Hidden: folderName, Hollow: func(ino uint64) bool { return ino == emptySubvol }}
	if base == nil {
		return treefs.NewReader(root, o), nil
	}
	baseAt, baseRoot, err := a.openTree(ctx, *base)
	if err == nil && baseAt != at {
		err = fault.Errorf(fault.Invalid, "snapshots %s and %s are of different volumes", base, id)
	}
	c := &comparison{Reader: treefs.NewReader(root, o), base: baseRoot}
	if err == nil {
		if err = c.compare(ctx, root); err != nil {
			err = failed(err, "snapshot %s: comparing it with %s", id, base)
		}
	}
	if err != nil {
		baseRoot.Close() // nil is fine
		root.Close()
		return nil, err
	}
	if c.changes != nil {
		o.Same, o.RootSame = c.same, !c.changes.below[subvolRoot]
		c.Reader = treefs.NewReader(root, o)
	}
	return c, nil
}

// openTree opens the root of a published snapshot, and tells its volume.
func (a *Adapter) openTree(ctx context.Context, id adapters.SnapshotID) (adapters.VolumeID, *os.File, error) {
	at, e, err := a.lookup(ctx, id)
	if err != nil {
		return at.id, nil, err
	}
	defer e.close()
	switch {
	case !e.record.Tree:
		return at.id, nil, fault.Errorf(fault.Unsupported, "snapshot %s is a disk image and no tree of files", id)
	case e.record.Mark != adapters.Verified:
		return at.id, nil, fault.Errorf(fault.Invalid, "snapshot %s is still cutting: nobody may read it before it is published", id)
	}
	root, err := treefs.OpenBeneath(e.folder, treeName(e.name), os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOATIME)
	if errors.Is(err, unix.ENOENT) {
		err = notFound(id)
	}
	if err != nil {
		return at.id, nil, failed(err, "snapshot %s", id)
	}
	return at.id, root, nil
}

// comparison reads a snapshot and knows what changed since its base.
type comparison struct {
	*treefs.Reader
	base    *os.File
	changes *changes // nil: nothing is known
}

// compare finds the changes, if both are snapshots of one subvolume that nobody changed since they were made. A subvolume
// that took another's place (a rollback) has its inodes' numbers and generations, and other bytes.
func (c *comparison) compare(ctx context.Context, root *os.File) error {
	target, err := subvolumeOf(root)
	if err != nil {
		return err
	}
	base, err := subvolumeOf(c.base)
	if err != nil {
		return err
	}
	for _, s := range []subvolume{target, base} {
		if !s.readOnly || s.generation != s.created || s.parent != target.parent || s.parent == [16]byte{} {
			return nil
		}
	}
	if base.created > target.created {
		return nil
	}
	c.changes, err = changesSince(ctx, root, c.base, base.created)
	return err
}

// same says what in a directory is the same in the base: what did not change and has the same inode under the same path.
func (c *comparison) same(dir string, ino uint64) (func(name string, ino uint64) bool, error) {
	var st unix.Stat_t
	f, err := treefs.OpenBeneath(c.base, dir, unix.O_PATH|unix.O_DIRECTORY)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, err
	}
	if st.Ino == ino && !c.changes.themselves[ino] {
		return func(_ string, ino uint64) bool { return !c.changes.below[ino] && ino != emptySubvol }, nil
	}
	return func(name string, ino uint64) bool {
		if c.changes.below[ino] || ino == emptySubvol {
			return false
		}
		g, err := treefs.OpenBeneath(c.base, path.Join(dir, name), unix.O_PATH|unix.O_NOFOLLOW)
		if err != nil {
			return false
		}
		defer g.Close()
		var st unix.Stat_t
		return unix.Fstat(int(g.Fd()), &st) == nil && st.Ino == ino
	}, nil
}

// Close closes both roots.
func (c *comparison) Close() error { return errors.Join(c.Reader.Close(), errno(c.base.Close())) }

// BeginTree makes an empty subvolume beside the one that is to be.
func (a *Adapter) BeginTree(ctx context.Context, spec adapters.TreeSpec) (adapters.TreeTarget, error) {
	if spec.Token == "" {
		return nil, fault.Errorf(fault.Invalid, "volume %s: a restore needs a token", spec.ID)
	}
	at, err := a.locate(ctx, spec.ID)
	if err != nil {
		return nil, err
	}
	parent, _, err := at.open(path.Dir(at.path), os.O_RDONLY|unix.O_DIRECTORY)
	if err == nil {
		var is bool
		if is, err = isBtrfs(parent); err == nil && !is {
			err = fault.Errorf(fault.Unsupported, "a tree of files is a subvolume, and only btrfs has those; restore into a directory instead")
		}
	}
	if err != nil {
		parent.Close() // nil is fine
		return nil, failed(err, "volume %s", at.id)
	}
	t, err := treefs.Begin(treefs.Place{
		What: "volume " + at.id.String(), Parent: parent, Name: path.Base(at.path), Temporary: targetPrefix + adapters.ShortName(at.id.ID),
		Make: makeSubvolume, Remove: destroySubvolume,
	})
	if err != nil {
		return nil, err
	}
	return &treeTarget{t, a, at.id}, nil
}

type treeTarget struct {
	*treefs.Target
	adapter *Adapter
	id      adapters.VolumeID
}

// Commit makes the subvolume durable and gives it its name.
func (t *treeTarget) Commit(ctx context.Context) (adapters.Volume, error) {
	if err := t.Finish(ctx); err != nil {
		return adapters.Volume{}, err
	}
	return t.adapter.Volume(ctx, t.id)
}
