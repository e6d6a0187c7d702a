package lab

import (
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/adapters"
)

// Tree changes files below a directory, as their user does: an adaptertest.TreeVolume but for its ID.
type Tree struct{ Dir string }

func (x Tree) at(path string) string {
	if path == "" {
		return x.Dir
	}
	return filepath.Join(x.Dir, path)
}

func (x Tree) Mkdir(path string) error { return os.Mkdir(x.at(path), 0o700) }

func (x Tree) Write(path string, p []byte, off int64) error {
	f, err := os.OpenFile(x.at(path), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.WriteAt(p, off)
	return err
}

func (x Tree) Truncate(path string, size int64) error { return os.Truncate(x.at(path), size) }
func (x Tree) Symlink(path, target string) error      { return os.Symlink(target, x.at(path)) }
func (x Tree) Link(old, path string) error            { return os.Link(x.at(old), x.at(path)) }
func (x Tree) Rename(old, path string) error          { return os.Rename(x.at(old), x.at(path)) }
func (x Tree) Remove(path string) error               { return os.RemoveAll(x.at(path)) }

func (x Tree) Special(path string, t adapters.FileType, d adapters.Device) error {
	mode := map[adapters.FileType]uint32{adapters.Fifo: unix.S_IFIFO, adapters.Socket: unix.S_IFSOCK, adapters.CharDevice: unix.S_IFCHR, adapters.BlockDevice: unix.S_IFBLK}
	return unix.Mknod(x.at(path), mode[t]|0o600, int(d))
}

// Describe sets owner, mode, attributes and time; attributes of ours that the entry does not have are removed.
func (x Tree) Describe(path string, e adapters.Entry) error {
	at := x.at(path)
	if err := unix.Lchown(at, int(e.UID), int(e.GID)); err != nil {
		return err
	}
	if e.Type != adapters.Symlink {
		if err := unix.Chmod(at, e.Mode); err != nil {
			return err
		}
	}
	list := make([]byte, 64<<10)
	n, err := unix.Llistxattr(at, list)
	if err != nil {
		return err
	}
	for name := range strings.SplitSeq(string(list[:n]), "\x00") {
		if strings.HasPrefix(name, "user.") || strings.HasPrefix(name, "trusted.") {
			if err := unix.Lremovexattr(at, name); err != nil {
				return err
			}
		}
	}
	for _, a := range e.Attributes {
		if err := unix.Lsetxattr(at, a.Name, a.Value, 0); err != nil {
			return err
		}
	}
	return unix.UtimesNanoAt(unix.AT_FDCWD, at, []unix.Timespec{{Nsec: unix.UTIME_OMIT}, {Sec: e.Modified.Unix(), Nsec: int64(e.Modified.Nanosecond())}}, unix.AT_SYMLINK_NOFOLLOW)
}
