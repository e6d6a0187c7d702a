package mounts

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/fault"
)

// blockDevices reads /sys/dev/block (kernel: Documentation/ABI/stable/sysfs-block). One that goes away meanwhile is left
// out. Of a loop device only the path is known yet.
func (h Host) blockDevices() (devices []BlockDevice, names map[string]Device, err error) {
	all := h.Path("/sys/dev/block")
	entries, err := os.ReadDir(all)
	if err != nil {
		return nil, nil, fault.Errorf(fault.Internal, "reading the block devices: %w", err)
	}
	names = map[string]Device{}
	below := make([][]string, 0, len(entries)) // names
	for _, e := range entries {
		id, ok := parseDevice(e.Name())
		folder := filepath.Join(all, e.Name())
		target, err := os.Readlink(folder)
		size, sizeErr := readLine(folder + "/size")
		if !ok || err != nil || sizeErr != nil {
			continue
		}
		sectors, _ := strconv.ParseInt(size, 10, 64)
		ro, _ := readLine(folder + "/ro")
		d := BlockDevice{ID: id, Name: filepath.Base(target), Size: sectors * 512, ReadOnly: ro == "1", Counted: counted(folder)}
		var parents []string
		if _, err := os.Lstat(folder + "/partition"); err == nil {
			d.Partition = true
			parents = []string{filepath.Base(filepath.Dir(target))}
		} else {
			slaves, _ := os.ReadDir(folder + "/slaves")
			for _, s := range slaves {
				parents = append(parents, s.Name())
			}
		}
		if path, err := os.ReadFile(folder + "/loop/backing_file"); err == nil {
			d.Backing = &Backing{Path: strings.TrimSuffix(string(path), "\n")}
		}
		names[d.Name] = id
		if name, err := readLine(folder + "/dm/name"); err == nil {
			names["mapper/"+name] = id
		}
		devices = append(devices, d)
		below = append(below, parents)
	}
	for i, parents := range below {
		for _, name := range parents {
			if id, ok := names[name]; ok {
				devices[i].Below = append(devices[i].Below, id)
			}
		}
	}
	return devices, names, nil
}

// identify finds the filesystem of the file behind a loop device. It asks the device itself, because a path may be one
// of another mount namespace, of a file that was deleted and made anew, or covered by now. The device in turn asks the
// file's filesystem, so it is not asked if that is remote by its path.
func (r reader) identify(ctx context.Context, d *BlockDevice) error {
	if d.Backing == nil {
		return nil
	}
	b := *d.Backing
	d.Backing = &b // not the one that r.table shares
	if at, ok := r.table.At(b.Path); ok && r.table.isRemote(at) {
		b.Filesystem = at.Filesystem
		return nil
	}
	status, err := answer(ctx, d.Name, func() (*unix.LoopInfo64, error) { return r.loopStatus(*d) })
	switch {
	case errors.Is(err, unix.ENXIO): // detached meanwhile
		d.Backing = nil
		return nil
	case fault.KindOf(err) == fault.Unavailable:
		return err
	case err != nil:
		b.Unknown = "what it stands on could not be asked: " + err.Error()
		return nil
	case status.Rdevice != 0:
		d.Backing = nil
		d.Below = []Device{Device(status.Rdevice)}
		return nil
	}
	b.Device, b.Inode = Device(status.Device), status.Inode
	r.place(&b)
	return nil
}

// place finds the filesystem of a file of which the device and inode numbers are known. Its numbers are enough unless it
// lies in a subvolume of btrfs or on an overlay; then its path, if that still leads to it or at least to its folder.
func (r reader) place(b *Backing) {
	matches := func(path string, inode bool) bool {
		st, err := r.look(path)
		return err == nil && MakeDevice(st.Dev_major, st.Dev_minor) == b.Device && (!inode || st.Ino == b.Inode)
	}
	path, deleted := strings.CutSuffix(b.Path, " (deleted)")
	if deleted && !matches(b.Path, true) { // it might be a part of the name
		b.Path, b.Deleted = path, true
	}
	if f, ok := r.table.Filesystem(b.Device); ok {
		b.Filesystem = f.ID
		return
	}
	if !b.Deleted && matches(b.Path, true) || b.Deleted && matches(filepath.Dir(b.Path), false) {
		at, _ := r.table.At(filepath.Dir(b.Path))
		if !b.Deleted {
			at, _ = r.table.At(b.Path)
		}
		b.Filesystem = at.Filesystem
		return
	}
	b.Unknown = "its file " + b.Path + " lies on no filesystem that is to be seen from here (device " + b.Device.String() + ")"
}

// loopStatus asks a loop device for its file. Errors are the kernel's.
func (h Host) loopStatus(d BlockDevice) (*unix.LoopInfo64, error) {
	f, err := h.openDevice(d, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return unix.IoctlLoopGetStatus64(int(f.Fd()))
}

// openDevice opens a block device's node for reading and checks that it is the one.
func (h Host) openDevice(d BlockDevice, flags int) (*os.File, error) {
	path := h.Path("/dev/" + strings.ReplaceAll(d.Name, "!", "/"))
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW|unix.O_CLOEXEC|flags, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	f := os.NewFile(uintptr(fd), path)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFBLK || Device(st.Rdev) != d.ID {
		f.Close()
		return nil, fault.Errorf(fault.Internal, "%s is not the block device %s", path, d.ID)
	}
	return f, nil
}

// answer runs a call into the kernel that nothing can interrupt, and waits for it until ctx ends: then the error is
// Unavailable and the call is left to itself, which happens only with a device whose storage is gone.
func answer[T any](ctx context.Context, name string, call func() (T, error)) (T, error) {
	type result struct {
		value T
		err   error
	}
	done := make(chan result, 1)
	go func() {
		value, err := call()
		done <- result{value, err}
	}()
	select {
	case r := <-done:
		return r.value, r.err
	case <-ctx.Done():
		var none T
		return none, fault.Errorf(fault.Unavailable, "%s: no answer from the device: %w", name, ctx.Err())
	}
}

// counted reports whether the kernel counts a device's I/O: a setting of the disk that its partitions share.
func counted(folder string) bool {
	on, err := readLine(folder + "/queue/iostats")
	if errors.Is(err, os.ErrNotExist) {
		on, err = readLine(folder + "/../queue/iostats")
	}
	return err == nil && on != "0"
}

func parseDevice(s string) (Device, bool) {
	a, b, _ := strings.Cut(s, ":")
	major, err := strconv.ParseUint(a, 10, 32)
	minor, err2 := strconv.ParseUint(b, 10, 32)
	return MakeDevice(uint32(major), uint32(minor)), err == nil && err2 == nil
}

// readLine reads a file of one line.
func readLine(path string) (string, error) {
	b, err := os.ReadFile(path)
	return strings.TrimSpace(string(b)), err
}
