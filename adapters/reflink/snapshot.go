package reflink

import (
	"context"
	"errors"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

// CreateSnapshot clones the volume. What was staged for it is used up, whatever the outcome. The clone is a single
// system call, which neither a cancelled context nor a deadline cuts short.
func (a *Adapter) CreateSnapshot(ctx context.Context, id adapters.VolumeID, wanted string) (adapters.Snapshot, error) {
	if err := checkWanted(id, wanted); err != nil {
		return adapters.Snapshot{}, err
	}
	staged := a.take(a.key(id, wanted))
	defer staged.close()
	at, err := a.locate(ctx, id)
	if err != nil {
		return adapters.Snapshot{}, err
	}
	for {
		e, err := at.find(adapters.Name(wanted))
		if err != nil {
			return adapters.Snapshot{}, err
		}
		if e != nil {
			if e.half {
				err = e.sweep(ctx)
			}
			e.close()
			switch {
			case err != nil:
				return adapters.Snapshot{}, failed(err, "volume %s: the snapshot %q that a dead process left", at.id, wanted)
			case e.half:
				continue
			}
			return existing(e, at.id, wanted)
		}
		s, err := a.create(ctx, at, staged, wanted)
		if !errors.Is(err, unix.EEXIST) {
			return s, err
		}
		// Somebody else was faster: theirs is the snapshot. If it is gone again, make another.
		staged.close()
		staged = nil
	}
}

// existing is what CreateSnapshot answers where the name is taken.
func existing(e *entry, id adapters.VolumeID, wanted string) (adapters.Snapshot, error) {
	switch {
	case !e.ours:
		return adapters.Snapshot{}, fault.Errorf(fault.Busy, "volume %s: the name %s is taken by a file in the snapshot folder that is not ours (%s); choose another", id, adapters.Name(wanted), e.name)
	case e.record.Wanted != wanted:
		return adapters.Snapshot{}, fault.Errorf(fault.Busy, "volume %s: the name %s is taken by the snapshot %q; choose another", id, adapters.Name(wanted), e.record.Wanted)
	}
	return e.record.snapshot(id.Backend), nil
}

// create makes the snapshot of a name that was free a moment ago. An error that is EEXIST says that it is not any more.
func (a *Adapter) create(ctx context.Context, at place, staged *draft, wanted string) (adapters.Snapshot, error) {
	d := staged
	source, form, _, err := at.openVolume()
	if err != nil {
		return adapters.Snapshot{}, failed(err, "volume %s", at.id)
	}
	defer source.Close()
	if form == adapters.TreeForm {
		s, err := at.snapshotTree(source, wanted)
		if err != nil {
			err = failed(err, "volume %s: making the snapshot %q", at.id, wanted)
		}
		return s, err
	}
	if d == nil {
		folder, err := at.makeFolder()
		if err != nil {
			return adapters.Snapshot{}, failed(err, "volume %s", at.id)
		}
		if d, err = newDraft(folder, source); err != nil {
			return adapters.Snapshot{}, failed(err, "volume %s", at.id)
		}
		defer d.close()
	} else if !sameFile(source, d.of) {
		return adapters.Snapshot{}, fault.Errorf(fault.Unavailable, "volume %s: the file was replaced by another since the snapshot was prepared; try again", at.id)
	}
	r := record{Version: recordVersion, Volume: at.id.ID, Wanted: wanted, Mark: adapters.Cutting, Created: time.Now().UTC()}
	if d == staged {
		err = d.refresh(ctx, source)
	} else {
		err = d.clone(source)
	}
	if err != nil {
		return adapters.Snapshot{}, failed(err, "volume %s: cloning it", at.id)
	}
	r.Size = d.size
	if err := r.write(d.file); err != nil {
		return adapters.Snapshot{}, failed(err, "volume %s: marking the snapshot %q", at.id, wanted)
	}
	name := fileName(at.id.ID, adapters.Name(wanted))
	if err := unix.Linkat(int(d.file.Fd()), "", int(d.folder.Fd()), name, unix.AT_EMPTY_PATH); err != nil {
		return adapters.Snapshot{}, failed(err, "volume %s: naming the snapshot %q", at.id, wanted)
	}
	return r.snapshot(at.id.Backend), nil
}

// Publish makes the snapshot durable, then marks it verified, then makes that durable. It waits for the disk.
func (a *Adapter) Publish(ctx context.Context, id adapters.SnapshotID, notes adapters.Notes) error {
	_, e, err := a.lookup(ctx, id)
	if err != nil {
		return err
	}
	defer e.close()
	there, err := e.lock(ctx)
	if err == nil && !there {
		return notFound(id)
	}
	if err == nil {
		err = e.publish(notes)
	}
	if err != nil {
		return failed(err, "publishing the snapshot %s", id)
	}
	return nil
}

func (e *entry) publish(notes adapters.Notes) error {
	if err := e.sync(); err != nil {
		return err
	}
	if err := setFlag(e.file, flagImmutable, false); err != nil { // an immutable file keeps its attributes too
		return err
	}
	e.record.Mark, e.record.Notes = adapters.Verified, notes
	if err := e.record.write(e.file); err != nil {
		return err
	}
	if err := setFlag(e.file, flagImmutable, true); err != nil {
		return err
	}
	return e.sync()
}

// sync makes a snapshot's file, its name, and the folder's name durable.
func (e *entry) sync() error {
	if err := e.file.Sync(); err != nil {
		return errno(err)
	}
	if err := e.folder.Sync(); err != nil {
		return errno(err)
	}
	return syncParent(e.folder)
}

func syncParent(folder *os.File) error {
	fd, err := unix.Openat(int(folder.Fd()), "..", os.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Fsync(fd)
}

// Snapshot looks a snapshot up.
func (a *Adapter) Snapshot(ctx context.Context, id adapters.SnapshotID) (adapters.Snapshot, error) {
	_, e, err := a.lookup(ctx, id)
	if err != nil {
		return adapters.Snapshot{}, err
	}
	e.close()
	return e.record.snapshot(a.backend), nil
}

// lookup opens a snapshot of ours.
func (a *Adapter) lookup(ctx context.Context, id adapters.SnapshotID) (place, *entry, error) {
	at, e, err := a.lookupAny(ctx, id)
	if err == nil && (e == nil || !e.ours) {
		if e != nil {
			e.close()
		}
		err = notFound(id)
	}
	return at, e, err
}

func (a *Adapter) lookupAny(ctx context.Context, id adapters.SnapshotID) (place, *entry, error) {
	if id.Name == "" || adapters.Name(id.Name) != id.Name {
		return place{}, nil, fault.Errorf(fault.Invalid, "snapshot %s: %q is not a snapshot's name in a pool: at most %d of [a-z0-9-]", id, id.Name, adapters.NameMax)
	}
	at, err := a.locate(ctx, id.Volume)
	if err != nil {
		return place{}, nil, err
	}
	e, err := at.find(id.Name)
	return at, e, err
}

func notFound(id adapters.SnapshotID) error {
	return fault.Errorf(fault.NotFound, "snapshot %s: there is none of ours", id)
}

// DeleteSnapshot removes a snapshot. Who has it open goes on reading it.
func (a *Adapter) DeleteSnapshot(ctx context.Context, id adapters.SnapshotID) error {
	for {
		_, e, err := a.lookupAny(ctx, id)
		if err != nil || e == nil {
			return err
		}
		err = e.remove(ctx)
		e.close()
		if err != nil {
			return failed(err, "deleting the snapshot %s", id)
		}
	}
}

func (e *entry) remove(ctx context.Context) error {
	if e.half {
		return e.sweep(ctx)
	}
	if !e.ours {
		return fault.Errorf(fault.Invalid, "the file %s in the snapshot folder is not ours and stays", e.name)
	}
	if there, err := e.lock(ctx); err != nil || !there {
		return err
	}
	if err := setFlag(e.file, flagImmutable, false); err != nil {
		return err
	}
	if e.record.Tree { // first: a record without its subvolume is known for what it is
		if err := destroySubvolume(e.folder, treeName(e.name)); err != nil {
			return err
		}
	}
	return unix.Unlinkat(int(e.folder.Fd()), e.name, 0)
}
