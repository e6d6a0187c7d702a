package reflink

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path"
	"slices"
	"strings"
	"unsafe"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/adapters/treefs"
	"stillpoint.io/stillpoint/fault"
)

// mount is a place where this node sees a part of a reflink filesystem: root is the folder inside the filesystem that
// is visible at point.
type mount struct {
	id          int
	device      adapters.Device // the superblock's, as mountinfo has it: on btrfs not what stat(2) says of the files
	fstype      string
	root, point string
	readOnly    bool
}

// pool is a reflink filesystem and the mounts that show it.
type pool struct {
	uuid    string
	device  adapters.Device
	reflink bool
	mounts  []mount
}

// place is a canonical id found on this node: the mounts that show the path, those that show more of the filesystem
// first.
type place struct {
	id    adapters.VolumeID
	pool  pool
	path  string // inside the filesystem, absolute
	shown []mount
}

// mounts lists the mounts of reflink filesystems that the backend is not kept from.
func (a *Adapter) mounts() ([]mount, error) {
	infos, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("xfs", "btrfs"))
	if err != nil {
		return nil, failed(err, "reading mountinfo")
	}
	var ms []mount
	for _, i := range infos {
		if a.pools == nil || slices.Contains(a.pools, i.Mountpoint) {
			ms = append(ms, mount{
				id: i.ID, device: adapters.Device(unix.Mkdev(uint32(i.Major), uint32(i.Minor))), fstype: i.FSType, root: i.Root, point: i.Mountpoint,
				readOnly: hasOption(i.Options, "ro") || hasOption(i.VFSOptions, "ro"),
			})
		}
	}
	return ms, nil
}

func hasOption(options, name string) bool { return slices.Contains(strings.Split(options, ","), name) }

// discover lists the pools of this node: one a superblock.
func (a *Adapter) discover() ([]pool, error) {
	ms, err := a.mounts()
	if err != nil {
		return nil, err
	}
	var pools []pool
	for _, m := range ms {
		i := slices.IndexFunc(pools, func(p pool) bool { return p.device == m.device })
		if i < 0 {
			dir, err := m.open()
			if errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM) {
				return nil, failed(errno(err), "looking at the mount %s", m.point)
			}
			if err != nil {
				continue // hidden under a later mount, or gone
			}
			p, err := identify(dir, m.fstype)
			dir.Close()
			if err != nil {
				continue // a filesystem that is shut down answers nothing: not reachable
			}
			p.device = m.device
			pools, i = append(pools, p), len(pools)
		}
		pools[i].mounts = append(pools[i].mounts, m)
	}
	return pools, nil
}

// open opens the root folder of a mount. It fails if something else is mounted on top of it.
func (m mount) open() (*os.File, error) {
	f, err := os.OpenFile(m.point, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOATIME|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	if id, err := mountID(f); err != nil || id != m.id {
		f.Close()
		return nil, errors.Join(err, fmt.Errorf("%s: %w: another mount lies on top of it", m.point, unix.EXDEV))
	}
	return f, nil
}

// mountID is the id that mountinfo has for the mount through which f was opened.
func mountID(f *os.File) (int, error) {
	var st unix.Statx_t
	if err := unix.Statx(int(f.Fd()), "", unix.AT_EMPTY_PATH, unix.STATX_MNT_ID, &st); err != nil {
		return 0, err
	}
	return int(st.Mnt_id), nil
}

// identify asks a filesystem who it is, through any open file of it.
func identify(f *os.File, fstype string) (pool, error) {
	switch fstype {
	case "xfs":
		// XFS_IOC_FSGEOMETRY_V1 and struct xfs_fsop_geom_v1: fs/xfs/libxfs/xfs_fs.h
		const request, uuidAt, flagsAt, reflinkFlag = 0x80705864, 64, 92, 1 << 20
		var g [112]byte
		if err := query(f, request, unsafe.Pointer(&g)); err != nil {
			return pool{}, err
		}
		return pool{uuid: formatUUID(g[uuidAt:]), reflink: binary.NativeEndian.Uint32(g[flagsAt:])&reflinkFlag != 0}, nil
	case "btrfs":
		// BTRFS_IOC_FS_INFO and struct btrfs_ioctl_fs_info_args: include/uapi/linux/btrfs.h
		const request, uuidAt = 0x8400941f, 16
		var g [1024]byte
		if err := query(f, request, unsafe.Pointer(&g)); err != nil {
			return pool{}, err
		}
		return pool{uuid: formatUUID(g[uuidAt:]), reflink: true}, nil
	}
	return pool{}, unix.EOPNOTSUPP
}

func query(f *os.File, request uintptr, answer unsafe.Pointer) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), request, uintptr(answer)); errno != 0 {
		return errno
	}
	return nil
}

func formatUUID(b []byte) string {
	s := hex.EncodeToString(b[:16])
	return s[:8] + "-" + s[8:12] + "-" + s[12:16] + "-" + s[16:20] + "-" + s[20:]
}

