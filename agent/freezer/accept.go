package freezer

import (
	"fmt"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// local are the types that a path to a mount point may lead through, once it has left the root. Everything else (NFS,
// CIFS, FUSE, autofs, 9p, …) can hang for ever in a look-up, and is told from mountinfo alone, before the path is
// touched.
var local = []string{"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "tmpfs", "ramfs", "rootfs", "devtmpfs", "overlay", "squashfs", "erofs"}

// system are places without which the machine or our own container does not live. The filesystem that holds one of
// them is never frozen. In a container, the three files below /etc and the termination log are mounted from where the
// kubelet and the container runtime keep theirs, which is most often the host's root.
var system = []string{
	"/", "/usr", "/etc", "/run", "/tmp", "/var", "/var/lib", "/var/log", "/var/tmp",
	"/var/lib/kubelet", "/var/lib/containerd", "/var/lib/containers", "/var/lib/docker", "/var/lib/rancher",
	"/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/dev/termination-log",
}

// surroundings are what a request is judged by.
type surroundings struct {
	mounts    []mount
	protected map[Device]string // superblocks that are never frozen, and why
	storedOn  func(Filesystem, mount) []Device
}

// limits judges a request by its figures.
func limits(r Request) error {
	switch {
	case len(r.Filesystems) == 0:
		return errorf(Invalid, "", "nothing to freeze")
	case len(r.Filesystems) > MaxFilesystems:
		return errorf(Invalid, "", "%d filesystems are too many: at most %d", len(r.Filesystems), MaxFilesystems)
	case r.MaxFreeze <= 0 || r.MaxFreeze > MaxFreeze:
		return errorf(Invalid, "", "a deadline of %v: must be more than 0 and at most %v", r.MaxFreeze, MaxFreeze)
	case r.First < 0 || r.First > len(r.Filesystems):
		return errorf(Invalid, "", "the first %d of %d filesystems: there are not so many", r.First, len(r.Filesystems))
	case r.Heartbeat < MinHeartbeat || r.Heartbeat > MaxFreeze:
		return errorf(Invalid, "", "a heartbeat of %v: must be from %v to %v", r.Heartbeat, MinHeartbeat, MaxFreeze)
	}
	return nil
}

// accept judges what a request names, without touching any of its paths. It returns what each is stored on.
func accept(r Request, s surroundings) (below [][]Device, err error) {
	for i, f := range r.Filesystems {
		m, err := acceptOne(f, s)
		if err != nil {
			return nil, err
		}
		for _, earlier := range r.Filesystems[:i] {
			if earlier.Device == f.Device {
				return nil, errorf(Invalid, f.Mount, "the same superblock (%v) as %s: name it once", f.Device, earlier.Mount)
			}
		}
		below = append(below, s.storedOn(f, m))
		for _, d := range below[i] {
			for _, earlier := range r.Filesystems[:i] {
				if earlier.Device == d {
					return nil, errorf(Invalid, f.Mount, "is stored on %s, which would be frozen before it: that would hang; put %s first", earlier.Mount, f.Mount)
				}
			}
		}
	}
	return below, nil
}

// wave returns where the run of filesystems ends, from the given one up to limit, that can be frozen at once: none of
// them is stored on another.
func wave(filesystems []Filesystem, below [][]Device, from, limit int) int {
	for n := from + 1; n < limit; n++ {
		for i := from; i < n; i++ {
			if slices.Contains(below[i], filesystems[n].Device) {
				return n
			}
		}
	}
	return limit
}

func acceptOne(f Filesystem, s surroundings) (mount, error) {
	if !filepath.IsAbs(f.Mount) || filepath.Clean(f.Mount) != f.Mount || len(f.Mount) >= len(entry{}.Mount) {
		return mount{}, errorf(Invalid, f.Mount, "not a clean absolute path of at most %d bytes", len(entry{}.Mount)-1)
	}
	passed := route(s.mounts, f.Mount)
	if m, ok := mayHang(passed[:max(0, len(passed)-1)]); ok {
		return mount{}, errorf(Refused, f.Mount, "the way to it leads through %s (%s), which may hang: give another mount point of it", m.Point, m.Type)
	}
	if len(passed) == 0 || passed[len(passed)-1].Point != f.Mount {
		return mount{}, errorf(Invalid, f.Mount, "nothing is mounted there")
	}
	m := passed[len(passed)-1]
	switch {
	case m.Type == "overlay":
		return mount{}, errorf(Refused, f.Mount, "overlayfs cannot be frozen: freeze the filesystem of its upperdir")
	case !slices.Contains(Types, m.Type):
		return mount{}, errorf(Refused, f.Mount, "%s is not among the types that are frozen (%v)", m.Type, Types)
	case m.Device != f.Device || m.Type != f.Type:
		return mount{}, errorf(Invalid, f.Mount, "is %s %v, not %s %v: the mounts have changed, look again", m.Type, m.Device, f.Type, f.Device)
	}
	if why, ok := s.protected[m.Device]; ok {
		return mount{}, errorf(Refused, f.Mount, "holds %s, and is never frozen", why)
	}
	return m, nil
}

// mayHang finds the mount on a way in which a look-up may never end. The first one, the root, is not asked: every
// process stands on it, ours too, so where a diskless machine's server is gone nothing runs that could be kept from
// hanging.
func mayHang(passed []mount) (mount, bool) {
	for i, m := range passed {
		if i > 0 && !slices.Contains(local, m.Type) {
			return m, true
		}
	}
	return mount{}, false
}

// protect finds the superblocks that must never be frozen: those that hold one of the paths, or pid 1's root, those
// of descriptors that we have open (a log), and those on which one of these is stored.
func protect(mounts []mount, paths []string, own map[Device]string) map[Device]string {
	out := map[Device]string{}
	add := func(m mount, why string) {
		if _, ok := out[m.Device]; ok {
			return
		}
		out[m.Device] = why
		for _, d := range storedOn(mounts, m.Device, m.Source) {
			if _, ok := out[d]; !ok {
				out[d] = why + " (by way of a loop device)"
			}
		}
	}
	for _, p := range append(slices.Clone(system), paths...) {
		if passed := route(mounts, p); len(passed) > 0 {
			add(passed[len(passed)-1], p)
		}
	}
	host, _ := readMounts("/proc/1/mountinfo")
	if passed := route(host, "/"); len(passed) > 0 {
		add(passed[len(passed)-1], "the root of process 1")
	}
	for _, m := range mounts {
		if why, ok := own[m.Device]; ok {
			add(m, why)
		}
	}
	return out
}

// ownState finds the superblocks of our open files and of the folders that we or our users depend on.
func ownState(paths []string) (map[Device]string, error) {
	mounts, err := readMounts("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	out := map[Device]string{}
	for fd := range 1024 {
		if m, ok := mountOf(mounts, fd); ok {
			out[m.Device] = fmt.Sprintf("what the freezer has open as descriptor %d", fd)
		}
	}
	for _, p := range paths {
		if !filepath.IsAbs(p) {
			return nil, fmt.Errorf("%s: give an absolute path", p)
		}
		fd := -1
		for at := p; fd < 0; at = filepath.Dir(at) { // one that is not there yet will be made below its parent
			if fd, err = unix.Open(at, unix.O_PATH|unix.O_CLOEXEC, 0); err != nil && at == "/" {
				return nil, fmt.Errorf("%s: %w", p, err)
			}
		}
		if m, ok := mountOf(mounts, fd); ok {
			out[m.Device] = p
		}
		unix.Close(fd)
	}
	return out, nil
}

// openVerified opens a filesystem's mount point for FIFREEZE: last thing before the freeze, and looking twice. The
// first descriptor (O_PATH) reaches no code of the filesystem; only when mountinfo confirms what it came through is
// the directory opened.
func openVerified(f Filesystem) (int, error) {
	at, err := unix.Openat2(unix.AT_FDCWD, f.Mount, &unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS,
	})
	if err != nil {
		return -1, errorf(Invalid, f.Mount, "opening it: %v", err)
	}
	defer unix.Close(at)
	mounts, err := readMounts("/proc/self/mountinfo")
	if err != nil {
		return -1, err
	}
	m, ok := mountOf(mounts, at)
	if !ok || m.Device != f.Device || m.Type != f.Type || m.Point != f.Mount {
		return -1, errorf(Invalid, f.Mount, "another filesystem was mounted there just now: look again")
	}
	fd, err := unix.Openat(at, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC|unix.O_NOATIME, 0)
	if err == unix.EPERM { // not the owner, and no CAP_FOWNER
		fd, err = unix.Openat(at, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	}
	if err != nil {
		return -1, errorf(Refused, f.Mount, "opening it: %v (a directory of another user needs CAP_DAC_READ_SEARCH)", err)
	}
	return fd, nil
}

// freezeError explains a FIFREEZE that failed.
func freezeError(f Filesystem, err error) *Error {
	switch err {
	case unix.EBUSY:
		return errorf(Busy, f.Mount, "is frozen by somebody else")
	case unix.EOPNOTSUPP, unix.ENOTTY:
		return errorf(Refused, f.Mount, "this kernel cannot freeze %s", f.Type)
	case unix.EPERM:
		return errorf(Refused, f.Mount, "freezing it needs CAP_SYS_ADMIN in the user namespace that mounted it")
	}
	return errorf(Unavailable, f.Mount, "freezing it: %v", err)
}

// restLeft is how long a superblock must still rest that was frozen for a time and thawed at another.
func restLeft(frozen time.Duration, thawedAt, now int64) time.Duration {
	return max(0, time.Duration(thawedAt)+RestFactor*frozen-time.Duration(now))
}
