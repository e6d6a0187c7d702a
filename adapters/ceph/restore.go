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
// objects are what the cluster's configuration says. What a dead process left is Busy until Ceph has noticed that it is
// dead, about 30 seconds.
func (a *Adapter) Begin(ctx context.Context, spec adapters.VolumeSpec) (adapters.Target, error) {
	if spec.Token == "" || spec.Size <= 0 {
		return nil, fault.Errorf(fault.Invalid, "volume %s: a restore needs a token and a size of at least one byte, not %q and %d", spec.ID, spec.Token, spec.Size)
	}
	return callOn(ctx, a, spec.ID, "", func(one *call, name imageName) (adapters.Target, error) {
		t := &target{adapter: a, name: name, at: name, size: spec.Size, overwrite: spec.Overwrite, writes: map[*call]none{}}
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
	})
}

// target is an image being filled. It is open for a change, which registers it as a watcher, and holds the exclusive
// lock where the image has that feature: other clients then cannot write.
type target struct {
	adapter   *Adapter
	name, at  imageName // the volume, and the image that is filled
	size      int64
	overwrite bool
	fresh     bool
	image     *image

	mu     sync.RWMutex // held for reading by writers, so that closing waits for them
	closed bool

	// writes are those under way. One that was abandoned may still reach Ceph: no other may be made before it has.
	writesMu sync.Mutex
	writes   map[*call]none
}

// openNew makes the hidden image, or opens the one that is there.
func (t *target) openNew(one *call) error {
	c := t.adapter.cluster
	n, err := c.connection(one)
	if err != nil {
		return err
	}
	pool, err := n.pool(t.at.pool, t.at.namespace)
	if err != nil {
		return err
	}
	defer pool.Destroy()
	if err := vacant(pool, t.name); err != nil {
		return err
	}
	t.image, err = c.open(one, t.at, forChange)
	if !isAbsent(err) {
		return err
	}
	options := rbd.NewRbdImageOptions()
	defer options.Destroy()
	switch err := rbd.CreateImage(pool, t.at.image, uint64(t.size), options); {
	case errnoOf(err) == syscall.EEXIST: // another process was quicker
	case err != nil:
		return err
	}
	t.image, err = c.open(one, t.at, forChange)
	return err
}

// vacant is nil if no image has the name.
func vacant(pool *rados.IOContext, name imageName) error {
	m, err := rbd.OpenImageReadOnly(pool, name.image, rbd.NoSnapshot)
	if err != nil {
		return ignore(err)
	}
	return first(fault.Errorf(fault.Busy, "it exists; overwrite it or choose another"), m.Close())
}

// restoreKey is the key of an image's metadata under which it says what it will be.
const restoreKey = ".stillpoint.restore"

const (
	// settling is how long another watcher of an image may take to go: one that only looks does so at once.
	settling = time.Second
	settle   = 50 * time.Millisecond
)

// claim makes sure that nobody else uses the image, and that it is what it should be.
func (t *target) claim(one *call) error {
	m := t.image
	for end := time.Now().Add(settling); ; time.Sleep(settle) {
		watchers, err := m.rbd.ListWatchers()
		if err != nil {
			return err
		}
		if len(watchers) <= 1 {
			break
		}
		if err := one.wanted(); err != nil {
			return err
		}
		if time.Now().After(end) {
			if t.overwrite {
				return fault.Errorf(fault.Busy, "it is in use: mapped, attached or open by %d others", len(watchers)-1)
			}
			return fault.Errorf(fault.Busy, "this restore is under way in another process, or one that died less than a minute ago")
		}
	}
	features, err := m.rbd.GetFeatures()
	if err != nil {
		return err
	}
	if features&rbd.FeatureExclusiveLock != 0 {
		if err := m.rbd.LockAcquire(rbd.LockModeExclusive); err != nil {
			switch errnoOf(err) {
			case syscall.EBUSY, syscall.EROFS, syscall.EAGAIN:
				return fault.Errorf(fault.Busy, "%w; another client has its exclusive lock", err)
			}
			return err
		}
	}
	size, err := m.rbd.GetSize()
	if err != nil {
		return err
	}
	if t.overwrite {
		if int64(size) < t.size {
			return fault.Errorf(fault.Invalid, "its %d bytes are fewer than the %d to restore", size, t.size)
		}
		return nil
	}
	return t.claimNew(int64(size))
}

// claimNew writes into a new image what it will be, and checks one that was there.
func (t *target) claimNew(size int64) error {
	text, err := t.image.rbd.GetMetadata(restoreKey)
	switch r, ok := decodeRestoring(text); {
	case isAbsent(err): // just made, perhaps by a process that died right then: nothing is written before this
		t.fresh = true
		return t.image.rbd.SetMetadata(restoreKey, restoring{Volume: t.name.String(), Size: t.size}.encode())
	case err != nil:
		return err
	case !ok || r.Volume != t.name.String():
		return fault.Errorf(fault.Busy, "the image %s is not an unfinished restore of it; rename it", t.at)
	case r.Size != t.size || size != t.size:
		return fault.Errorf(fault.Invalid, "this restore was begun with %d bytes, not %d; use another token", r.Size, t.size)
	}
	return nil
}

// Fresh is true of an image that this Begin made.
func (t *target) Fresh() bool { return t.fresh }

// ReadsZero is true for a new image, in which everything reads as zeros until it is written.
func (t *target) ReadsZero() bool { return !t.overwrite }

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
	b := pieces.Get().(*[pieceMax]byte) // the call may outlive the caller's own
	n := copy(b[:], p)
	return t.change(ctx, func(m *rbd.Image) error {
		defer pieces.Put(b)
		wrote, err := m.WriteAt(b[:n], off)
		if err == nil && wrote != n {
			err = fault.Errorf(fault.Unavailable, "%d bytes instead of %d were written", wrote, n)
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
	m, err := c.open(one, t.name, forChange)
	if err != nil {
		return none{}, err
	}
	defer m.release()
	return none{}, ignore(m.rbd.RemoveMetadata(restoreKey))
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

// release closes the image, which gives up its exclusive lock.
func (t *target) release() {
	t.closed = true
	t.image.shut()
}
