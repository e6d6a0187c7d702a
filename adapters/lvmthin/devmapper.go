package lvmthin

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

// mapper asks the kernel's device-mapper, by the ioctls of /dev/mapper/control (linux/dm-ioctl.h). It takes tens of
// microseconds where a program would take tens of milliseconds. It sends messages to pools, resumes devices, and makes and
// removes those of volumes that only we read or write (activate.go); all else is LVM's.
type mapper struct{}

// mapped is a device of device-mapper.
type mapped struct {
	name, uuid string
	device     adapters.Device // as stat(2) gives it
	suspended  bool
	live       bool // it has a table
	users      int  // open descriptors, mounts and devices above it
}

var errNoMapper = fault.Errorf(fault.Unsupported, "this kernel has no device-mapper, or this container not /dev/mapper/control; load dm-mod and dm-thin-pool, and give the container the host's /dev")

// present fails if there is no device-mapper. Without that check LVM's programs would make /dev/mapper/control, and
// fail.
func (mapper) present() error {
	f, err := os.OpenFile("/dev/mapper/control", os.O_RDWR|unix.O_CLOEXEC, 0)
	switch {
	case err == nil:
		return f.Close()
	case errors.Is(err, os.ErrPermission):
		return errNoPermission
	case !errors.Is(err, os.ErrNotExist):
		return errNoMapper
	}
	misc, err := os.ReadFile("/proc/misc") // the node may be missing only because no LVM program has made it yet
	if err != nil || !strings.Contains(string(misc), "device-mapper") {
		return errNoMapper
	}
	return nil
}

// find looks a device up by its UUID; nil if there is none.
func (m mapper) find(uuid string) (*mapped, error) {
	h, _, err := m.call(unix.DM_DEV_STATUS, uuid, 0, nil)
	if errors.Is(err, unix.ENXIO) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("device-mapper: looking for %s: %w", uuid, err)
	}
	return &mapped{
		name:      text(h.Name[:]),
		uuid:      text(h.Uuid[:]),
		device:    adapters.Device(h.Dev),
		suspended: h.Flags&unix.DM_SUSPEND_FLAG != 0,
		live:      h.Flags&unix.DM_ACTIVE_PRESENT_FLAG != 0,
		users:     int(h.Open_count),
	}, nil
}

// status is the line that the only target of a device tells of itself. It neither waits for I/O nor commits anything.
func (m mapper) status(uuid string) (string, error) { return m.target(uuid, unix.DM_NOFLUSH_FLAG) }

// fresh is status after the pool has committed: what a message has just changed is in it.
func (m mapper) fresh(uuid string) (string, error) { return m.target(uuid, 0) }

// table is the line that the only target of a device was made with.
func (m mapper) table(uuid string) (string, error) { return m.target(uuid, unix.DM_STATUS_TABLE_FLAG) }

func (m mapper) target(uuid string, flags uint32) (string, error) {
	h, data, err := m.call(unix.DM_TABLE_STATUS, uuid, flags, nil)
	if err != nil {
		return "", fmt.Errorf("device-mapper: status of %s: %w", uuid, err)
	}
	if h.Target_count != 1 || len(data) < unix.SizeofDmTargetSpec {
		return "", fault.Errorf(fault.Unavailable, "device-mapper: %s has %d targets, not one", uuid, h.Target_count)
	}
	return text(data[unix.SizeofDmTargetSpec:]), nil
}

// message sends a message to the target at the start of a device.
func (m mapper) message(uuid, message string) error {
	payload := make([]byte, 8, 8+len(message)+1) // struct dm_target_msg: the sector, and the words
	payload = append(append(payload, message...), 0)
	if _, _, err := m.call(unix.DM_TARGET_MSG, uuid, 0, payload); err != nil {
		return fmt.Errorf("device-mapper: message %q to %s: %w", message, uuid, err)
	}
	return nil
}

// resume lets the writes to a suspended device go on.
func (m mapper) resume(uuid string) error {
	if _, _, err := m.call(unix.DM_DEV_SUSPEND, uuid, 0, nil); err != nil {
		return fmt.Errorf("device-mapper: resuming %s: %w", uuid, err)
	}
	return nil
}

// call makes an ioctl on the device of a UUID.
func (m mapper) call(request uint, uuid string, flags uint32, payload []byte) (*unix.DmIoctl, []byte, error) {
	return m.do(mapperCall{request: request, uuid: uuid, flags: flags, payload: payload})
}

