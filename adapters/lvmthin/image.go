package lvmthin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

// Open activates a snapshot, which has activation skip otherwise, and opens its device. udev and LVM do not look into it
// (activate.go). The last reader on the node deactivates it.
func (a *Adapter) Open(ctx context.Context, id adapters.SnapshotID) (adapters.Image, error) {
	p, s, r, err := a.lookup(ctx, id)
	if err != nil {
		return nil, err
	}
	if err := readable(id, s, r); err != nil {
		return nil, err
	}
	a.tidy(ctx, p.group)
	hold, err := a.images.activate(ctx, p.group, s)
	if err != nil {
		return nil, failed(err, "snapshot %s", id)
	}
	d, err := openDisk(hold.device, os.O_RDONLY)
	if err != nil {
		return nil, errors.Join(failed(errno(err), "snapshot %s", id), hold.release())
	}
	return &image{id: id, disk: d, hold: hold, size: s.size}, nil
}

// image reads a snapshot.
type image struct {
	id   adapters.SnapshotID
	disk *disk
	hold *activation
	size int64
	once sync.Once
	err  error
}

func (i *image) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fault.Errorf(fault.Invalid, "snapshot %s: read at %d", i.id, off)
	}
	n, err := i.disk.readAt(ctx, p[:max(0, min(int64(len(p)), i.size-off))], off)
	if err != nil {
		return n, failed(err, "snapshot %s: reading at %d", i.id, off+int64(n))
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (i *image) Size() int64 { return i.size }

func (i *image) Close() error {
	i.once.Do(func() {
		i.disk.close()
		if err := i.hold.release(); err != nil {
			i.err = fmt.Errorf("snapshot %s: %w", i.id, err)
		}
	})
	return i.err
}

// activations are the snapshots that are active because somebody reads them.
//
// On the node, a file for each says so: every reader holds a shared lock on it, and who can lock it alone knows that
// there is none. A reader that dies leaves a file without a lock and an active snapshot, read-only and harmless; the
// next who closes an image or opens the backend and uses it deactivates what nobody reads.
type activations struct{ a *Adapter }

func newActivations(a *Adapter) *activations { return &activations{a} }

// activation is a share in an active snapshot.
type activation struct {
	of     *activations
	group  *group
	volume *logical
	device adapters.Device
	lock   *os.File
}

const activePrefix = "active-"

// activeName names the group, by its UUID, and the logical volume, so that who finds it needs nothing else.
func activeName(g *group, l *logical) string { return activePrefix + string(g.id) + "." + l.id }

// activate makes sure that a snapshot is active and stays so until the share is released.
func (v *activations) activate(ctx context.Context, g *group, l *logical) (*activation, error) {
	name := activeName(g, l)
	for {
		h := &activation{of: v, group: g, volume: l}
		err := poll(ctx, pollStep, func() (ok bool, err error) {
			h.lock, err = v.a.state.tryLock(name, unix.LOCK_SH)
			return h.lock != nil, err
		})
		if err != nil {
			return nil, err
		}
		if h.device, err = v.active(g, l); err == nil && h.device != 0 {
			return h, nil
		}
		unlock(h.lock)
		if err != nil {
			return nil, err
		}
		// Alone, so that no one who leaves deactivates it meanwhile. Somebody may between this and the next look.
		alone, err := v.a.state.lock(ctx, name)
		if err != nil {
			return nil, err
		}
		err = v.a.start(ctx, g, l)
		unlock(alone)
		if err != nil {
			return nil, err
		}
	}
}

// active is the device of a volume, 0 if it is not active.
func (v *activations) active(g *group, l *logical) (adapters.Device, error) {
	d, err := v.a.mapper.find(mapperUUID(g.id, l.id, ""))
	if err != nil || d == nil || !d.live {
		return 0, err
	}
	return d.device, nil
}

// release ends a share, and deactivates the snapshot if nobody else has one.
func (h *activation) release() error {
	defer unlock(h.lock)
	if _, err := tryFlock(h.lock, unix.LOCK_UN); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), releasePatience)
	defer cancel()
	return h.of.deactivate(ctx, h.lock, h.group, h.volume)
}

// releasePatience is how long the closing of an image waits for LVM.
const releasePatience = time.Minute

// deactivate deactivates a snapshot that nobody reads. One that was removed meanwhile is as good.
func (v *activations) deactivate(ctx context.Context, lock *os.File, g *group, l *logical) error {
	if alone, err := tryFlock(lock, unix.LOCK_EX); err != nil || !alone {
		return err
	}
	d, err := v.a.mapper.find(mapperUUID(g.id, l.id, ""))
	if err != nil {
		return err
	}
	if d != nil {
		if d.users > 0 {
			return nil // mounted by hand, or opened: who did that looks after it
		}
		err := v.a.stop(ctx, g, l)
		if errors.Is(err, unix.EBUSY) {
			return nil // it was opened just now
		}
		if err != nil {
			if d, e := v.a.mapper.find(mapperUUID(g.id, l.id, "")); e != nil || d != nil {
				return fmt.Errorf("deactivating %s/%s: %w", g.name, l.name, err)
			}
		}
	}
	return os.Remove(lock.Name())
}

// sweep deactivates what dead readers left in a group.
func (v *activations) sweep(ctx context.Context, g *group) error {
	names, err := v.a.state.list(activePrefix + string(g.id) + ".")
	if err != nil {
		return err
	}
	var failures []error
	for _, name := range names {
		lock, err := v.a.state.tryLock(name, unix.LOCK_EX)
		if err != nil || lock == nil {
			failures = append(failures, err)
			continue
		}
		_, id, _ := strings.Cut(name, ".")
		if l := g.byID(id); l != nil {
			err = v.deactivate(ctx, lock, g, l)
		} else {
			err = os.Remove(lock.Name())
		}
		unlock(lock)
		failures = append(failures, err)
	}
	return errors.Join(failures...)
}
