package treefs

import (
	"context"
	"errors"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

// Place says where a tree is to be made, and how its root comes and goes.
type Place struct {
	What      string   // names the tree in errors
	Parent    *os.File // the directory that it will be in; belongs to the Target
	Name      string   // what it will be called there
	Temporary string   // what it is called until Commit
	// Make and Remove make and remove a root. Remove removes what is in it too, and succeeds if there is nothing.
	Make, Remove func(parent *os.File, name string) error
}

// Directory is a place for a plain directory.
func Directory(what string, parent *os.File, name, temporary string) Place {
	return Place{
		What: what, Parent: parent, Name: name, Temporary: temporary,
		Make:   func(parent *os.File, name string) error { return unix.Mkdirat(int(parent.Fd()), name, 0o700) },
		Remove: removeAll,
	}
}

// removeAll removes a directory with all that is in it, and follows no link.
func removeAll(parent *os.File, name string) error {
	root, err := os.OpenRoot(procPath(parent, ""))
	if err != nil {
		return err
	}
	defer root.Close()
	return root.RemoveAll(name)
}

// Target is a tree being made: most of an adapters.TreeTarget. Its root has a temporary name, and is locked (flock) and
// closed to everybody else, until Finish.
type Target struct {
	at   Place
	root *os.File
	left *leftover
	self *adapters.Entry // describes the root, at last

	mu     sync.RWMutex // held for reading by all that make something, so that closing waits for them
	closed bool
}

// Begin makes the root. If there is something of the name, or somebody makes the same tree at this moment, the error is
// Busy; of what a dead process left, Create takes over what it can, and Finish removes the rest.
func Begin(at Place) (*Target, error) {
	t := &Target{at: at}
	if err := t.begin(); err != nil {
		t.release()
		return nil, failed(err, "%s", at.What)
	}
	return t, nil
}

func (t *Target) begin() error {
	for {
		var st unix.Stat_t
		if err := unix.Fstatat(int(t.at.Parent.Fd()), t.at.Name, &st, unix.AT_SYMLINK_NOFOLLOW); err == nil {
			return fault.Errorf(fault.Busy, "it exists; choose another name")
		} else if err != unix.ENOENT {
			return err
		}
		err := t.at.Make(t.at.Parent, t.at.Temporary)
		made := err == nil
		if err != nil && !errors.Is(err, unix.EEXIST) {
			return err
		}
		root, err := OpenBeneath(t.at.Parent, t.at.Temporary, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW)
		if errors.Is(err, unix.ENOENT) {
			continue // its maker, or who took it for a dead one's, was faster
		}
		if err != nil {
			return err
		}
		if err := unix.Flock(int(root.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			root.Close()
			return fault.Errorf(fault.Busy, "this restore is under way in another process, or elsewhere in this one")
		}
		if !t.isAt(root) {
			root.Close()
			continue
		}
		if made {
			t.root = root
			return root.Chmod(0o700)
		}
		if isPrivate(root) {
			if t.left, err = setAside(root); err == nil {
				t.root = root
				return nil
			}
		}
		err = t.at.Remove(t.at.Parent, t.at.Temporary)
		root.Close()
		if err != nil {
			return err
		}
	}
}

// isAt reports whether the temporary name still means root.
func (t *Target) isAt(root *os.File) bool {
	var a, b unix.Stat_t
	return unix.Fstat(int(root.Fd()), &a) == nil && a.Nlink > 0 &&
		unix.Fstatat(int(t.at.Parent.Fd()), t.at.Temporary, &b, unix.AT_SYMLINK_NOFOLLOW) == nil && a.Dev == b.Dev && a.Ino == b.Ino
}

// Finish makes everything durable and gives the tree its name. The target is closed then, also on an error.
func (t *Target) Finish(ctx context.Context) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return fault.Errorf(fault.Invalid, "%s: committed after the target was closed", t.at.What)
	}
	defer t.release()
	err := ctx.Err()
	if err == nil {
		err = t.left.remove(t.root)
	}
	if err == nil {
		err = unix.Syncfs(int(t.root.Fd()))
	}
	if err == nil && t.self != nil { // as late as that: until now, nobody else comes below it
		if err = describe(t.root, "", *t.self); err == nil {
			err = t.root.Sync()
		}
	}
	if err == nil {
		dir := int(t.at.Parent.Fd())
		err = unix.Renameat2(dir, t.at.Temporary, dir, t.at.Name, unix.RENAME_NOREPLACE)
	}
	if err == unix.EEXIST {
		err = fault.Errorf(fault.Busy, "somebody else made it meanwhile; choose another name")
	}
	if err == nil {
		err = t.at.Parent.Sync()
	}
	return failed(err, "%s: finishing the restore", t.at.What)
}

