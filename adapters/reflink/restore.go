package reflink

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"path"
	"sync"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/adapters/direct"
	"stillpoint.io/stillpoint/adapters/treefs"
	"stillpoint.io/stillpoint/fault"
)

// targetPrefix starts the name of an unfinished restore, in the folder of the volume that it will be; the rest is a
// hash of the volume's id and the token. It cannot lie in the snapshot folder: btrfs moves no file between subvolumes.
const targetPrefix = ".stillpoint-restore-"

// Begin makes a file beside the volume that is to be, or opens the existing volume. The id may be a typed one. A restore
// that another process has under way is Busy, and so is an existing volume that is in use, or is not to be overwritten.
func (a *Adapter) Begin(ctx context.Context, spec adapters.VolumeSpec) (adapters.Target, error) {
	if spec.Token == "" || spec.Size <= 0 {
		return nil, fault.Errorf(fault.Invalid, "volume %s: a restore needs a token and a size of at least one byte, not %q and %d", spec.ID, spec.Token, spec.Size)
	}
	return a.begin(ctx, spec, nil)
}

// BeginClone makes a file that shares the snapshot's blocks: in the snapshot's own filesystem, others are Unsupported.
func (a *Adapter) BeginClone(ctx context.Context, id adapters.SnapshotID, spec adapters.VolumeSpec) (adapters.Target, error) {
	_, source, err := a.openSnapshot(ctx, id)
	if err != nil {
		return nil, err
	}
	defer source.Close()
	st, err := stat(source)
	if err != nil {
		return nil, failed(err, "snapshot %s", id)
	}
	if spec.Token == "" || spec.Overwrite || spec.Size < st.Size {
		return nil, fault.Errorf(fault.Invalid, "volume %s: a clone of %s is a new volume of at least %d bytes, and needs a token", spec.ID, id, st.Size)
	}
	return a.begin(ctx, spec, source)
}

// begin makes or opens a target. A new one is a clone of source, unless that is nil.
func (a *Adapter) begin(ctx context.Context, spec adapters.VolumeSpec, source *os.File) (adapters.Target, error) {
	at, err := a.locate(ctx, spec.ID)
	if err != nil {
		return nil, err
	}
	t := &target{adapter: a, at: at, size: spec.Size, overwrite: spec.Overwrite, clone: source != nil, origin: spec.Origin}
	if spec.Overwrite {
		err = t.openExisting()
	} else {
		err = t.openNew(spec.Token, source)
	}
	if err == nil {
		t.direct, err = reopen(t.file, os.O_RDWR|unix.O_DIRECT)
	}
	if err != nil {
		t.release()
		return nil, failed(err, "volume %s", at.id)
	}
	return t, nil
}

// target is a file being filled. It is locked (flock) as long as it is open.
type target struct {
	adapter      *Adapter
	at           place
	size         int64
	overwrite    bool
	clone        bool
	origin       adapters.Origin // of a new volume that is made for somebody
	folder       *os.File        // of a new volume
	name         string          // of the unfinished file in it
	file, direct *os.File
	fresh        bool

	mu     sync.RWMutex // held for reading by writers, so that closing waits for them
	closed bool
}