// locate finds the filesystem of an id, typed or canonical, and the mounts that show its path. A filesystem that is not
// mounted here is Unavailable; that there is no such file is not noticed.
func (a *Adapter) locate(ctx context.Context, id adapters.VolumeID) (place, error) {
	if err := ctx.Err(); err != nil {
		return place{}, err
	}
	if id.Backend != a.backend {
		return place{}, fault.Errorf(fault.Invalid, "volume %s: this is the backend %s", id, a.backend)
	}
	id, err := a.canonical(id)
	if err != nil {
		return place{}, err
	}
	uuid, inside, err := parseID(id)
	if err != nil {
		return place{}, err
	}
	pools, err := a.discover()
	if err != nil {
		return place{}, err
	}
	pools = slices.DeleteFunc(pools, func(p pool) bool { return p.uuid != uuid })
	switch {
	case len(pools) == 0:
		return place{}, fault.Errorf(fault.Unavailable, "volume %s: the filesystem %s is not mounted on this node%s", id, uuid, a.limits())
	case len(pools) > 1:
		return place{}, fault.Errorf(fault.Invalid, "volume %s: two mounted filesystems have the UUID %s (%s, %s); unmount the copy or give it another UUID", id, uuid, pools[0].mounts[0].point, pools[1].mounts[0].point)
	case !pools[0].reflink:
		return place{}, fault.Errorf(fault.Unsupported, "volume %s: the XFS at %s was made without reflink and cannot share blocks between files (mkfs.xfs -m reflink=1)", id, pools[0].mounts[0].point)
	}
	p := place{id: id, pool: pools[0], path: inside, shown: showing(pools[0].mounts, inside)}
	if len(p.shown) == 0 {
		return place{}, fault.Errorf(fault.Unavailable, "volume %s: the filesystem is mounted, but no mount shows %s%s", id, inside, a.limits())
	}
	return p, nil
}

func (a *Adapter) limits() string {
	if a.pools == nil {
		return ""
	}
	return " among the pools of this backend: " + strings.Join(a.pools, ", ")
}

// showing picks the mounts that show a path, the ones that show the most first; among equals the writable ones, then
// the oldest.
func showing(mounts []mount, inside string) []mount {
	var ms []mount
	for _, m := range mounts {
		if _, ok := under(inside, m.root); ok {
			ms = append(ms, m)
		}
	}
	slices.SortStableFunc(ms, func(x, y mount) int {
		if d := len(x.root) - len(y.root); d != 0 {
			return d
		}
		if x.readOnly != y.readOnly {
			if y.readOnly {
				return -1
			}
			return 1
		}
		return x.id - y.id
	})
	return ms
}

// under returns what follows dir in p, without a leading slash, if p lies in dir or is dir.
func under(p, dir string) (string, bool) {
	if dir == "/" {
		return strings.TrimPrefix(p, "/"), path.IsAbs(p)
	}
	rest, ok := strings.CutPrefix(p, dir)
	return strings.TrimPrefix(rest, "/"), ok && (rest == "" || rest[0] == '/')
}

// open opens a path inside the filesystem through the first mount that shows it, without following symbolic links
// anywhere on the way. It returns that mount too.
func (p place) open(inside string, flags int) (*os.File, mount, error) {
	err := error(unix.ENOENT)
	for _, m := range p.shown {
		below, ok := under(inside, m.root)
		if !ok {
			continue
		}
		var dir, f *os.File
		if dir, err = m.open(); err != nil {
			continue
		}
		f, err = treefs.OpenBeneath(dir, below, flags)
		dir.Close()
		if !errors.Is(err, unix.EXDEV) { // with EXDEV another mount covers a folder on the way
			return f, m, err
		}
	}
	return nil, mount{}, errno(err)
}

// openVolume opens the live file or subvolume for reading, and nothing else.
func (p place) openVolume() (*os.File, adapters.Form, mount, error) {
	// O_PATH first: opening a device or a pipe would have effects.
	f, m, err := p.open(p.path, unix.O_PATH)
	if err != nil {
		return nil, 0, m, err
	}
	defer f.Close()
	form, err := formOf(f)
	if err != nil {
		return nil, 0, m, err
	}
	r, err := reopen(f, os.O_RDONLY|unix.O_NOATIME)
	return r, form, m, err
}

// formOf tells a file from a subvolume, and refuses what is neither.
func formOf(f *os.File) (adapters.Form, error) {
	if is, err := isSubvolume(f); err != nil || is {
		return adapters.TreeForm, err
	}
	return adapters.BlockForm, regular(f)
}

// regular refuses what is not a regular file with a name.
func regular(f *os.File) error {
	st, err := stat(f)
	switch {
	case err != nil:
		return err
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		return fault.Errorf(fault.Invalid, "neither a regular file nor a subvolume of btrfs")
	case st.Nlink == 0:
		return fault.Errorf(fault.NotFound, "the file was deleted")
	}
	return nil
}

func stat(f *os.File) (unix.Stat_t, error) {
	var st unix.Stat_t
	err := unix.Fstat(int(f.Fd()), &st)
	return st, err
}

// sameFile reports whether two descriptors are of one file.
func sameFile(f, g *os.File) bool {
	x, err1 := stat(f)
	y, err2 := stat(g)
	return err1 == nil && err2 == nil && x.Dev == y.Dev && x.Ino == y.Ino
}

func procPath(f *os.File) string { return fmt.Sprintf("/proc/self/fd/%d", f.Fd()) }

// errno reduces an error of package os to its cause: the paths in it may be descriptors, which tell people nothing.
func errno(err error) error {
	var e unix.Errno
	if errors.As(err, &e) && fault.KindOf(err) == fault.Internal {
		return e
	}
	return err
}