// mapperCall is an ioctl. The device is that of a UUID; only a new one has a name, too.
type mapperCall struct {
	request        uint
	name, uuid     string
	flags, targets uint32
	event          uint32 // for udev
	payload        []byte
}

// do makes an ioctl and returns the header and the data behind it.
func (mapper) do(c mapperCall) (*unix.DmIoctl, []byte, error) {
	control, err := os.OpenFile("/dev/mapper/control", os.O_RDWR|unix.O_CLOEXEC, 0)
	switch {
	case errors.Is(err, os.ErrPermission):
		return nil, nil, errNoPermission
	case err != nil:
		return nil, nil, errNoMapper
	}
	defer control.Close()
	words := make([]uint64, 16<<10/8) // aligned, and larger than any status of a thin pool
	size := len(words) * 8
	h := (*unix.DmIoctl)(unsafe.Pointer(unsafe.SliceData(words)))
	buffer := unsafe.Slice((*byte)(unsafe.Pointer(h)), size)
	h.Version = [3]uint32{unix.DM_VERSION_MAJOR, 0, 0}
	h.Data_size, h.Data_start = uint32(size), unix.SizeofDmIoctl
	h.Flags, h.Target_count, h.Event_nr = c.flags, c.targets, c.event
	if copy(h.Uuid[:len(h.Uuid)-1], c.uuid) < len(c.uuid) || copy(h.Name[:len(h.Name)-1], c.name) < len(c.name) {
		return nil, nil, unix.ENAMETOOLONG
	}
	copy(buffer[unix.SizeofDmIoctl:], c.payload)
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, control.Fd(), uintptr(c.request), uintptr(unsafe.Pointer(h)))
	runtime.KeepAlive(words)
	if errno != 0 {
		return nil, nil, errno
	}
	if h.Flags&unix.DM_BUFFER_FULL_FLAG != 0 {
		return nil, nil, unix.ENOSPC
	}
	start, end := min(int(h.Data_start), size), min(int(h.Data_size), size)
	return h, buffer[start:max(start, end)], nil
}

// text is what stands before the first NUL.
func text(b []byte) string {
	if i := bytes.IndexByte(b, 0); i >= 0 {
		b = b[:i]
	}
	return string(b)
}

// node is the path of a block device's node, by its number: the kernel's name in devtmpfs, which needs no udev.
func node(d adapters.Device) (string, error) {
	b, err := os.ReadFile(filepath.Join(sysfs(d), "uevent"))
	if err != nil {
		return "", fault.Errorf(fault.Unavailable, "block device %s is gone: %w", numbers(d), err)
	}
	for line := range strings.Lines(string(b)) {
		if name, ok := strings.CutPrefix(strings.TrimSpace(line), "DEVNAME="); ok {
			return "/dev/" + name, nil
		}
	}
	return "", fault.Errorf(fault.Unavailable, "block device %s has no name in sysfs", numbers(d))
}

// sizeOf is a block device's size in bytes.
func sizeOf(d adapters.Device) (int64, error) {
	b, err := os.ReadFile(filepath.Join(sysfs(d), "size"))
	if err != nil {
		return 0, fault.Errorf(fault.Unavailable, "block device %s is gone: %w", numbers(d), err)
	}
	sectors, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
	return sectors * 512, err
}

func sysfs(d adapters.Device) string { return "/sys/dev/block/" + numbers(d) }

func numbers(d adapters.Device) string {
	return fmt.Sprintf("%d:%d", unix.Major(uint64(d)), unix.Minor(uint64(d)))
}

// parseNumbers reads MAJOR:MINOR.
func parseNumbers(s string) (adapters.Device, bool) {
	var major, minor uint32
	if n, err := fmt.Sscanf(s, "%d:%d", &major, &minor); n != 2 || err != nil {
		return 0, false
	}
	return adapters.Device(unix.Mkdev(major, minor)), true
}

// openDevice opens a block device by its number, and only that one.
func openDevice(d adapters.Device, flags int) (*os.File, error) {
	path, err := node(d)
	if err != nil {
		return nil, err
	}
	f, err := os.OpenFile(path, flags|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil || adapters.Device(st.Rdev) != d || st.Mode&unix.S_IFMT != unix.S_IFBLK {
		f.Close()
		return nil, fault.Errorf(fault.Unavailable, "%s is not the block device %s: /dev is not this kernel's", path, numbers(d))
	}
	return f, nil
}
