// Package loopdev attaches files to loop devices, under a label by which whoever comes after a crash knows the device again
// (loop(4); LOOP_CONFIGURE needs Linux 5.8).
package loopdev

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/fault"
)

// Label is what a device's lo_file_name says: at most 63 bytes of ASCII.
type Label string

// sector is the device's logical block in bytes. It is what most disks have, and set, because the kernel's own choice depends
// on the file (4096 for one that shares blocks on XFS, since Linux 6.18 at the latest): a filesystem that was made on the one
// cannot be mounted on the other.
const sector = 512

// Attach puts an open file on a free loop device, which it returns the path of. The device holds the file open. Its I/O
// bypasses the page cache of the file's filesystem where that is possible.
func Attach(ctx context.Context, f *os.File, label Label) (path string, err error) {
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", fault.Errorf(fault.Unavailable, "%w; loop devices need the module loop, and the host's /dev", err)
	}
	defer control.Close()
	config := unix.LoopConfig{Fd: uint32(f.Fd()), Size: sector, Info: unix.LoopInfo64{Flags: unix.LO_FLAGS_DIRECT_IO}}
	if len(label) >= len(config.Info.File_name) {
		return "", fmt.Errorf("the label %q is too long for a loop device", label)
	}
	copy(config.Info.File_name[:], label)
	for {
		if err := ctx.Err(); err != nil {
			return "", err
		}
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return "", fmt.Errorf("asking for a free loop device: %w", err)
		}
		path := fmt.Sprintf("/dev/loop%d", n)
		switch err := configure(path, &config); {
		case err == nil:
			return path, nil
		case errors.Is(err, unix.EBUSY): // somebody else was quicker: another one
		default:
			return "", fmt.Errorf("attaching %s: %w", path, err)
		}
	}
}

func configure(path string, config *unix.LoopConfig) error {
	device, err := os.OpenFile(path, os.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer device.Close()
	return unix.IoctlLoopConfigure(int(device.Fd()), config)
}

// Resize makes a device as large as its file is now.
func Resize(path string) error {
	device, err := os.OpenFile(path, os.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer device.Close()
	if err := unix.IoctlSetInt(int(device.Fd()), unix.LOOP_SET_CAPACITY, 0); err != nil {
		return fmt.Errorf("resizing %s: %w", path, err)
	}
	return nil
}

// patience is how long a device may be looked at, by whoever looks at every new one, after it was detached.
const patience = 5 * time.Second

// Detach takes the file off a device that bears the label, and waits until it is off. A device that does not bear it any
// more is success, one that is mounted or open is Busy.
func Detach(ctx context.Context, path string, label Label) error {
	ours, err := detach(path, label)
	for begin := time.Now(); ours && err == nil; { // the kernel does it when the last one closes the device: usually us, at once
		if time.Since(begin) > patience {
			return fault.Errorf(fault.Busy, "%s goes when the last program closes it, and one has it open still (lsof shows which)", path)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(5 * time.Millisecond):
		}
		ours, err = bears(path, label)
	}
	return err
}

func detach(path string, label Label) (ours bool, err error) {
	device, err := os.OpenFile(path, os.O_RDWR|unix.O_EXCL|unix.O_CLOEXEC, 0) // O_EXCL: nobody has it mounted
	if errors.Is(err, unix.EBUSY) {
		return true, fault.Errorf(fault.Busy, "%s is in use: mounted, or held by another device; unmount it first (findmnt and lsblk show where)", path)
	}
	if err != nil {
		return false, gone(err)
	}
	defer device.Close()
	if ours, err = bearsOpen(device, label); err != nil || !ours {
		return false, err
	}
	return true, gone(unix.IoctlSetInt(int(device.Fd()), unix.LOOP_CLR_FD, 0))
}

func bears(path string, label Label) (bool, error) {
	device, err := os.OpenFile(path, os.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return false, gone(err)
	}
	defer device.Close()
	return bearsOpen(device, label)
}

func bearsOpen(device *os.File, label Label) (bool, error) {
	info, err := unix.IoctlLoopGetStatus64(int(device.Fd()))
	if err != nil {
		return false, gone(err)
	}
	return LabelOf(info) == label, nil
}

// LabelOf reads the label of a device.
func LabelOf(info *unix.LoopInfo64) Label { return Label(unix.ByteSliceToString(info.File_name[:])) }

// gone takes the errors for success that say that nothing is attached.
func gone(err error) error {
	if errors.Is(err, unix.ENXIO) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) {
		return nil
	}
	return err
}
