package cut

import (
	"context"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/mounts"
	"stillpoint.io/stillpoint/fault"
)

// plan reads the facts and decides.
func plan(ctx context.Context, r Request, n Node, members []member) (Plan, error) {
	f, err := n.gather(ctx, members)
	if err != nil {
		return Plan{}, err
	}
	volumes := make([]adapters.Volume, len(members))
	for i, m := range members {
		volumes[i] = m.volume
	}
	return makePlan(r, volumes, f)
}

// gather reads what a plan follows from.
func (n Node) gather(ctx context.Context, members []member) (facts, error) {
	table, err := n.Host.Read(ctx)
	if err != nil {
		return facts{}, err
	}
	f := facts{table: table, hidden: map[adapters.VolumeID][]mounts.Device{}, open: map[adapters.VolumeID]bool{}, refused: map[mounts.Device]string{}}
	for _, m := range members {
		switch {
		case m.volume.Device != 0:
			hidden, err := n.Host.Hidden(ctx, table, mounts.Device(m.volume.Device))
			if err != nil {
				return facts{}, fmt.Errorf("%s: %w", m.volume.ID, err)
			}
			f.hidden[m.volume.ID] = hidden
		case m.volume.Form == adapters.TreeForm: // files in it are open all the time: its snapshot is one instant by itself
		case m.volume.Path != "":
			if f.open[m.volume.ID], err = opened(m.volume.Path); err != nil {
				return facts{}, fmt.Errorf("%s: %w", m.volume.ID, err)
			}
		}
	}
	if root, ok := table.Root(); ok {
		f.refused[root.ID] = "it is the root"
	}
	for _, path := range n.Refuse {
		at, err := n.Host.Resolve(table, path)
		if err != nil {
			return facts{}, err
		}
		if m, ok := table.At(at); ok {
			f.refused[m.Filesystem] = path + " lies on it"
		}
	}
	for _, std := range []*os.File{os.Stdin, os.Stdout, os.Stderr} {
		if fs, err := table.FilesystemOf(std); err == nil {
			f.refused[fs.ID] = fmt.Sprintf("this program's %s goes there", std.Name())
		}
	}
	return f, nil
}

// opened reports whether anybody has a file open: then a write lease on it is refused (fcntl(2), F_SETLEASE).
func opened(path string) (bool, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return false, fault.Errorf(fault.Unavailable, "%w", err)
	}
	defer f.Close()
	_, err = unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_WRLCK)
	if errors.Is(err, unix.EAGAIN) {
		return true, nil
	}
	if err != nil {
		return false, fault.Errorf(fault.Unavailable, "asking who has %s open: %w", path, err)
	}
	_, err = unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_UNLCK)
	return false, err
}

// lock makes this the only cut on the node until unlock is called. The wait for another cut ends with ctx.
func lock(ctx context.Context, path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, fault.Errorf(fault.Invalid, "the lock of the node's cuts: %w", err)
	}
	err = poll(ctx, func() (bool, error) {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if errors.Is(err, unix.EWOULDBLOCK) {
			return false, nil
		}
		return true, err
	})
	if err != nil {
		f.Close()
		if ctx.Err() != nil {
			return nil, fault.Errorf(fault.Busy, "another cut is under way on this node (%s): %w", path, err)
		}
		return nil, err
	}
	return func() { f.Close() }, nil
}
