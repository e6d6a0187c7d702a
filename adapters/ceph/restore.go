//go:build ceph && cgo

package ceph

import (
	"context"
	"sync"
	"syscall"
	"time"

	"github.com/ceph/go-ceph/rados"
	"github.com/ceph/go-ceph/rbd"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

// Begin makes an image under a hidden name, or opens the existing volume. Size, features and data pool of a new image's
// objects are what the cluster's configuration says. What a process left that died on this node is free at once. What one
// left that died elsewhere is Busy until Ceph has noticed, 30 seconds by default (osd_client_watch_timeout).
func (a *Adapter) Begin(ctx context.Context, spec adapters.VolumeSpec) (adapters.Target, error) {
	if spec.Token == "" || spec.Size <= 0 {
		return nil, fault.Errorf(fault.Invalid, "volume %s: a restore needs a token and a size of at least one byte, not %q and %d", spec.ID, spec.Token, spec.Size)
	}
	return callOn(ctx, a, spec.ID, "", func(one *call, name imageName) (adapters.Target, error) {
		return a.begin(one, name, spec, nil)
	})
}

// begin opens the target of a restore, of a clone if there is an origin.
func (a *Adapter) begin(one *call, name imageName, spec adapters.VolumeSpec, of *origin) (adapters.Target, error) {
	t := &target{adapter: a, name: name, at: name, size: spec.Size, overwrite: spec.Overwrite, of: of, writes: map[*call]none{}}
	if !spec.Overwrite {
		t.at = name.target(spec.Token)
	}
	var err error
	if spec.Overwrite {
		t.image, err = a.cluster.open(one, name, forChange)
	} else {
		err = t.openNew(one)
	}
	if err != nil {
		return nil, err
	}
	one.onAbandon(t.image.release)
	if err := t.claim(one); err != nil {
		return nil, err
	}
	return t, nil
}

// target is an image being filled. It is open for a change, which registers it as a watcher, and holds the exclusive
// lock where the image has that feature: other clients then cannot write.
type target struct {
	adapter   *Adapter
	name, at  imageName // the volume, and the image that is filled
	size      int64
	overwrite bool
	of        *origin // what it is a clone of, nil if it is none
	fresh     bool
	image     *image

	mu     sync.RWMutex // held for reading by writers, so that closing waits for them
	closed bool

	// writes are those under way. One that was abandoned may still reach Ceph: no other may be made before it has.
	writesMu sync.Mutex
	writes   map[*call]none
}

// Fresh is true of an image that this Begin made.
func (t *target) Fresh() bool { return t.fresh }

// ReadsZero is true for a new image that is no clone, in which everything reads as zeros until it is written.
func (t *target) ReadsZero() bool { return !t.overwrite && t.of == nil }

// WriteAt writes. A large write is made in pieces, one after the other.
func (t *target) WriteAt(ctx context.Context, p []byte, off int64) error {
	return t.within(off, int64(len(p)), "writing", func() error {
		for len(p) > 0 {
			piece := p[:min(len(p), pieceMax)]
			if err := t.write(ctx, piece, off); err != nil {
				return err
			}
			p, off = p[len(piece):], off+int64(len(piece))
		}
		return ctx.Err()
	})
}

func (t *target) write(ctx context.Context, p []byte, off int64) error {
	b := takeBuffer(len(p))
	copy(b.bytes, p)
	return t.change(ctx, func(m *rbd.Image) error {
		defer b.giveBack()
		wrote, err := m.WriteAt(b.bytes, off)
		if err == nil && wrote != len(b.bytes) {
			err = fault.Errorf(fault.Unavailable, "%d bytes instead of %d were written", wrote, len(b.bytes))
		}
		return err
	})
}

// Zero makes the range read as zeros, whatever was there and whatever a parent has: what a discard promises nothing of,
// rbd_writesame() does, and librbd turns whole objects of zeros into their removal by itself.
func (t *target) Zero(ctx context.Context, off, length int64) error {
	return t.within(off, length, "zeroing", func() error {
		for length > 0 {
			n := min(length, zeroMax)
			head := min((zeroBlock-off%zeroBlock)%zeroBlock, n)
			switch {
			case head > 0:
				n = head
			case n >= zeroBlock:
				n -= n % zeroBlock
			}
			if err := t.zero(ctx, off, n); err != nil {
				return err
			}
			off, length = off+n, length-n
		}
		return ctx.Err()
	})
}

const (
	zeroBlock = 4096
	zeroMax   = 256 << 20 // bytes that one call zeroes
)

func (t *target) zero(ctx context.Context, off, n int64) error {
	if n < zeroBlock {
		return t.write(ctx, make([]byte, n), off)
	}
	return t.change(ctx, func(m *rbd.Image) error {
		_, err := m.WriteSame(uint64(off), uint64(n), make([]byte, zeroBlock), rados.OpFlagNone)
		return err
	})
}

// change makes a call that writes. While one that was abandoned may still reach Ceph, no other is made: it could be
// overtaken by the older one.
func (t *target) change(ctx context.Context, f func(*rbd.Image) error) error {
	if err := t.settled(); err != nil {
		return err
	}
	_, err := using(ctx, t.image, func(one *call) (none, error) {
		t.note(one, true)
		one.later(func() { t.note(one, false) })
		if err := one.wanted(); err != nil { // given up before it was noted: nobody would wait for it
			return none{}, err
		}
		return none{}, f(t.image.rbd)
	})
	return err
}

func (t *target) note(one *call, begins bool) {
	t.writesMu.Lock()
	defer t.writesMu.Unlock()
	if begins {
		t.writes[one] = none{}
	} else {
		delete(t.writes, one)
	}
}

// ReadAt reads what the image holds.
func (t *target) ReadAt(ctx context.Context, p []byte, off int64) error {
	return t.within(off, int64(len(p)), "reading", func() error {
		for len(p) > 0 {
			piece := p[:min(len(p), pieceMax)]
			if err := t.image.read(ctx, piece, off); err != nil {
				return err
			}
			p, off = p[len(piece):], off+int64(len(piece))
		}
		return ctx.Err()
	})
}

// within runs a call within the bounds of an open target.
func (t *target) within(off, length int64, doing string, f func() error) error {
	t.mu.RLock()
	defer t.mu.RUnlock()
	id := t.name.id(t.adapter.backend)
	if t.closed {
		return fault.Errorf(fault.Invalid, "volume %s: used after the target was closed", id)
	}
	if off < 0 || length < 0 || length > t.size || off > t.size-length {
		return fault.Errorf(fault.Invalid, "volume %s: %d bytes at %d are not within the target's %d", id, length, off, t.size)
	}
	began := time.Now()
	if err := f(); err != nil {
		return t.adapter.cluster.failure(err, began, "volume %s: %s %d bytes at %d", id, doing, length, off)
	}
	return nil
}

// Commit makes what was written durable, gives up the image, and renames it.
func (t *target) Commit(ctx context.Context) (adapters.Volume, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	id := t.name.id(t.adapter.backend)
	if t.closed {
		return adapters.Volume{}, fault.Errorf(fault.Invalid, "volume %s: committed after the target was closed", id)
	}
	began := time.Now()
	err := t.settled()
	if err == nil {
		_, err = using(ctx, t.image, func(*call) (none, error) { return none{}, t.image.rbd.Flush() })
	}
	t.release()
	if err == nil && !t.overwrite {
		_, err = do(ctx, t.adapter.cluster.calls, t.rename)
	}
	if err != nil {
		return adapters.Volume{}, t.adapter.cluster.failure(err, began, "volume %s: finishing the restore", id)
	}
	return t.adapter.Volume(ctx, id)
}

// rename gives a new image the volume's name, and then takes the note from it that it is a restore.
func (t *target) rename(one *call) (none, error) {
	c := t.adapter.cluster
	n, err := c.connection(one)
	if err != nil {
		return none{}, err
	}
	pool, err := n.pool(t.at.pool, t.at.namespace)
	if err != nil {
		return none{}, err
	}
	defer pool.Destroy()
	switch err := rbd.GetImage(pool, t.at.image).Rename(t.name.image); {
	case errnoOf(err) == syscall.EEXIST:
		return none{}, fault.Errorf(fault.Busy, "somebody else made it meanwhile; choose another name or overwrite it")
	case err != nil:
		return none{}, err
	}
	m, err := c.open(one, t.name, forReading)
	if err != nil {
		return none{}, err
	}
	defer m.release()
	return none{}, first(m.removeMetadata(restoreKey), m.removeMetadata(holderKey))
}

// settled is nil if no write that was abandoned is on its way.
func (t *target) settled() error {
	t.writesMu.Lock()
	defer t.writesMu.Unlock()
	for one := range t.writes {
		if one.isAbandoned() {
			return fault.Errorf(fault.Unavailable, "a write that was given up may still arrive; try again when Ceph answers")
		}
	}
	return nil
}

// Abort removes a new image.
func (t *target) Abort(ctx context.Context) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return nil
	}
	t.release()
	if t.overwrite {
		return nil
	}
	began := time.Now()
	_, err := doLong(ctx, t.adapter.cluster.calls, func(one *call) (none, error) {
		n, err := t.adapter.cluster.connection(one)
		if err != nil {
			return none{}, err
		}
		pool, err := n.pool(t.at.pool, t.at.namespace)
		if err != nil {
			return none{}, err
		}
		defer pool.Destroy()
		return none{}, ignore(rbd.RemoveImage(pool, t.at.image))
	})
	if err != nil {
		return t.adapter.cluster.failure(err, began, "volume %s: giving the restore up", t.name.id(t.adapter.backend))
	}
	return nil
}

// Close keeps the unfinished image.
func (t *target) Close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.closed {
		t.release()
	}
	return nil
}

// release closes the image, which gives up its exclusive lock. A volume that was overwritten says no more who did it.
func (t *target) release() {
	t.closed = true
	ctx, cancel := context.WithTimeout(context.Background(), closePatience)
	defer cancel()
	calls := t.adapter.cluster.calls
	run(ctx, calls, func(*call) (none, error) {
		if t.overwrite && calls.healthy() == nil {
			t.image.removeMetadata(holderKey) // what stays is swept when this process has ended
		}
		t.image.release()
		return none{}, nil
	})
}
