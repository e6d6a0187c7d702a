package mounts

import (
	"context"
	"os"
)

// Host is where a Table is read from. The zero Host is what this process itself sees. In a container, Root is where
// the host's "/" is mounted (with its /proc, /sys and /dev below, and receiving the host's mounts): paths in the Table
// are then the host's, and Path makes them openable.
type Host struct{ Root string }

// Read takes the snapshot. It returns by ctx's deadline; errors are Unavailable when the state would not hold still
// or a device would not answer, Internal when the kernel's files are not readable.
func (h Host) Read(ctx context.Context) (Table, error) { return Table{}, nil }

// Resolve follows the symbolic links of an absolute path, of which the last parts need not exist, and stops at the
// first remote filesystem: what lies there is taken literally.
func (h Host) Resolve(t Table, path string) (string, error) { return path, nil }

// FilesystemOf returns the filesystem of an open file, whatever its name is by now, without touching it. Only a zero
// Host's table can tell. NotFound for a pipe, a socket, and what is not mounted here.
func (t Table) FilesystemOf(f *os.File) (Filesystem, error) { return Filesystem{}, nil }

// Hidden returns those of the devices, and of the block devices that stand on them, which somebody holds exclusively
// though nothing in the table says who: a mount in another namespace, a swap area, a guest, a cluster's storage daemon.
// It opens each with O_EXCL for a moment, in which another's exclusive open fails with EBUSY.
func (h Host) Hidden(ctx context.Context, t Table, devices ...Device) ([]Device, error) {
	return nil, nil
}

// Counters are what the kernel counted for a device since it appeared.
type Counters struct {
	Device Device
	// Kept is false if the kernel keeps no counters for it: the rest says nothing then.
	Kept                                               bool
	Writes, SectorsWritten, Discards, SectorsDiscarded uint64 // completed; sectors of 512 bytes
}

// Moved reports whether the device was written to between two readings.
func (c Counters) Moved(since Counters) bool { return c != since }

// Counters reads the counters of devices, in their order. NotFound for a device that is gone.
func (h Host) Counters(ctx context.Context, devices ...Device) ([]Counters, error) { return nil, nil }

// Path is where this process finds a host's path.
func (h Host) Path(p string) string { return p }
