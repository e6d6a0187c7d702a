package reflink

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/fault"
)

// failed gives an error of the system calls on a pool its kind and, where there is one, the remedy.
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
	case unix.ENOENT, unix.ENOTDIR:
		return fault.NotFound, ""
	case unix.ENOSPC:
		return fault.Exhausted, "; free space in the pool"
	case unix.EDQUOT:
		return fault.Exhausted, "; the quota of the file's owner or project is used up"
	case unix.EROFS:
		return fault.Unsupported, "; the pool is mounted read-only, or became so after an error: see the kernel's log"
	case unix.EPERM, unix.EACCES:
		return fault.Unsupported, "; this needs root with CAP_SYS_ADMIN and CAP_LINUX_IMMUTABLE, and no immutable or append-only flag (chattr -i -a) on what is written"
	case unix.EOPNOTSUPP, unix.EXDEV, unix.ETXTBSY, unix.ENOTTY, unix.ENOSYS:
		return fault.Unsupported, ""
	case unix.ELOOP, unix.ENAMETOOLONG, unix.EISDIR, unix.EINVAL:
		return fault.Invalid, ""
	case unix.EIO, unix.EUCLEAN, unix.EBADMSG:
		return fault.Corrupt, "; the pool or its disk is damaged: see the kernel's log"
	case unix.EBUSY, unix.EAGAIN:
		return fault.Busy, ""
	case unix.EMFILE, unix.ENFILE, unix.ENOMEM, unix.EINTR, unix.ENODEV, unix.ENXIO, unix.ESTALE, unix.ESHUTDOWN:
		return fault.Unavailable, ""
	}
	return fault.Internal, ""
}
