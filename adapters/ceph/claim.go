//go:build ceph && cgo

package ceph

import (
	"encoding/json"
	"slices"
	"syscall"
	"time"

	"github.com/ceph/go-ceph/rados"
	"github.com/ceph/go-ceph/rbd"

	"stillpoint.io/stillpoint/fault"
)

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
	switch err := t.create(pool); {
	case errnoOf(err) == syscall.EEXIST: // another process was quicker
	case err != nil:
		return err
	}
	t.image, err = c.open(one, t.at, forChange)
	return err
}

// create makes the hidden image.
func (t *target) create(pool *rados.IOContext) error {
	options := rbd.NewRbdImageOptions()
	defer options.Destroy()
	if t.of != nil {
		return t.of.clone(pool, t.at.image, options)
	}
	return rbd.CreateImage(pool, t.at.image, uint64(t.size), options)
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

// claim makes sure that nobody else uses the image, and that it is what it should be.
func (t *target) claim(one *call) error {
	m := t.image
	me, err := t.alone(one)
	if err != nil {
		return err
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
	p, err := thisProcess()
	if err != nil {
		return err
	}
	if err := m.setMetadata(holderKey, holder{Client: me, Process: p}.encode()); err != nil {
		return err
	}
	size, err := m.rbd.GetSize()
	if err != nil {
		return err
	}
	if t.overwrite {
		if int64(size) < t.size {
			err := fault.Errorf(fault.Invalid, "its %d bytes are fewer than the %d to restore", size, t.size)
			return first(err, m.removeMetadata(holderKey))
		}
		return nil
	}
	return t.claimNew(int64(size))
}

const (
	// settling is how long another watcher of an image may take to go: one that only looks does so at once.
	settling = time.Second
	// evicting is how long one may take that Ceph was told to shut out: until its OSD has heard of that.
	evicting = 10 * time.Second
	settle   = 20 * time.Millisecond
)

// alone waits until no other client has the image open for a change, and answers with this client's address. The client
// of a process that filled the image and is known to have died is shut out of the cluster, which also ends what it may
// have sent last.
func (t *target) alone(one *call) (me string, err error) {
	m := t.image
	id := int64(m.connection.rados.GetInstanceID())
	evicted := false
	for end := time.Now().Add(settling); ; time.Sleep(settle) {
		watchers, err := m.rbd.ListWatchers()
		if err != nil {
			return "", err
		}
		if len(watchers) <= 1 {
			for _, w := range watchers {
				if w.Id == id {
					me = w.Addr
				}
			}
			return me, nil
		}
		if err := one.wanted(); err != nil {
			return "", err
		}
		if !evicted {
			if evicted, err = m.evictDead(watchers); err != nil {
				return "", err
			}
			if evicted {
				end = time.Now().Add(evicting)
			}
		}
		if time.Now().Before(end) {
			continue
		}
		if t.overwrite {
			return "", fault.Errorf(fault.Busy, "it is in use: mapped, attached or open by %d others", len(watchers)-1)
		}
		return "", fault.Errorf(fault.Busy, "this restore is under way in another process, or in one on another node that died less than a minute ago")
	}
}

// evictDead shuts out the image's last holder, if its process is known to be dead and it still is among the watchers.
func (m *image) evictDead(watchers []rbd.ImageWatcher) (bool, error) {
	text, err := m.rbd.GetMetadata(holderKey)
	if err != nil {
		return false, ignore(err)
	}
	h, ok := decodeHolder(text)
	if !ok || !slices.ContainsFunc(watchers, func(w rbd.ImageWatcher) bool { return w.Addr == h.Client }) || !h.Process.isDead() {
		return false, nil
	}
	command, err := json.Marshal(map[string]string{"prefix": "osd blocklist", "blocklistop": "add", "addr": h.Client})
	if err != nil {
		return false, err
	}
	_, _, err = m.connection.rados.MonCommand(command)
	if isForbidden(err) {
		return false, nil // it will be noticed to be dead, later
	}
	return err == nil, err
}

// claimNew writes into a new image what it will be, and checks one that was there.
func (t *target) claimNew(size int64) error {
	m := t.image
	text, err := m.rbd.GetMetadata(restoreKey)
	r, ok := decodeRestoring(text)
	switch {
	// Just made, perhaps by a process that died right then: nothing is written before this. The metadata of a clone may
	// have come from its parent.
	case isAbsent(err), err == nil && ok && r.Image != m.id:
		if err := t.claimFresh(); err != nil {
			return err
		}
	case err != nil:
		return err
	case !ok || r.Volume != t.name.String():
		return fault.Errorf(fault.Busy, "the image %s is not an unfinished restore of it; rename it", t.at)
	case r.Origin != t.of.String():
		return fault.Errorf(fault.Invalid, "this restore was begun of something else; use another token")
	case r.Size != t.size:
		return fault.Errorf(fault.Invalid, "this restore was begun with %d bytes, not %d; use another token", r.Size, t.size)
	}
	switch {
	case t.of != nil && size < t.size: // it began with its snapshot's size
		return m.rbd.Resize(uint64(t.size))
	case size != t.size:
		return fault.Errorf(fault.Invalid, "the unfinished restore %s has %d bytes, not %d; use another token", t.at, size, t.size)
	}
	return nil
}

// claimFresh writes into an image that was just made what it will be.
func (t *target) claimFresh() error {
	parent, err := t.image.parent()
	if err != nil {
		return err
	}
	if parent != t.of.String() {
		return fault.Errorf(fault.Busy, "the image %s is not an unfinished restore of it; rename it, or use another token", t.at)
	}
	t.fresh = true
	r := restoring{Image: t.image.id, Volume: t.name.String(), Size: t.size, Origin: t.of.String()}
	return t.image.setMetadata(restoreKey, r.encode())
}
