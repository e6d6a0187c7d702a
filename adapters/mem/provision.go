package mem

import (
	"bytes"
	"context"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/adapters/loopdev"
	"stillpoint.io/stillpoint/fault"
)

var _ adapters.Provisioner = (*Adapter)(nil)

// device is what an attached volume is written through: a file in memory on a loop device. It holds the volume's live bytes
// until it is detached; a snapshot takes over what has changed in it, which is one instant only if nobody writes meanwhile:
// a filesystem on it has to be frozen.
type device struct {
	file *os.File
	path string
}

// Place is in the locality that ids without one are in.
func (a *Adapter) Place(ctx context.Context, wanted string) (adapters.VolumeID, error) {
	return adapters.VolumeID{Backend: a.backend, ID: Local + "/" + adapters.VolumeName(wanted)}, a.usable(ctx)
}

// Origin tells for whom a volume was made.
func (a *Adapter) Origin(ctx context.Context, id adapters.VolumeID) (adapters.Origin, error) {
	defer a.store.lock()()
	v, err := a.provisioned(ctx, id)
	if err != nil {
		return adapters.Origin{}, err
	}
	return v.origin, nil
}

// provisioned finds a volume that was made for somebody. The store is locked.
func (a *Adapter) provisioned(ctx context.Context, id adapters.VolumeID) (*Volume, error) {
	v, err := a.volume(ctx, id)
	if err == nil && v.origin.Name == "" {
		err = fault.Errorf(fault.Invalid, "volume %s was not made by Stillpoint, and is left alone", id)
	}
	return v, err
}

// Grow makes a volume larger, by zeros.
func (a *Adapter) Grow(ctx context.Context, id adapters.VolumeID, size int64) (adapters.Volume, error) {
	defer a.store.lock()()
	v, err := a.provisioned(ctx, id)
	if err == nil {
		err = v.grow(size)
	}
	if err != nil {
		return adapters.Volume{}, err
	}
	return a.live(v), nil
}

func (v *Volume) grow(size int64) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if size > SizeMax {
		return fault.Errorf(fault.Invalid, "volume %s: a size of %d bytes is more than %d", v.id, size, int64(SizeMax))
	}
	if size > v.size {
		v.tree.zero(v.size, size, v.epoch)
		v.size = size
	}
	if v.device == nil {
		return nil
	}
	if err := v.device.file.Truncate(v.size); err != nil {
		return err
	}
	return loopdev.Resize(v.device.path)
}

// Attach copies the volume into a file in memory, and attaches that.
func (a *Adapter) Attach(ctx context.Context, id adapters.VolumeID) (string, error) {
	defer a.store.lock()()
	v, err := a.provisioned(ctx, id)
	if err != nil {
		return "", err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.device != nil {
		return v.device.path, nil
	}
	fd, err := unix.MemfdCreate("stillpoint-mem", unix.MFD_CLOEXEC)
	if err != nil {
		return "", fmt.Errorf("volume %s: memfd_create: %w", id, err)
	}
	f := os.NewFile(uintptr(fd), v.id)
	path, err := v.attach(ctx, f)
	if err != nil {
		f.Close()
		return "", fmt.Errorf("volume %s: %w", id, err)
	}
	v.device = &device{f, path}
	v.users++
	return path, nil
}

func (v *Volume) attach(ctx context.Context, f *os.File) (string, error) {
	if err := f.Truncate(v.size); err != nil {
		return "", err
	}
	chunk := make([]byte, chunkSize)
	for e, err := range extents(ctx, nil, &v.tree, 0, SizeMax, v.size) {
		if err != nil {
			return "", err
		}
		for at := e.Offset; at < e.End() && !e.Zero; at += chunkSize {
			part := chunk[:min(chunkSize, e.End()-at)]
			v.tree.read(part, at)
			if _, err := f.WriteAt(part, at); err != nil {
				return "", err
			}
		}
	}
	return loopdev.Attach(ctx, f, label)
}

const label loopdev.Label = "stillpoint mem"

// takeOver makes the volume's tree what its device holds.
func (v *Volume) takeOver(ctx context.Context) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.device == nil {
		return nil
	}
	if err := flush(v.device.path); err != nil {
		return fmt.Errorf("volume %s: %w", v.id, err)
	}
	fd, end := int(v.device.file.Fd()), int64(0)
	have, held := make([]byte, chunkSize), make([]byte, chunkSize)
	for end < v.size {
		data, err := unix.Seek(fd, end, unix.SEEK_DATA)
		if err == unix.ENXIO {
			data = v.size
		} else if err != nil {
			return fmt.Errorf("volume %s: %w", v.id, err)
		}
		start := data &^ (chunkSize - 1)
		v.tree.zero(end, max(start, end), v.epoch)
		if end = max(start, end); end >= v.size {
			break
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		n := min(chunkSize, v.size-end)
		if _, err := v.device.file.ReadAt(have[:n], end); err != nil {
			return fmt.Errorf("volume %s: %w", v.id, err)
		}
		if v.tree.read(held[:n], end); !bytes.Equal(have[:n], held[:n]) {
			v.tree.write(have[:n], end, v.epoch)
		}
		end += n
	}
	return nil
}

// flush brings what was written to a device into its file.
func flush(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}

// Detach takes over what the device holds, and forgets it.
func (a *Adapter) Detach(ctx context.Context, id adapters.VolumeID) error {
	defer a.store.lock()()
	v, err := a.provisioned(ctx, id)
	if err != nil || v.device == nil {
		if fault.KindOf(err) == fault.NotFound {
			err = nil
		}
		return err
	}
	if err := v.takeOver(ctx); err != nil {
		return err
	}
	if err := loopdev.Detach(ctx, v.device.path, label); err != nil {
		return fmt.Errorf("volume %s: %w", id, err)
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.device.file.Close()
	v.device = nil
	v.users--
	return nil
}

// DeleteVolume forgets a volume.
func (a *Adapter) DeleteVolume(ctx context.Context, id adapters.VolumeID) error {
	defer a.store.lock()()
	v, err := a.provisioned(ctx, id)
	if err != nil {
		if fault.KindOf(err) == fault.NotFound {
			err = nil
		}
		return err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.users > 0 {
		return fault.Errorf(fault.Busy, "volume %s is in use; stop its user, and detach it first", id)
	}
	delete(a.store.volumes, v.id)
	return nil
}
