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

// folderName is the folder of the snapshots.
const folderName = ".stillpoint"

// entry is a snapshot's file, open, in its folder. ours is false for a file that merely has the name: without a record,
// or with the record of another snapshot.
type entry struct {
	folder, file *os.File
	name         string // the file's, in the folder
	record       record
	ours         bool
	half         bool // a record of ours without its subvolume: one that is just being made or deleted, or what a dead process left
}

func (e *entry) close() {
	e.file.Close()
	e.folder.Close()
}

// ancestors are the folders above a path, the uppermost first. Snapshots of the path may be in any of them, for the
// mount that was uppermost when they were made need not be it now.
func ancestors(inside string) []string {
	dirs := []string{"/"}
	for i := 1; i < len(inside); i++ {
		if inside[i] == '/' {
			dirs = append(dirs, inside[:i])
		}
	}
	return append(dirs, inside) // a subvolume that is mounted by itself has its snapshots in its own root
}

// folder opens the snapshot folder in dir, a path inside the filesystem; nil if there is none.
func (p place) folder(dir string) (*os.File, error) {
	f, _, err := p.open(path.Join(dir, folderName), os.O_RDONLY|unix.O_DIRECTORY)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		return nil, nil
	}
	if err == nil {
		err = private(f)
	}
	if err != nil {
		if f != nil {
			f.Close()
		}
		return nil, failed(err, "snapshot folder %s of the filesystem %s", path.Join(dir, folderName), p.pool.uuid)
	}
	return f, nil
}

// private refuses a folder in which others than its owner, who must be us, could swap snapshots.
func private(f *os.File) error {
	st, err := stat(f)
	if err == nil && (int(st.Uid) != os.Geteuid() || st.Mode&0o077 != 0) {
		return fault.Errorf(fault.Invalid, "it belongs to user %d with mode %04o, so it is not ours; it must be root's with 0700", st.Uid, st.Mode&0o7777)
	}
	return err
}

// makeFolder opens the snapshot folder in the uppermost writable mount that shows the volume, and makes it if need be.
func (p place) makeFolder() (*os.File, error) {
	for _, m := range p.shown {
		if m.readOnly {
			continue
		}
		dir, err := m.open()
		if err != nil {
			continue // hidden under another mount
		}
		defer dir.Close()
		err = unix.Mkdirat(int(dir.Fd()), folderName, 0o700)
		if err != nil && err != unix.EEXIST {
			return nil, failed(err, "making the snapshot folder in %s", m.point)
		}
		f, err := treefs.OpenBeneath(dir, folderName, os.O_RDONLY|unix.O_DIRECTORY)
		if err == unix.ENOTDIR {
			err = fault.Errorf(fault.Invalid, "it is not a folder; move it away")
		}
		if err == nil {
			err = private(f)
		}
		if err != nil {
			if f != nil {
				f.Close()
			}
			return nil, failed(err, "snapshot folder %s/%s", m.point, folderName)
		}
		return f, nil
	}
	return nil, unix.EROFS
}

// find looks a snapshot's file up, in the folders above the volume; nil if there is none.
func (p place) find(name string) (*entry, error) {
	for _, dir := range ancestors(p.path) {
		folder, err := p.folder(dir)
		if err != nil {
			return nil, err
		}
		if folder == nil {
			continue
		}
		e, err := openEntry(folder, fileName(p.id.ID, name))
		if err != nil {
			folder.Close()
			return nil, failed(err, "snapshot %s", adapters.SnapshotID{Volume: p.id, Name: name})
		}
		if e != nil {
			e.ours = e.ours && e.record.Volume == p.id.ID
			return e, nil
		}
		folder.Close()
	}
	return nil, nil
}

// openEntry opens a file of a snapshot folder and reads its record; nil if there is no such file. The folder belongs to
// the entry then.
func openEntry(folder *os.File, name string) (*entry, error) {
	probe, err := treefs.OpenBeneath(folder, name, unix.O_PATH|unix.O_NOFOLLOW)
	if err != nil {
		if err == unix.ENOENT {
			return nil, nil
		}
		return nil, err
	}
	e := &entry{folder: folder, file: probe, name: name}
	st, err := stat(probe)
	if err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
		return e, err // a link, a folder, a device: not ours, and not opened
	}
	defer probe.Close()
	e.file, err = os.OpenFile(procPath(probe), os.O_RDONLY|unix.O_NOATIME|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, errno(err)
	}
	if err := e.read(); err != nil {
		e.file.Close()
		return nil, err
	}
	e.ours = e.ours && name == fileName(e.record.Volume, adapters.Name(e.record.Wanted))
	return e, nil
}

// read reads the record, and looks for the subvolume that belongs to it.
func (e *entry) read() (err error) {
	e.record, e.ours, err = readRecord(e.file)
	if err != nil || !e.ours || !e.record.Tree {
		return err
	}
	whole, err := e.hasTree()
	e.ours, e.half = whole, !whole
	return err
}

// lock keeps others from publishing or deleting the snapshot, in this process and in others, until the file is closed.
// It reads the record anew and reports whether the snapshot is still there.
func (e *entry) lock(ctx context.Context) (bool, error) {
	if err := flock(ctx, e.file); err != nil {
		return false, err
	}
	st, err := stat(e.file)
	if err != nil || st.Nlink == 0 {
		return false, err
	}
	err = e.read()
	return e.ours, err
}

// flock waits for an exclusive lock on an open file.
func flock(ctx context.Context, f *os.File) error {
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err != unix.EWOULDBLOCK && err != unix.EINTR {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(2 * time.Millisecond):
		}
	}
}
