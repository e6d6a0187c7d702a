package reflink

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/adapters/loopdev"
)

// loop is a loop device with a file attached: which file, and whether the device shows it whole and writable.
type loop struct {
	device           adapters.Device
	path             string // where the kernel says the file is, without the remark that it was deleted
	fileDev, fileIno uint64 // as stat(2) has them
	offset           int64
	readOnly         bool
	label            loopdev.Label
}

func (l loop) node() string {
	return fmt.Sprintf("/dev/loop%d", unix.Minor(uint64(l.device)))
}

// attached lists the loop devices in use. Which file one has is asked of the device itself: its path may be deleted, of
// another mount namespace, or be one of several. Only where the device has no node here is the path trusted.
func attached() ([]loop, error) {
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil || len(files) == 0 {
		return nil, err
	}
	mounts, err := mountinfo.GetMounts(nil)
	if err != nil {
		return nil, err
	}
	var loops []loop
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			continue // detached meanwhile
		}
		at := strings.TrimSuffix(strings.TrimSuffix(string(b), "\n"), " (deleted)")
		if remote(mounts, at) {
			continue // asking the device would ask the server
		}
		l, err := inspectLoop(filepath.Base(filepath.Dir(filepath.Dir(file))), at)
		switch {
		case err == nil:
			loops = append(loops, l)
		case errors.Is(err, unix.ENXIO), errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENODEV):
			// detached meanwhile
		default:
			return nil, err
		}
	}
	return loops, nil
}

func inspectLoop(name, at string) (loop, error) {
	l := loop{path: at}
	b, err := os.ReadFile("/sys/block/" + name + "/dev")
	if err != nil {
		return l, err
	}
	var major, minor uint32
	if _, err := fmt.Sscanf(string(b), "%d:%d", &major, &minor); err != nil {
		return l, err
	}
	l.device = adapters.Device(unix.Mkdev(major, minor))
	f, err := os.OpenFile("/dev/"+name, os.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) {
		var st unix.Stat_t
		if err := unix.Stat(at, &st); err != nil {
			return l, err
		}
		l.fileDev, l.fileIno = st.Dev, st.Ino
		return l, nil
	}
	if err != nil {
		return l, err
	}
	defer f.Close()
	if st, err := stat(f); err != nil || st.Rdev != uint64(l.device) {
		return l, errors.Join(err, fmt.Errorf("/dev/%s is not the device %d:%d", name, major, minor))
	}
	info, err := unix.IoctlLoopGetStatus64(int(f.Fd()))
	if err != nil {
		return l, err
	}
	l.fileDev, l.fileIno = info.Device, info.Inode
	l.offset, l.readOnly = int64(info.Offset), info.Flags&unix.LO_FLAGS_READ_ONLY != 0
	l.label = loopdev.LabelOf(info)
	return l, nil
}

// carrier picks the loop device that carries the live volume in a file, 0 if there is none: rather one that shows all
// of the file, rather one that writes to it, rather the first.
func carrier(loops []loop, dev, ino uint64) adapters.Device {
	mine := slices.DeleteFunc(slices.Clone(loops), func(l loop) bool { return l.fileDev != dev || l.fileIno != ino })
	if len(mine) == 0 {
		return 0
	}
	rank := func(l loop) int {
		r := 0
		if l.offset != 0 {
			r += 2
		}
		if l.readOnly {
			r++
		}
		return r
	}
	return slices.MinFunc(mine, func(x, y loop) int {
		if d := rank(x) - rank(y); d != 0 {
			return d
		}
		return int(unix.Minor(uint64(x.device))) - int(unix.Minor(uint64(y.device)))
	}).device
}

// remote reports whether a path lies on a filesystem whose server may not answer.
func remote(mounts []*mountinfo.Info, at string) bool {
	var best *mountinfo.Info
	for _, m := range mounts {
		if _, ok := under(at, m.Mountpoint); ok && (best == nil || len(m.Mountpoint) >= len(best.Mountpoint)) {
			best = m
		}
	}
	if best == nil {
		return false
	}
	switch kind, _, _ := strings.Cut(best.FSType, "."); kind {
	case "nfs", "nfs4", "cifs", "smb3", "ceph", "fuse", "9p", "afs", "lustre", "gfs2", "ocfs2", "beegfs", "glusterfs", "virtiofs":
		return true
	}
	return false
}
