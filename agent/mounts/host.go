package mounts

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/fault"
)

// Host is where a Table is read from. The zero Host is what this process itself sees. In a container, Root is where
// the host's "/" is mounted (with its /proc, /sys and /dev below, and receiving the host's mounts): paths in the Table
// are then the host's, and Path makes them openable.
type Host struct{ Root string }

// Path is where this process finds a path of the host.
func (h Host) Path(p string) string { return filepath.Join("/", h.Root, p) }

// Read takes the snapshot. It returns by ctx's deadline. Errors are Unavailable when the mounts would not hold still or
// a loop device does not answer, Internal when the kernel's files cannot be read.
//
// Every attached loop device is opened for a moment, for reading: one that is to detach with its last user does so
// only after that.
func (h Host) Read(ctx context.Context) (Table, error) {
	// The kernel hands out mountinfo in pieces, and sysfs is read after it: only what is the same before and after
	// belongs together.
	const tries = 50
	before, err := h.mountinfo()
	for range tries {
		if err != nil {
			return Table{}, err
		}
		t, err := h.gather(ctx, before)
		if err != nil {
			return Table{}, err
		}
		after, err := h.mountinfo()
		if err != nil || bytes.Equal(before, after) {
			return t, err
		}
		before = after
		select {
		case <-ctx.Done():
			return Table{}, fault.Errorf(fault.Unavailable, "reading the mounts: %w", ctx.Err())
		case <-time.After(time.Millisecond):
		}
	}
	return Table{}, fault.Errorf(fault.Unavailable, "reading the mounts: filesystems were mounted or unmounted during each of %d readings; try again", tries)
}

func (h Host) mountinfo() ([]byte, error) {
	path := "/proc/self/mountinfo"
	if h.Root != "" {
		path = h.Path("/proc/1/mountinfo")
	}
	return os.ReadFile(path)
}

// gather makes a table of mountinfo and of what sysfs shows now.
func (h Host) gather(ctx context.Context, info []byte) (Table, error) {
	if err := ctx.Err(); err != nil {
		return Table{}, fault.Errorf(fault.Unavailable, "reading the mounts: %w", err)
	}
	filesystems, options, err := parse(info)
	if err != nil {
		return Table{}, err
	}
	devices, names, err := h.blockDevices()
	if err != nil {
		return Table{}, err
	}
	r := reader{Host: h, names: names, table: New(filesystems, devices)} // tells which paths may be touched
	for i := range filesystems {
		r.complete(&filesystems[i], options[i])
	}
	r.table = New(filesystems, devices) // knows the subvolumes of btrfs too
	for i := range devices {
		if err := r.identify(ctx, &devices[i]); err != nil {
			return Table{}, err
		}
		// A loop device's file may show the number of a subvolume that is not mounted by itself.
		if b := devices[i].Backing; b != nil {
			if f := r.table.byID[b.Filesystem]; b.Filesystem != 0 && filesystems[f].Type == "btrfs" {
				filesystems[f].addStat(b.Device)
			}
		}
	}
	return New(filesystems, devices), nil
}

// parse groups the lines of mountinfo by superblock. Options are those of each filesystem, still escaped.
func parse(info []byte) (filesystems []Filesystem, options []string, err error) {
	lines, err := mountinfo.GetMountsFromReader(bytes.NewReader(info), nil)
	if err != nil {
		return nil, nil, fault.Errorf(fault.Internal, "mountinfo: %w", err)
	}
	at := map[Device]int{}
	for _, l := range lines {
		id := MakeDevice(uint32(l.Major), uint32(l.Minor))
		i, ok := at[id]
		if !ok {
			i = len(filesystems)
			at[id] = i
			filesystems = append(filesystems, Filesystem{
				ID: id, Type: l.FSType, Source: l.Source,
				ReadOnly: slices.Contains(strings.Split(l.VFSOptions, ","), "ro"),
			})
			options = append(options, l.VFSOptions)
		}
		f := &filesystems[i]
		f.Mounts = append(f.Mounts, Mount{
			ID: l.ID, Parent: l.Parent, Filesystem: id, Root: l.Root, Point: l.Mountpoint,
			ReadOnly: slices.Contains(strings.Split(l.Options, ","), "ro"),
		})
	}
	return filesystems, options, nil
}

// reader finds out what mountinfo does not say, with a first table at hand that says what may be touched.
type reader struct {
	Host
	names map[string]Device // block devices by name, device-mapper's also as mapper/NAME
	table Table
}

// look is stat(2) that asks no server: what the kernel does not know by itself is not found out. It refuses paths that
// are not touchable; a link is not followed.
func (r reader) look(path string) (st unix.Statx_t, err error) {
	if !r.table.touchable(path) {
		return st, unix.EREMOTE
	}
	const flags = unix.AT_SYMLINK_NOFOLLOW | unix.AT_NO_AUTOMOUNT | unix.AT_STATX_DONT_SYNC
	err = unix.Statx(unix.AT_FDCWD, r.Path(path), flags, unix.STATX_BASIC_STATS, &st)
	return st, err
}

// Resolve follows the symbolic links of an absolute path of the host, of which the last parts need not exist, and stops
// at the first remote filesystem: what lies there is taken literally. Invalid for a relative path and for links in a
// circle.
func (h Host) Resolve(t Table, path string) (string, error) {
	if !filepath.IsAbs(path) {
		return "", fault.Errorf(fault.Invalid, "%q: not an absolute path", path)
	}
	const maxLinks = 40 // as in the kernel
	done, rest := "/", strings.Split(path, "/")
	for links := 0; len(rest) > 0; {
		part := rest[0]
		rest = rest[1:]
		if part == ".." {
			done = filepath.Dir(done)
			continue
		}
		next := filepath.Join(done, part)
		if !t.touchable(next) {
			return filepath.Join(append([]string{next}, rest...)...), nil
		}
		target, err := os.Readlink(h.Path(next))
		switch {
		case errors.Is(err, unix.EINVAL): // not a link
			done = next
		case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR):
			return filepath.Join(append([]string{next}, rest...)...), nil
		case err != nil:
			return "", fault.Errorf(fault.Internal, "following %s: %w", path, err)
		default:
			if links++; links > maxLinks {
				return "", fault.Errorf(fault.Invalid, "%s: more than %d symbolic links", path, maxLinks)
			}
			if filepath.IsAbs(target) {
				done = "/"
			}
			rest = append(strings.Split(target, "/"), rest...)
		}
	}
	return done, nil
}
