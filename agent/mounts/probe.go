package mounts

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/fault"
)

// FilesystemOf returns the filesystem of an open file, whatever its name is by now, without asking a server. NotFound
// for a pipe, a socket, and what is not mounted here.
func (t Table) FilesystemOf(f *os.File) (Filesystem, error) {
	conn, err := f.SyscallConn()
	if err != nil {
		return Filesystem{}, err
	}
	var info []byte
	var infoErr, statErr error
	var st unix.Statx_t
	err = conn.Control(func(fd uintptr) {
		info, infoErr = os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", fd))
		statErr = unix.Statx(int(fd), "", unix.AT_EMPTY_PATH|unix.AT_STATX_DONT_SYNC, 0, &st)
	})
	if err := errors.Join(err, infoErr, statErr); err != nil {
		return Filesystem{}, fault.Errorf(fault.Internal, "finding the filesystem of %s: %w", f.Name(), err)
	}
	for line := range strings.Lines(string(info)) {
		if id, ok := strings.CutPrefix(line, "mnt_id:"); ok {
			id, _ := strconv.Atoi(strings.TrimSpace(id))
			if m, ok := t.mounts[id]; ok {
				return t.find(m.Filesystem)
			}
		}
	}
	// Its mount is not to be seen: it was detached, or belongs to a container whose host's table this is.
	found, ok := t.Filesystem(MakeDevice(st.Dev_major, st.Dev_minor))
	if !ok {
		return found, fault.Errorf(fault.NotFound, "%s: not on a filesystem that is mounted here", f.Name())
	}
	return found, nil
}

// Hidden returns those of the devices, and of the block devices that stand on them, which somebody holds exclusively
// though nothing in the table says who: a mount in another namespace or unmounted lazily, a swap area, a guest, a
// cluster's storage daemon. It opens each for reading with O_EXCL, for a moment in which another's exclusive open or
// mount fails with EBUSY. NotFound for a device that is gone.
func (h Host) Hidden(ctx context.Context, t Table, devices ...Device) ([]Device, error) {
	held := map[Device]bool{} // those asked about so far: by whomever, in sight or not
	var hidden []Device
	var ask func(Device) error
	ask = func(id Device) error {
		if _, ok := held[id]; ok {
			return nil
		}
		held[id] = false
		for _, up := range t.above[node{id: id}] {
			d, _ := t.Device(up.id)
			switch {
			case up.filesystem:
				held[id] = true
			case d.Partition: // the kernel calls a disk held when one of its partitions is
				if err := ask(up.id); err != nil {
					return err
				}
				held[id] = held[id] || held[up.id]
			case !strings.HasPrefix(d.Name, "loop"): // a loop device does not hold the device that it stands on
				held[id] = true
			}
		}
		if held[id] {
			return nil
		}
		d, ok := t.Device(id)
		if !ok {
			return fault.Errorf(fault.NotFound, "block device %s: not there (any more)", id)
		}
		busy, err := answer(ctx, d.Name, func() (bool, error) { return h.busy(d) })
		if err != nil {
			return err
		}
		if busy {
			held[id] = true
			hidden = append(hidden, id)
		}
		return nil
	}
	for _, id := range t.DevicesOn(devices...) {
		if err := ask(id); err != nil {
			return nil, err
		}
	}
	return hidden, nil
}

// busy tries to open a device exclusively.
func (h Host) busy(d BlockDevice) (bool, error) {
	f, err := h.openDevice(d, unix.O_EXCL)
	switch {
	case err == nil:
		f.Close()
		return false, nil
	case errors.Is(err, unix.EBUSY):
		return true, nil
	case errors.Is(err, unix.ENXIO), errors.Is(err, unix.ENOMEDIUM): // a loop device without a file, an empty drive
		return false, nil
	}
	return false, fault.Errorf(fault.Unavailable, "finding out whether somebody holds %s: %w", d.Name, err)
}

// Counters are what the kernel counted for a device since it appeared. Sectors have 512 bytes.
type Counters struct {
	Device Device
	// Kept is false if the kernel keeps no counters for it: the rest says nothing then.
	Kept                                               bool
	Writes, SectorsWritten, Discards, SectorsDiscarded uint64 // completed
}

// Moved reports whether the device was written to between two readings, or its counters switched on or off.
func (c Counters) Moved(since Counters) bool { return c != since }

// Counters reads the counters of devices, in their order (kernel: Documentation/block/stat.rst). A device that counts
// nothing at all, not even the reads without which no filesystem can be on it, has a driver that keeps no counters.
// NotFound for a device that is gone.
func (h Host) Counters(ctx context.Context, devices ...Device) ([]Counters, error) {
	var all []Counters
	for _, id := range devices {
		if err := ctx.Err(); err != nil {
			return nil, fault.Errorf(fault.Unavailable, "reading write counters: %w", err)
		}
		folder := h.Path(filepath.Join("/sys/dev/block", id.String()))
		line, err := readLine(folder + "/stat")
		if errors.Is(err, os.ErrNotExist) {
			return nil, fault.Errorf(fault.NotFound, "block device %s: gone, it has no write counters", id)
		}
		if err != nil {
			return nil, fault.Errorf(fault.Internal, "reading write counters: %w", err)
		}
		var n [17]uint64 // older kernels have fewer
		for i, field := range strings.Fields(line) {
			if i < len(n) {
				n[i], _ = strconv.ParseUint(field, 10, 64)
			}
		}
		all = append(all, Counters{
			Device: id, Kept: counted(folder) && (n[0] > 0 || n[4] > 0),
			Writes: n[4], SectorsWritten: n[6], Discards: n[11], SectorsDiscarded: n[13],
		})
	}
	return all, nil
}

// CountsRegardless reports whether the kernel counts a device's I/O though the device's setting says that it does not
// (queue/iostats is 0, and Counters.Kept false): device-mapper on Linux 6.1 counts always, and on 6.12 by the setting.
// It is tried, with a direct read of 4 KiB. False where the setting is on. It returns by ctx's deadline: Unavailable.
func (h Host) CountsRegardless(ctx context.Context, id Device) (bool, error) {
	folder := h.Path(filepath.Join("/sys/dev/block", id.String()))
	target, err := os.Readlink(folder)
	if err != nil {
		return false, fault.Errorf(fault.NotFound, "block device %s: not there (any more)", id)
	}
	reads := func() string {
		line, _ := readLine(folder + "/stat")
		n, _, _ := strings.Cut(line, " ")
		return n
	}
	if counted(folder) {
		return false, nil
	}
	before := reads()
	d := BlockDevice{ID: id, Name: filepath.Base(target)}
	if _, err := answer(ctx, d.Name, func() (int, error) { return h.readBlock(d) }); err != nil {
		return false, fault.Errorf(fault.Unavailable, "finding out whether %s counts its reads: %w", d.Name, err)
	}
	return reads() != before && !counted(folder), nil
}

// readBlock reads the first 4 KiB of a device, past the page cache.
func (h Host) readBlock(d BlockDevice) (int, error) {
	f, err := h.openDevice(d, unix.O_DIRECT)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	aligned, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANONYMOUS|unix.MAP_PRIVATE)
	if err != nil {
		return 0, err
	}
	defer unix.Munmap(aligned)
	return f.ReadAt(aligned, 0)
}
