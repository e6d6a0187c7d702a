package ceph

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/adapters"
)

// sysRBD is where the kernel tells which images it has mapped: Documentation/ABI/testing/sysfs-bus-rbd.
const sysRBD = "/sys/bus/rbd/devices"

// sysBlock is where it tells of every block device: Documentation/ABI/stable/sysfs-block.
const sysBlock = "/sys/block"

// mapping is an image that is a block device of this node.
type mapping struct {
	fsid   string // of its cluster; empty: it is the backend's own, by the backend's settings
	name   imageName
	live   bool // the image itself, not a snapshot of it
	device adapters.Device
	path   string
}

// shows reports whether the device is the live image of that cluster.
func (m mapping) shows(fsid string, name imageName) bool {
	return m.live && m.name == name && (m.fsid == fsid || m.fsid == "")
}

// mappings reads the images that the kernel's rbd has mapped. One that is being unmapped is left out.
func mappings(folder string) ([]mapping, error) {
	entries, err := os.ReadDir(folder)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			err = nil // the module is not loaded
		}
		return nil, err
	}
	var all []mapping
	for _, e := range entries {
		m, err := readMapping(filepath.Join(folder, e.Name()))
		switch {
		case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENODEV):
		case err != nil:
			return nil, err
		default:
			m.path = "/dev/rbd" + e.Name()
			all = append(all, m)
		}
	}
	return all, nil
}

func readMapping(folder string) (m mapping, err error) {
	value := func(file string) string {
		s, e := readLine(filepath.Join(folder, file))
		if err == nil {
			err = e
		}
		return s
	}
	number := func(file string) uint32 {
		n, e := strconv.ParseUint(value(file), 10, 32)
		if err == nil {
			err = e
		}
		return uint32(n)
	}
	m = mapping{fsid: value("cluster_fsid"), name: imageName{pool: value("pool"), namespace: value("pool_ns"), image: value("name")}, live: value("current_snap") == "-"}
	m.device = adapters.Device(unix.Mkdev(number("major"), number("minor")))
	return m, err
}
