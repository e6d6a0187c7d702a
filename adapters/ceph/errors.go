package ceph

import (
	"errors"
	"fmt"
	"syscall"
	"time"

	"stillpoint.io/stillpoint/fault"
)

// failed gives an error of Ceph's libraries its kind and, where there is one, the remedy.
func failed(err error, took, timeout time.Duration, format string, args ...any) error {
	kind, remedy := classify(err, took, timeout)
	return fault.Errorf(kind, "%s: %w%s", fmt.Sprintf(format, args...), err, remedy)
}

// errnoOf is the errno of an error of Ceph's libraries, 0 if it has none.
func errnoOf(err error) syscall.Errno {
	var e interface{ ErrorCode() int }
	if !errors.As(err, &e) {
		return 0
	}
	n := e.ErrorCode()
	if n < 0 {
		n = -n
	}
	return syscall.Errno(n)
}

// classify decides an error's kind; one that has a kind keeps it. took is how long the call took, timeout the limit of
// one request: librbd turns some time-outs into other errors on the way (a snapshot's into EBADMSG), so an error that
// would mean damage, and came no sooner than a time-out could, is taken for one.
func classify(err error, took, timeout time.Duration) (fault.Kind, string) {
	if kind := fault.KindOf(err); kind != fault.Internal {
		return kind, ""
	}
	const away = "; Ceph did not answer in time: see `ceph -s`"
	switch errnoOf(err) {
	case syscall.ENOENT:
		return fault.NotFound, ""
	case syscall.EEXIST, syscall.EBUSY, syscall.EAGAIN, syscall.ETXTBSY, syscall.ENOTEMPTY:
		return fault.Busy, ""
	case syscall.EROFS:
		return fault.Busy, "; another client holds the image's exclusive lock, or it is not the primary of a mirror"
	case syscall.ETIMEDOUT:
		return fault.Unavailable, away
	case syscall.ENOSPC:
		return fault.Exhausted, "; the pool or the cluster is full"
	case syscall.EDQUOT:
		return fault.Exhausted, "; the pool's quota or the image's limit of snapshots is used up"
	case syscall.EPERM, syscall.EACCES:
		return fault.Unsupported, "; the cephx user may not do this: it needs mon 'profile rbd' and osd 'profile rbd' for the pool"
	case syscall.EOPNOTSUPP, syscall.ENOSYS:
		return fault.Unsupported, ""
	case syscall.EINVAL, syscall.ENAMETOOLONG, syscall.ERANGE, syscall.E2BIG, syscall.EDOM:
		return fault.Invalid, ""
	case syscall.EIO, syscall.EBADMSG, syscall.EILSEQ, syscall.EUCLEAN:
		if took >= timeout-timeout/8 {
			return fault.Unavailable, away
		}
		return fault.Corrupt, "; see `ceph health detail`"
	case syscall.ESHUTDOWN:
		return fault.Unavailable, "; this client was shut out, because another one took an image's lock over from it"
	case syscall.ENOTCONN, syscall.ECONNREFUSED, syscall.ECONNRESET, syscall.ECONNABORTED, syscall.ENETUNREACH, syscall.EHOSTUNREACH,
		syscall.EINTR, syscall.ENOMEM, syscall.EMFILE, syscall.ENODEV, syscall.ENXIO, syscall.ESTALE, syscall.ECANCELED:
		return fault.Unavailable, ""
	}
	return fault.Internal, ""
}

// isAbsent reports whether an error says that something is not there.
func isAbsent(err error) bool { return errnoOf(err) == syscall.ENOENT }

// isForbidden reports whether an error says that the cephx user may not do that.
func isForbidden(err error) bool {
	e := errnoOf(err)
	return e == syscall.EPERM || e == syscall.EACCES
}
