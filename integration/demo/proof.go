package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/adapters/registry"
	"stillpoint.io/stillpoint/integration/lab"
)

// restore restores into volumes that are full of old bytes.
func (d *demo) restore(ctx context.Context, backups []string) (restored []volume, err error) {
	for i, b := range backups {
		v, err := d.volumes[i].beside(ctx, d.lab, d.grounds)
		if err != nil {
			return nil, err
		}
		if _, err := d.stillpoint(ctx, "restore", b, v.id.String(), "--overwrite"); err != nil {
			return nil, err
		}
		restored = append(restored, v)
	}
	return restored, nil
}

// fill fills a file or device with old bytes.
func fill(path string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	old := bytes.Repeat([]byte{0xA5}, mib)
	for range volumeSize / mib {
		if _, err := f.Write(old); err != nil {
			return errors.Join(err, f.Close())
		}
	}
	return errors.Join(f.Sync(), f.Close())
}

// prove shows that the restored volumes are the snapshots bit for bit, that the filesystems in them are sound, and that
// both are of one instant.
func (d *demo) prove(ctx context.Context, snapshots []string, restored []volume) error {
	var folders []string
	for i, v := range restored {
		n, err := d.sameBytes(ctx, snapshots[i], v)
		if err != nil {
			return err
		}
		name, fstype := filepath.Base(v.path), d.volumes[i].fs.Type
		d.say("  %s: bit-identical to its snapshot, all %d bytes", name, n)
		sound := d.lab.Sound
		if fstype == "xfs" { // whose log is to be replayed, which may be done in what was restored
			sound = d.lab.Replayed
		}
		if err := sound(ctx, fstype, v.path); err != nil {
			return err
		}
		d.say("  %s: the %s filesystem in it is sound", name, fstype)
		fs, err := d.lab.MountAgain(ctx, fstype, v.path)
		if err != nil {
			return err
		}
		defer fs.Down()
		folders = append(folders, fs.Mount)
	}
	last, err := lab.Instant(folders)
	if err != nil {
		return err
	}
	d.say("  the writer had come to %d on the first volume and %d on the second: one instant", last[0], last[1])
	return nil
}

// sameBytes compares a snapshot, read through its adapter, with a file or device.
func (d *demo) sameBytes(ctx context.Context, handle string, v volume) (n int64, err error) {
	kind, err := registry.Find(v.id.Backend)
	if err != nil {
		return 0, err
	}
	a, err := kind.Open(ctx, adapters.Config{Name: v.id.Backend, Parameters: d.grounds.backends()[v.id.Backend]})
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, a.Close()) }()
	h, err := adapters.ParseHandle(handle)
	if err != nil {
		return 0, err
	}
	id, err := adapters.Resolve(ctx, a, h)
	if err != nil {
		return 0, err
	}
	opener, _ := adapters.As[adapters.Opener](a)
	image, err := opener.Open(ctx, id)
	if err != nil {
		return 0, err
	}
	defer image.Close()
	f, err := os.Open(v.path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	if size, err := f.Seek(0, io.SeekEnd); err != nil || size != image.Size() { // a device's too
		return 0, fmt.Errorf("%s has %d bytes, the snapshot %d: %v", v.path, size, image.Size(), err)
	}
	want, got := make([]byte, mib), make([]byte, mib)
	for off := int64(0); off < image.Size(); off += mib {
		n := min(mib, image.Size()-off)
		if _, err := image.ReadAt(ctx, want[:n], off); err != nil && !errors.Is(err, io.EOF) {
			return 0, err
		}
		if _, err := f.ReadAt(got[:n], off); err != nil && !errors.Is(err, io.EOF) {
			return 0, err
		}
		if !bytes.Equal(want[:n], got[:n]) {
			return 0, fmt.Errorf("%s differs from %s within the MiB at %d", v.path, handle, off)
		}
	}
	return image.Size(), nil
}
