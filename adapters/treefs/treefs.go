// Package treefs reads and makes trees of files on filesystems of this machine, through the descriptor of a directory and
// never out of it: no symbolic link is followed, no dot-dot and no other mount is passed on the way to anything (openat2
// with RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS, RESOLVE_NO_XDEV). It is what adapters for file backends are made of, and what
// restores into a plain directory.
//
// A Reader is most of an adapters.Tree, a Target most of an adapters.TreeTarget. Inode flags (chattr) are neither read nor
// set. It needs root, or Linux's capabilities for what is read or set, and /proc.
package treefs

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

// pathMax is how much of a path is opened in one step, in bytes: the kernel takes no more than 4095 at once (PATH_MAX).
const pathMax = 3000

// OpenBeneath opens a path below a directory: no symbolic link, no dot-dot and no other mount on the way, and the last
// element is no link either. An empty path opens the directory itself anew. The path may be of any length.
func OpenBeneath(dir *os.File, path string, flags int) (*os.File, error) {
	at := dir
	for len(path) > pathMax {
		cut := strings.LastIndexByte(path[:pathMax], '/')
		if cut <= 0 {
			break // an element longer than any filesystem has
		}
		next, err := openBeneath(at, path[:cut], unix.O_PATH|unix.O_DIRECTORY)
		if at != dir {
			at.Close()
		}
		if err != nil {
			return nil, err
		}
		at, path = next, path[cut+1:]
	}
	f, err := openBeneath(at, path, flags)
	if at != dir {
		at.Close()
	}
	return f, err
}

func openBeneath(dir *os.File, path string, flags int) (*os.File, error) {
	if path == "" {
		path = "."
	}
	for {
		fd, err := unix.Openat2(int(dir.Fd()), path, &unix.OpenHow{
			Flags:   uint64(flags | unix.O_CLOEXEC),
			Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV,
		})
		switch err {
		case nil:
			return os.NewFile(uintptr(fd), filepath.Join(dir.Name(), path)), nil
		case unix.EINTR, unix.EAGAIN: // EAGAIN: something was renamed meanwhile
			continue
		}
		return nil, err
	}
}

// checkPath refuses a path that no tree has.
func checkPath(path string) error {
	if path == "" {
		return nil
	}
	for element := range strings.SplitSeq(path, "/") {
		if element == "" || element == "." || element == ".." || strings.IndexByte(element, 0) >= 0 {
			return fault.Errorf(fault.Invalid, "path %q: an element of a path is a name, not %q", path, element)
		}
	}
	return nil
}

// split takes a path apart: its directory and its last element.
func split(path string) (dir, name string) {
	i := strings.LastIndexByte(path, '/')
	return path[:max(i, 0)], path[i+1:]
}

func join(dir, name string) string {
	if dir == "" {
		return name
	}
	return dir + "/" + name
}

// procPath is a path that leads to the open file, or with a name to that in the open directory.
func procPath(f *os.File, name string) string {
	if name == "" {
		return fmt.Sprintf("/proc/self/fd/%d", f.Fd())
	}
	return fmt.Sprintf("/proc/self/fd/%d/%s", f.Fd(), name)
}

// types are the file types by the bits of st_mode.
var types = map[uint32]adapters.FileType{
	unix.S_IFREG: adapters.RegularFile, unix.S_IFDIR: adapters.Directory, unix.S_IFLNK: adapters.Symlink, unix.S_IFIFO: adapters.Fifo,
	unix.S_IFSOCK: adapters.Socket, unix.S_IFCHR: adapters.CharDevice, unix.S_IFBLK: adapters.BlockDevice,
}

// failed gives an error of a system call its kind and, where there is one, the remedy.
func failed(err error, format string, args ...any) error {
	if err == nil {
		return nil
	}
	kind, remedy := fault.KindOf(err), ""
	var errno unix.Errno
	if errors.As(err, &errno) && kind == fault.Internal {
		err = errno // a path in it may be a descriptor, which tells people nothing
		kind, remedy = classify(errno)
	}
	return fault.Errorf(kind, "%s: %w%s", fmt.Sprintf(format, args...), err, remedy)
}

func classify(errno unix.Errno) (fault.Kind, string) {
	switch errno {
	case unix.ENOENT, unix.ENOTDIR, unix.ELOOP:
		return fault.NotFound, ""
	case unix.EEXIST:
		return fault.Busy, ""
	case unix.ENOSPC:
		return fault.Exhausted, "; free space on the filesystem"
	case unix.EDQUOT:
		return fault.Exhausted, "; the quota is used up"
	case unix.EROFS:
		return fault.Unsupported, "; the filesystem is mounted read-only"
	case unix.EPERM, unix.EACCES:
		return fault.Unsupported, "; this needs root"
	case unix.EXDEV:
		return fault.Unsupported, "; another filesystem is mounted there"
	case unix.EOPNOTSUPP, unix.ENOSYS:
		return fault.Unsupported, "; the filesystem cannot keep this"
	case unix.EINVAL, unix.ENAMETOOLONG, unix.EISDIR, unix.EFBIG, unix.ERANGE:
		return fault.Invalid, ""
	case unix.EIO, unix.EUCLEAN, unix.EBADMSG:
		return fault.Corrupt, "; the filesystem or its disk is damaged: see the kernel's log"
	case unix.EMFILE, unix.ENFILE, unix.ENOMEM, unix.ENODEV, unix.ENXIO, unix.ESTALE, unix.ESHUTDOWN:
		return fault.Unavailable, ""
	}
	return fault.Internal, ""
}