// Abort removes what was made.
func (t *Target) Abort(context.Context) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return nil
	}
	defer t.release()
	return failed(t.at.Remove(t.at.Parent, t.at.Temporary), "%s: giving the restore up", t.at.What)
}

// Close leaves what was made to the next Begin.
func (t *Target) Close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.closed {
		t.release()
	}
	return nil
}

func (t *Target) release() {
	t.closed = true
	if t.root != nil {
		unix.Flock(int(t.root.Fd()), unix.LOCK_UN) // a child process that is just being started may have a copy
	}
	t.left.close()
	t.root.Close() // nil is fine
	t.at.Parent.Close()
}

// in calls do with the directory of a path, open, and the path's last element.
func (t *Target) in(ctx context.Context, path string, do func(dir *os.File, name string) error) error {
	t.mu.RLock()
	defer t.mu.RUnlock()
	err := ctx.Err()
	switch {
	case err != nil:
	case t.closed:
		err = fault.Errorf(fault.Invalid, "the target is closed")
	default:
		err = checkPath(path)
	}
	if err == nil {
		var dir *os.File
		parent, name := split(path)
		if dir, err = OpenBeneath(t.root, parent, unix.O_PATH|unix.O_DIRECTORY); err == nil {
			err = do(dir, name)
			dir.Close()
		}
	}
	return failed(err, "%s: %q", t.at.What, path)
}

// make is in for what must not be the root.
func (t *Target) make(ctx context.Context, path string, do func(dir int, name string) error) error {
	return t.in(ctx, path, func(dir *os.File, name string) error {
		if name == "" {
			return unix.EEXIST
		}
		return do(int(dir.Fd()), name)
	})
}

// Mkdir makes a directory.
func (t *Target) Mkdir(ctx context.Context, path string) error {
	return t.make(ctx, path, func(dir int, name string) error { return unix.Mkdirat(dir, name, 0o700) })
}

// Symlink makes a symbolic link.
func (t *Target) Symlink(ctx context.Context, path, target string) error {
	return t.make(ctx, path, func(dir int, name string) error {
		if target == "" || len(target) > 4095 {
			return fault.Errorf(fault.Invalid, "a link's target has 1 to 4095 bytes, not %d", len(target))
		}
		return unix.Symlinkat(target, dir, name)
	})
}

// Special makes a pipe, a socket or a device.
func (t *Target) Special(ctx context.Context, path string, kind adapters.FileType, d adapters.Device) error {
	return t.make(ctx, path, func(dir int, name string) error {
		switch kind {
		case adapters.Fifo, adapters.Socket, adapters.CharDevice, adapters.BlockDevice:
		default:
			return fault.Errorf(fault.Invalid, "a %s is nothing special", kind)
		}
		for mode, k := range types {
			if k == kind {
				return unix.Mknodat(dir, name, mode|0o600, int(d))
			}
		}
		return unix.EINVAL
	})
}

// Link gives a file another name.
func (t *Target) Link(ctx context.Context, old, path string) error {
	return t.make(ctx, path, func(to int, name string) error {
		if err := checkPath(old); err != nil {
			return err
		}
		dir, oldName := split(old)
		from, err := OpenBeneath(t.root, dir, unix.O_PATH|unix.O_DIRECTORY)
		if err != nil {
			return err
		}
		defer from.Close()
		return unix.Linkat(int(from.Fd()), oldName, to, name, 0) // without AT_SYMLINK_FOLLOW
	})
}

// Describe sets owner, mode, attributes and time. Those of the root are set by Finish.
func (t *Target) Describe(ctx context.Context, path string, e adapters.Entry) error {
	return t.in(ctx, path, func(dir *os.File, name string) error {
		if name == "" {
			t.self = &e
			return nil
		}
		return describe(dir, name, e)
	})
}

