package lvmthin

import (
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/fault"
)

var errNoPermission = fault.Errorf(fault.Unsupported, "LVM and device-mapper need root with CAP_SYS_ADMIN, and access to /dev/mapper/control")

// inactive gives the absence of a pool's device its words.
func inactive(err error, pool poolRef) error {
	if errors.Is(err, unix.ENXIO) {
		return fault.Errorf(fault.Unavailable, "thin pool %s is not active: lvchange -ay %s", pool.name, pool.name)
	}
	return fmt.Errorf("thin pool %s: %w", pool.name, err)
}

// failed gives an error of a system call its kind and, where there is one, the remedy.
func failed(err error, format string, args ...any) error {
	kind, remedy := classify(err)
	return fault.Errorf(kind, "%s: %w%s", fmt.Sprintf(format, args...), err, remedy)
}

// classify decides an error's kind. An error that has a kind keeps it.
func classify(err error) (fault.Kind, string) {
	if kind := fault.KindOf(err); kind != fault.Internal {
		return kind, ""
	}
	var errno unix.Errno
	if !errors.As(err, &errno) {
		return fault.Internal, ""
	}
	switch errno {
	case unix.ENOSPC:
		return fault.Exhausted, "; the pool is full: extend it with lvextend"
	case unix.EPERM, unix.EACCES:
		return fault.Unsupported, "; this needs root with CAP_SYS_ADMIN"
	case unix.EROFS:
		return fault.Unsupported, ""
	case unix.EBUSY, unix.EAGAIN:
		return fault.Busy, ""
	case unix.ENOENT, unix.ENXIO, unix.ENODEV, unix.EMFILE, unix.ENFILE, unix.ENOMEM, unix.EINTR:
		return fault.Unavailable, ""
	case unix.EIO, unix.EILSEQ, unix.EUCLEAN:
		return fault.Unavailable, "; see the kernel's log and `lvs -a`: a pool that is full or failed answers so"
	case unix.EOPNOTSUPP, unix.ENOTTY, unix.ENOSYS:
		return fault.Unsupported, ""
	case unix.EINVAL:
		return fault.Invalid, ""
	}
	return fault.Internal, ""
}

// complaint decides what kind of failure LVM's words are. They are not translated (LC_ALL=C); an unknown one is
// Internal.
func complaint(words string) fault.Kind {
	for _, c := range []struct {
		kind fault.Kind
		says []string
	}{
		{fault.Busy, []string{"suspend ioctl on", "Device or resource busy", "is used by another device", "in use", "contains a filesystem in use", "still in use", "lock failed", "already exists", lockFailed, flockFailed}},
		{fault.Exhausted, []string{"reached threshold", "is above threshold", "too low", "insufficient free space", "Insufficient free space", "No space left", "Failed to write VG", "metadata on", "too large for circular buffer"}},
		{fault.Invalid, []string{"are reserved", "is too long", "Full LV name", "Invalid argument for"}},
		{fault.NotFound, []string{"Failed to find logical volume", "not found in volume group", "Snapshot origin LV"}},
		{fault.Unavailable, []string{"Couldn't find device", "is missing", "exported", "Cannot process volume group", "Volume group \""}},
		{fault.Unsupported, []string{"Permission denied", "not detected in your kernel", "WARNING: Running as a non-root user", "read-only", "Run `lv", "Please specify either size or extents"}},
	} {
		for _, s := range c.says {
			if strings.Contains(words, s) {
				return c.kind
			}
		}
	}
	return fault.Internal
}

// lockFailed is what LVM says when it may not wait for a group's lock.
const lockFailed = "Can't get lock for"

// flockFailed ends the line in which it says which file it may not wait for.
const flockFailed = ": flock failed: Resource temporarily unavailable"

// gist is the part of LVM's words that says what went wrong, in one line.
func gist(words string) string {
	var lines []string
	for line := range strings.Lines(words) {
		line = strings.TrimSpace(line)
		if line == "" || strings.Contains(line, "This metadata update is NOT backed up") || strings.HasPrefix(line, "Run `lv") ||
			strings.HasPrefix(line, "File descriptor ") {
			continue
		}
		lines = append(lines, strings.TrimSuffix(line, "."))
	}
	return strings.Join(lines, "; ")
}
