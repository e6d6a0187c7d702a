package reflink

import (
	"context"
	"errors"
	"iter"
	"os"
	"path"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

// Volume looks a volume up. A subvolume has no device and needs none: its snapshot is one instant of all its files by itself.
// A file's device is the loop device on which the file is attached, 0 if it is on none: a file
// that a virtual machine uses directly has none and cannot be frozen from here.
//
// WritesTo is the pool's device as mountinfo has it, which is what a plan compares with. On btrfs, stat(2) gives every
// subvolume a number of its own, which no mount has.
func (a *Adapter) Volume(ctx context.Context, id adapters.VolumeID) (adapters.Volume, error) {
	at, err := a.locate(ctx, id)
	if err != nil {
		return adapters.Volume{}, err
	}
	f, form, m, err := at.openVolume()
	if err != nil {
		return adapters.Volume{}, failed(err, "volume %s", at.id)
	}
	defer f.Close()
	st, err := stat(f)
	if err != nil {
		return adapters.Volume{}, failed(err, "volume %s", at.id)
	}
	loops, err := attached()
	if err != nil {
		return adapters.Volume{}, failed(err, "volume %s: looking for its loop device", at.id)
	}
	below, _ := under(at.path, m.root)
	if form == adapters.TreeForm {
		return adapters.Volume{ID: at.id, Form: form, Freeze: adapters.FreezeSelf, WritesTo: at.pool.device, Path: path.Join(m.point, below)}, nil
	}
	return adapters.Volume{
		ID:       at.id,
		Size:     st.Size,
		Freeze:   adapters.FreezeNests,
		Device:   carrier(loops, st.Dev, st.Ino),
		WritesTo: at.pool.device,
		Path:     path.Join(m.point, below),
	}, nil
}

// Volumes lists the files on reflink filesystems that are attached to loop devices, each once.
func (a *Adapter) Volumes(ctx context.Context) iter.Seq2[adapters.Volume, error] {
	return func(yield func(adapters.Volume, error) bool) {
		loops, err := attached()
		if err != nil {
			yield(adapters.Volume{}, failed(err, "listing loop devices"))
			return
		}
		seen := map[adapters.VolumeID]bool{}
		for _, l := range loops {
			id, ok := a.volumeOf(l)
			if !ok || seen[id] {
				continue
			}
			seen[id] = true
			v, err := a.Volume(ctx, id)
			switch fault.KindOf(err) {
			case fault.NotFound, fault.Invalid, fault.Unsupported, fault.Unavailable:
				if ctx.Err() == nil {
					continue // not a volume of this backend, or not any more
				}
			}
			if !yield(v, err) || err != nil {
				return
			}
		}
	}
}

// volumeOf is the canonical id of the file behind a loop device, if it has one here.
func (a *Adapter) volumeOf(l loop) (adapters.VolumeID, bool) {
	f, err := os.OpenFile(l.path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return adapters.VolumeID{}, false // deleted, or of another mount namespace
	}
	defer f.Close()
	st, err := stat(f)
	if err != nil || st.Dev != l.fileDev || st.Ino != l.fileIno {
		return adapters.VolumeID{}, false
	}
	id, err := a.nameOf(f, "")
	return id, err == nil
}

// inUse is Busy, with the way out.
func inUse(by string) error {
	return fault.Errorf(fault.Busy, "in use: %s; stop its user first", by)
}

// exclusive refuses a volume that somebody else uses: one on a loop device, mounted or not, and one that any other
// descriptor is open on (a virtual machine's), which a write lease finds out. f is our only open descriptor of it.
// Nothing keeps others from opening it afterwards.
func exclusive(f *os.File) error {
	st, err := stat(f)
	if err != nil {
		return err
	}
	loops, err := attached()
	if err != nil {
		return err
	}
	for _, l := range loops {
		if l.fileDev == st.Dev && l.fileIno == st.Ino {
			return inUse("it is attached to " + l.node())
		}
	}
	_, err = unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_WRLCK)
	switch {
	case errors.Is(err, unix.EAGAIN):
		return inUse("another process has it open (fuser shows which)")
	case errors.Is(err, unix.EINVAL):
		return fault.Errorf(fault.Unsupported, "whether it is in use cannot be told, because leases are switched off; sysctl fs.leases-enable=1")
	case err != nil:
		return err
	}
	_, err = unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_UNLCK)
	return err
}