// describe sets owner, mode, attributes and time of what is in a directory, or without a name of the directory, in this
// order: a change of the owner takes set-user-id bits and capabilities away, and an access control list shows in the mode.
func describe(dir *os.File, name string, e adapters.Entry) error {
	flags := unix.AT_SYMLINK_NOFOLLOW
	if name == "" {
		flags |= unix.AT_EMPTY_PATH
	}
	if err := unix.Fchownat(int(dir.Fd()), name, int(e.UID), int(e.GID), flags); err != nil {
		return err
	}
	f := dir
	if name != "" {
		var err error
		if f, err = OpenBeneath(dir, name, unix.O_PATH|unix.O_NOFOLLOW); err != nil {
			return err
		}
		defer f.Close()
	}
	if e.Type != adapters.Symlink {
		if err := unix.Chmod(procPath(f, ""), e.Mode&0o7777); err != nil {
			return err
		}
	}
	if err := setAttributes(procPath(dir, name), name == "", e.Attributes); err != nil {
		return err
	}
	times := []unix.Timespec{{Nsec: unix.UTIME_OMIT}, {Sec: e.Modified.Unix(), Nsec: int64(e.Modified.Nanosecond())}}
	if name == "" {
		return unix.UtimesNanoAt(unix.AT_FDCWD, procPath(dir, ""), times, 0)
	}
	return unix.UtimesNanoAt(int(dir.Fd()), name, times, unix.AT_SYMLINK_NOFOLLOW)
}

// Create makes a regular file, or takes over one that a dead process left.
func (t *Target) Create(ctx context.Context, path string, size int64) (adapters.FileTarget, error) {
	var f *os.File
	fresh := true
	err := t.make(ctx, path, func(dir int, name string) error {
		if size < 0 {
			return fault.Errorf(fault.Invalid, "a file of %d bytes", size)
		}
		if f = t.left.take(path, size, dir); f != nil {
			fresh = false
			return nil
		}
		fd, err := unix.Openat(dir, name, unix.O_CREAT|unix.O_EXCL|unix.O_RDWR|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
		if err != nil {
			return err
		}
		f = os.NewFile(uintptr(fd), name)
		return unix.Ftruncate(fd, size)
	})
	if err != nil {
		f.Close() // nil is fine
		return nil, err
	}
	return &newFile{t, path, f, size, fresh}, nil
}

type newFile struct {
	t    *Target
	path string
	f    *os.File
	size int64

	fresh bool
}

func (n *newFile) Fresh() bool { return n.fresh }

func (n *newFile) WriteAt(ctx context.Context, p []byte, off int64) error {
	return n.pieces(ctx, "writing", p, off, n.f.WriteAt)
}

func (n *newFile) ReadAt(ctx context.Context, p []byte, off int64) error {
	return n.pieces(ctx, "reading", p, off, n.f.ReadAt)
}

// pieces moves p, looking at the context now and then.
func (n *newFile) pieces(ctx context.Context, doing string, p []byte, off int64, move func(p []byte, off int64) (int, error)) error {
	if err := n.within(off, int64(len(p))); err != nil {
		return err
	}
	for len(p) > 0 {
		if err := ctx.Err(); err != nil {
			return err
		}
		m, err := move(p[:min(len(p), pieceMax)], off)
		if err != nil {
			return failed(err, "%s: %q: %s at %d", n.t.at.What, n.path, doing, off)
		}
		p, off = p[m:], off+int64(m)
	}
	return nil
}

// Zero makes a hole.
func (n *newFile) Zero(ctx context.Context, off, length int64) error {
	err := n.within(off, length)
	if err == nil {
		err = ctx.Err()
	}
	if err != nil || length == 0 {
		return err
	}
	if off+length == n.size { // the last block, which the file ends in, is one too
		length += holeUnit
	}
	return failed(punch(n.f, off, length), "%s: %q: zeroing %d bytes at %d", n.t.at.What, n.path, length, off)
}

func (n *newFile) within(off, length int64) error {
	if off < 0 || length < 0 || off > n.size-length {
		return fault.Errorf(fault.Invalid, "%s: %q: %d bytes at %d are not within the file's %d", n.t.at.What, n.path, length, off, n.size)
	}
	return nil
}

func (n *newFile) Close() error { return failed(n.f.Close(), "%s: %q", n.t.at.What, n.path) }