// openExisting opens the volume that is to be overwritten.
func (t *target) openExisting() error {
	probe, _, err := t.at.open(t.at.path, unix.O_PATH)
	if err != nil {
		return err
	}
	defer probe.Close()
	if err := regular(probe); err != nil {
		return err
	}
	if t.file, err = reopen(probe, os.O_RDWR); err != nil {
		return err
	}
	if err := unix.Flock(int(t.file.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return inUse("another process has locked it")
	}
	st, err := stat(t.file)
	if err != nil {
		return err
	}
	if st.Size < t.size {
		return fault.Errorf(fault.Invalid, "its %d bytes are fewer than the %d to restore", st.Size, t.size)
	}
	return exclusive(t.file)
}

// openNew makes the unfinished file, or opens the one that is there.
func (t *target) openNew(token string, source *os.File) error {
	var err error
	if t.folder, _, err = t.at.open(path.Dir(t.at.path), os.O_RDONLY|unix.O_DIRECTORY); err != nil {
		return err
	}
	t.name = targetPrefix + adapters.ShortName(t.at.id.ID+"\x00"+token)
	for {
		if err := t.vacant(); err != nil {
			return err
		}
		t.file, err = treefs.OpenBeneath(t.folder, t.name, os.O_RDWR|unix.O_NONBLOCK|unix.O_NOFOLLOW)
		if err == unix.ENOENT {
			switch err := t.makeNew(source); err {
			case nil:
				t.fresh = true
			case unix.EEXIST:
			default:
				return err
			}
			continue
		}
		if err != nil {
			return err
		}
		there, err := t.claim()
		if there || err != nil {
			return err
		}
		t.file.Close() // finished or given up by somebody else just now
		t.fresh = false
	}
}

// vacant is nil if no file has the volume's name.
func (t *target) vacant() error {
	var st unix.Stat_t
	switch err := unix.Fstatat(int(t.folder.Fd()), path.Base(t.at.path), &st, unix.AT_SYMLINK_NOFOLLOW); err {
	case nil:
		return fault.Errorf(fault.Busy, "it exists; overwrite it or choose another")
	case unix.ENOENT:
		return nil
	default:
		return err
	}
}

// makeNew makes the unfinished file, complete with its attribute and, of a clone, its content, under its name.
func (t *target) makeNew(source *os.File) error {
	fd, err := unix.Openat(int(t.folder.Fd()), ".", unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), t.name)
	defer f.Close()
	if source != nil {
		if err := share(f, source); err != nil {
			return err
		}
	}
	if err := unix.Ftruncate(fd, t.size); err != nil {
		return err
	}
	if err := unix.Fsetxattr(fd, restoreAttr, t.attribute(), 0); err != nil {
		return err
	}
	if t.origin.Name != "" {
		if err := writeMark(fd, t.at.id, t.origin); err != nil {
			return err
		}
	}
	return unix.Linkat(fd, "", int(t.folder.Fd()), t.name, unix.AT_EMPTY_PATH)
}

// share makes an empty file a clone of source.
func share(f, source *os.File) error {
	st, err := stat(source)
	if err == nil {
		err = likeSource(f, source)
	}
	if err == nil {
		err = cloneRange(f, source, 0, st.Size)
	}
	if err == unix.EXDEV {
		return fault.Errorf(fault.Unsupported, "it is on another filesystem than the snapshot, and can share no blocks with it")
	}
	return err
}

// attribute is what is noted on an unfinished file.
func (t *target) attribute() []byte {
	if t.clone {
		return []byte(t.at.id.ID + " as a clone")
	}
	return []byte(t.at.id.ID)
}

