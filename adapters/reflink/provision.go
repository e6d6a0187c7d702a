package reflink

import (
	"context"
	"encoding/json"
	"os"
	"path"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/adapters/loopdev"
	"stillpoint.io/stillpoint/fault"
)

// originAttr is on a file that is a volume of ours: a mark, in JSON.
const originAttr = "trusted.stillpoint.volume"

// mark is what is noted on a volume that was made for somebody. It names the volume, so that a copy of the file with its
// attributes is not taken for one of ours.
type mark struct {
	Volume string          `json:"volume"` // canonical id, without the backend's name
	Origin adapters.Origin `json:"origin"`
}

// Place is in the folder that the parameter volumes names.
func (a *Adapter) Place(ctx context.Context, wanted string) (adapters.VolumeID, error) {
	if a.volumes == "" {
		return adapters.VolumeID{}, fault.Errorf(fault.Unsupported, "the backend %s has no place for new volumes: its parameter volumes names a folder on XFS or btrfs for them", a.backend)
	}
	return a.canonical(adapters.VolumeID{Backend: a.backend, ID: path.Join(a.volumes, adapters.VolumeName(wanted))})
}

// Origin tells for whom a file was made.
func (a *Adapter) Origin(ctx context.Context, id adapters.VolumeID) (adapters.Origin, error) {
	v, err := a.provisioned(ctx, id)
	if err != nil {
		return adapters.Origin{}, err
	}
	defer v.file.Close()
	return v.origin, nil
}

// provisioned is the open file of a volume that was made for somebody.
type provisioned struct {
	at     place
	file   *os.File // for reading and writing
	origin adapters.Origin
}

func (a *Adapter) provisioned(ctx context.Context, id adapters.VolumeID) (provisioned, error) {
	at, err := a.locate(ctx, id)
	if err != nil {
		return provisioned{}, err
	}
	v := provisioned{at: at}
	if err = v.open(); err != nil {
		return provisioned{}, failed(err, "volume %s", at.id)
	}
	return v, nil
}

func (v *provisioned) open() error {
	probe, _, err := v.at.open(v.at.path, unix.O_PATH)
	if err != nil {
		return err
	}
	defer probe.Close()
	if err := regular(probe); err != nil {
		return err
	}
	f, err := reopen(probe, os.O_RDWR)
	if err != nil {
		return err
	}
	b := make([]byte, attrMax)
	n, err := unix.Fgetxattr(int(f.Fd()), originAttr, b)
	var m mark
	if err == nil && json.Unmarshal(b[:n], &m) == nil && m.Volume == v.at.id.ID && m.Origin.Name != "" {
		v.file, v.origin = f, m.Origin
		return nil
	}
	f.Close()
	if err != nil && err != unix.ENODATA {
		return err
	}
	return fault.Errorf(fault.Invalid, "it was not made by Stillpoint, and is left alone")
}

// writeMark notes on a file that it is a volume of ours.
func writeMark(fd int, id adapters.VolumeID, o adapters.Origin) error {
	b, err := json.Marshal(mark{id.ID, o})
	if err != nil {
		return err
	}
	return unix.Fsetxattr(fd, originAttr, b, 0)
}

// loop is the loop device that the whole file is attached to by us, if it is to any.
func (v *provisioned) loop() (loop, bool, error) {
	st, err := stat(v.file)
	if err != nil {
		return loop{}, false, err
	}
	all, err := attached()
	if err != nil {
		return loop{}, false, err
	}
	for _, l := range all {
		if l.fileDev != st.Dev || l.fileIno != st.Ino {
			continue
		}
		if l.label != labelOf(v.at.id) || l.offset != 0 || l.readOnly {
			return loop{}, false, fault.Errorf(fault.Busy, "somebody else has attached it to %s; losetup -d %s", l.node(), l.node())
		}
		return l, true, nil
	}
	return loop{}, false, nil
}

// labelOf is what the loop devices say that we attach.
func labelOf(id adapters.VolumeID) loopdev.Label {
	return loopdev.Label("stillpoint " + adapters.ShortName(id.ID))
}

// release closes the file. A close alone would leave the lock to a child process that is just being started.
func (v *provisioned) release() {
	unix.Flock(int(v.file.Fd()), unix.LOCK_UN)
	v.file.Close()
}

// changing calls do with a volume of ours that no other process of ours attaches, grows, removes or restores meanwhile.
func (a *Adapter) changing(ctx context.Context, id adapters.VolumeID, do func(v provisioned) error) error {
	v, err := a.provisioned(ctx, id)
	if err != nil {
		return err
	}
	defer v.release()
	err = flock(ctx, v.file)
	if err == nil {
		err = do(v)
	}
	if err != nil {
		return failed(errno(err), "volume %s", v.at.id)
	}
	return nil
}

// Grow makes the file longer, by a hole, and its loop device with it.
func (a *Adapter) Grow(ctx context.Context, id adapters.VolumeID, size int64) (adapters.Volume, error) {
	err := a.changing(ctx, id, func(v provisioned) error {
		st, err := stat(v.file)
		if err != nil {
			return err
		}
		if st.Size < size {
			if err := v.file.Truncate(size); err != nil {
				return err
			}
			if err := v.file.Sync(); err != nil {
				return err
			}
		}
		l, is, err := v.loop()
		if err != nil || !is {
			return err
		}
		return loopdev.Resize(l.node())
	})
	if err != nil {
		return adapters.Volume{}, err
	}
	return a.Volume(ctx, id)
}

// Attach puts the file on a loop device, past the page cache of the pool, or finds the one that it is on.
func (a *Adapter) Attach(ctx context.Context, id adapters.VolumeID) (node string, err error) {
	err = a.changing(ctx, id, func(v provisioned) error {
		l, is, err := v.loop()
		if is {
			node = l.node()
		}
		if err != nil || is {
			return err
		}
		node, err = loopdev.Attach(ctx, v.file, labelOf(v.at.id))
		return err
	})
	return node, err
}

// Detach takes the file off its loop device.
func (a *Adapter) Detach(ctx context.Context, id adapters.VolumeID) error {
	err := a.changing(ctx, id, func(v provisioned) error {
		l, is, err := v.loop()
		if err != nil || !is {
			return err
		}
		return loopdev.Detach(ctx, l.node(), l.label)
	})
	if fault.KindOf(err) == fault.NotFound {
		return nil
	}
	return err
}

// DeleteVolume removes the file, if nobody has it open.
func (a *Adapter) DeleteVolume(ctx context.Context, id adapters.VolumeID) error {
	err := a.changing(ctx, id, func(v provisioned) error {
		if err := exclusive(v.file); err != nil {
			return err
		}
		folder, _, err := v.at.open(path.Dir(v.at.path), os.O_RDONLY|unix.O_DIRECTORY)
		if err != nil {
			return err
		}
		defer folder.Close()
		if err := unix.Unlinkat(int(folder.Fd()), path.Base(v.at.path), 0); err != nil {
			return err
		}
		return folder.Sync()
	})
	if fault.KindOf(err) == fault.NotFound {
		return nil
	}
	return err
}