// claim locks the unfinished file and reports whether it is still there under its name. Afterwards it is ours alone.
func (t *target) claim() (bool, error) {
	if err := unix.Flock(int(t.file.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return false, fault.Errorf(fault.Busy, "this restore is under way in another process, or elsewhere in this one")
	}
	now, err := treefs.OpenBeneath(t.folder, t.name, unix.O_PATH|unix.O_NOFOLLOW)
	if err != nil {
		if err == unix.ENOENT {
			err = nil
		}
		return false, err
	}
	defer now.Close()
	if !sameFile(now, t.file) {
		return false, nil
	}
	want := t.attribute()
	b := make([]byte, len(want)+1)
	if n, err := unix.Fgetxattr(int(t.file.Fd()), restoreAttr, b); err != nil || !bytes.Equal(b[:n], want) {
		return false, fault.Errorf(fault.Busy, "the file %s beside it is not an unfinished restore of it; move it away", t.name)
	}
	st, err := stat(t.file)
	if err == nil && st.Size != t.size {
		return false, fault.Errorf(fault.Invalid, "this restore was begun with %d bytes, not %d; use another token", st.Size, t.size)
	}
	return err == nil, err
}

// WriteAt writes, past the page cache where the alignment allows.
func (t *target) WriteAt(ctx context.Context, p []byte, off int64) error {
	return t.move(ctx, p, off, (*os.File).WriteAt)
}

// ReadAt reads, past the page cache where the alignment allows.
func (t *target) ReadAt(ctx context.Context, p []byte, off int64) error {
	return t.move(ctx, p, off, (*os.File).ReadAt)
}

func (t *target) move(ctx context.Context, p []byte, off int64, do func(f *os.File, p []byte, off int64) (int, error)) error {
	return t.change(off, int64(len(p)), func() error {
		_, err := direct.Move(ctx, t.file, t.direct, p, off, do)
		return errno(err)
	})
}

// Fresh is true of a file that this Begin made.
func (t *target) Fresh() bool { return t.fresh }

// Zero punches a hole: it reads as zeros for certain, and the space goes back to the pool.
func (t *target) Zero(ctx context.Context, off, length int64) error {
	return t.change(off, length, func() error {
		for length > 0 {
			if err := ctx.Err(); err != nil {
				return err
			}
			const most = 64 << 30 // one call cannot be cancelled
			n := min(length, most)
			switch err := unix.Fallocate(int(t.file.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n); err {
			case nil:
				off, length = off+n, length-n
			case unix.EINTR:
			default:
				return err
			}
		}
		return nil
	})
}

// change runs a write within the bounds of an open target.
func (t *target) change(off, length int64, write func() error) error {
	t.mu.RLock()
	defer t.mu.RUnlock()
	if t.closed {
		return fault.Errorf(fault.Invalid, "volume %s: written after the target was closed", t.at.id)
	}
	if off < 0 || length < 0 || length > t.size || off > t.size-length {
		return fault.Errorf(fault.Invalid, "volume %s: %d bytes at %d are not within the target's %d", t.at.id, length, off, t.size)
	}
	if err := write(); err != nil {
		return failed(err, "volume %s: writing %d bytes at %d", t.at.id, length, off)
	}
	return nil
}

// ReadsZero is true for a new file, in which everything is a hole until it is written, unless it is a clone.
func (t *target) ReadsZero() bool { return !t.overwrite && !t.clone }

// Commit makes the content durable, then gives a new volume its name, then makes that durable. It waits for the disk.
func (t *target) Commit(ctx context.Context) (adapters.Volume, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return adapters.Volume{}, fault.Errorf(fault.Invalid, "volume %s: committed after the target was closed", t.at.id)
	}
	defer t.release()
	err := ctx.Err()
	if err == nil {
		err = t.commit()
	}
	if err != nil {
		return adapters.Volume{}, failed(err, "volume %s: finishing the restore", t.at.id)
	}
	return t.adapter.Volume(ctx, t.at.id)
}

func (t *target) commit() error {
	if err := t.file.Sync(); err != nil || t.overwrite {
		return errno(err)
	}
	dir := int(t.folder.Fd())
	err := unix.Renameat2(dir, t.name, dir, path.Base(t.at.path), unix.RENAME_NOREPLACE)
	if err == unix.EEXIST {
		return fault.Errorf(fault.Busy, "somebody else made it meanwhile; choose another name or overwrite it")
	}
	if err != nil {
		return err
	}
	if err := unix.Fremovexattr(int(t.file.Fd()), restoreAttr); err != nil && err != unix.ENODATA {
		return err
	}
	return errno(errors.Join(t.folder.Sync(), t.file.Sync()))
}

// Abort removes what was not committed.
func (t *target) Abort(context.Context) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return nil
	}
	defer t.release()
	if t.overwrite {
		return nil
	}
	if err := unix.Unlinkat(int(t.folder.Fd()), t.name, 0); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return failed(err, "volume %s: giving the restore up", t.at.id)
	}
	return nil
}

// Close keeps the unfinished file.
func (t *target) Close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.closed {
		t.release()
	}
	return nil
}

// release unlocks the file and closes the descriptors. A close alone would leave the lock to a child process that is
// just being started and still has copies of them.
func (t *target) release() {
	t.closed = true
	if t.file != nil {
		unix.Flock(int(t.file.Fd()), unix.LOCK_UN)
	}
	for _, f := range []*os.File{t.direct, t.file, t.folder} {
		f.Close() // nil or already closed is fine
	}
}
