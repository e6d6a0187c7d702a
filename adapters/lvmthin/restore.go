package lvmthin

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

// Begin makes a thin volume under a hidden name, or opens the existing volume. LVM's sizes are multiples of the group's
// extent: a new volume may be larger than was asked for, and reads as zeros there. An existing volume must not be in
// use; one that is not active is activated for the restore.
func (a *Adapter) Begin(ctx context.Context, spec adapters.VolumeSpec) (adapters.Target, error) {
	if spec.Token == "" || spec.Size <= 0 {
		return nil, fault.Errorf(fault.Invalid, "volume %s: a restore needs a token and a size of at least one byte, not %q and %d", spec.ID, spec.Token, spec.Size)
	}
	return a.begin(ctx, spec, clone{})
}

// begin makes or opens a target. A new one is a clone of a snapshot if there is one.
func (a *Adapter) begin(ctx context.Context, spec adapters.VolumeSpec, of clone) (adapters.Target, error) {
	p, err := a.locate(ctx, spec.ID)
	if err != nil {
		return nil, err
	}
	t := &target{adapter: a, place: p, size: spec.Size, overwrite: spec.Overwrite, of: of, origin: spec.Origin}
	if spec.Overwrite {
		err = t.openExisting(ctx)
	} else {
		err = t.openNew(ctx, spec.Token)
	}
	if err != nil {
		return nil, errors.Join(failed(err, "volume %s", p.id), t.release())
	}
	return t, nil
}

// target is a volume being filled. The file of its lock is locked as long as it is open.
type target struct {
	adapter   *Adapter
	place     place
	size      int64
	overwrite bool
	of        clone           // what a new volume is a clone of
	origin    adapters.Origin // of a new volume that is made for somebody: it is not active when the target is closed
	volume    *logical        // that is written to
	pool      poolRef
	chunk     int64 // of discards that make zeros; 0 if none do
	zeroed    bool  // the pool zeroes a chunk before its first use
	activated bool  // by us
	fresh     bool
	lock      *os.File
	disk      *disk

	mu     sync.RWMutex // held for reading by writers, so that closing waits for them
	closed bool
}

var errUnderWay = fault.Errorf(fault.Busy, "this restore is under way in another process, or elsewhere in this one")

// openExisting opens the volume that is to be overwritten.
func (t *target) openExisting(ctx context.Context) error {
	l, err := t.place.volume()
	if err != nil {
		return err
	}
	switch {
	case l.size < t.size:
		return fault.Errorf(fault.Invalid, "its %d bytes are fewer than the %d to restore", l.size, t.size)
	case l.readOnly:
		return fault.Errorf(fault.Invalid, "it is read-only; lvchange -prw %s/%s", t.place.group.name, l.name)
	}
	if err := t.claim(ctx, l); err != nil {
		return err
	}
	if t.place.group.external(l) {
		t.chunk = 0 // a discard brings the origin's bytes back
	}
	return nil
}

// openNew makes the hidden volume, or opens the one that is there.
func (t *target) openNew(ctx context.Context, token string) error {
	g := t.place.group
	if g.logical[t.place.name] != nil {
		return fault.Errorf(fault.Busy, "it exists; overwrite it or choose another")
	}
	if name := mapperName(g.name, t.place.name); len(name) > nameMax {
		return fault.Errorf(fault.Invalid, "its name is too long for device-mapper: %q has more than %d bytes", name, nameMax)
	}
	name := restoreVolume(t.place.name, token)
	l := g.logical[name]
	if l == nil {
		// Alone from here on: another Begin waits, and finds what this one makes.
		release, err := t.adapter.state.exclusive(ctx, "making-"+string(g.id))
		if err != nil {
			return err
		}
		defer release()
		if g, err = t.adapter.report(ctx, g); err != nil || g == nil {
			return errors.Join(err, fault.Errorf(fault.Unavailable, "its volume group is not there any more"))
		}
		t.place.group = g
		if l = g.logical[name]; l == nil {
			if l, err = t.create(ctx, name); err != nil {
				return err
			}
			t.fresh = true
		}
	}
	of, ours := join(l.tags, tagRestore)
	size, _ := single(l.tags, tagSize)
	origin, _ := single(l.tags, tagClone)
	switch {
	case !ours || of != t.place.name || l.kind != thinVolume:
		return fault.Errorf(fault.Busy, "the logical volume %s is not an unfinished restore of it; rename it", l.name)
	case origin != t.of.origin():
		return fault.Errorf(fault.Invalid, "the token is that of another restore; use another")
	case size != strconv.FormatInt(t.size, 10):
		return fault.Errorf(fault.Invalid, "this restore was begun with %s bytes, not %d; use another token", size, t.size)
	}
	return t.claim(ctx, l)
}

// create makes the hidden volume. LVM neither activates it now nor after a reboot, for it will soon hold the UUIDs of
// another volume: claim activates it, without udev's looking into it. The rename at the end has LVM resume it like any
// volume, and udev look.
func (t *target) create(ctx context.Context, name string) (*logical, error) {
	g := t.place.group
	pool, err := t.poolOfNew()
	if err != nil {
		return nil, err
	}
	ref := poolRef{name: g.name + "/" + pool.name, uuid: mapperUUID(g.id, pool.id, "tpool")}
	status, err := t.adapter.mapper.poolStatus(ref)
	if err == nil {
		err = status.room(ref, t.adapter.limits)
	}
	if err != nil {
		return nil, err
	}
	args := []string{"lvcreate", "-q", "-y", "-ky", "-n", name, "--addtag", tagSize + strconv.FormatInt(t.size, 10)}
	for _, tag := range split(tagRestore, t.place.name) {
		args = append(args, "--addtag", tag)
	}
	marks, err := originTags(t.origin)
	if err != nil {
		return nil, err
	}
	for _, tag := range marks {
		args = append(args, "--addtag", tag)
	}
	if s := t.of.snapshot; s != nil {
		args = append(args, "-s", "-prw", "--addtag", tagClone+s.id, g.name+"/"+s.name)
	} else {
		args = append(args, "-V", bytesOf(t.wholeSize()), "--thinpool", pool.name, "-Wn", g.name)
	}
	if _, err := t.adapter.change(ctx, g, task{args: args, intent: t.adapter.intent(g, &logical{pool: pool.name})}); err != nil {
		return nil, err
	}
	if g, err = t.adapter.report(ctx, g); err != nil || g == nil || g.logical[name] == nil {
		return nil, errors.Join(err, fault.Errorf(fault.Unavailable, "the logical volume %s was made, and is not there; try again", name))
	}
	t.place.group = g
	return g.logical[name], nil
}

// poolOfNew is the pool of a new volume.
func (t *target) poolOfNew() (*logical, error) {
	if t.of.snapshot != nil {
		return t.of.poolIn(t.place.group, t.adapter.pool, t.wholeSize())
	}
	return t.choosePool()
}

// choosePool is the pool of a new volume that is no clone: the one that is configured, or that of the volume's snapshots, or the only
// one.
func (t *target) choosePool() (*logical, error) {
	g, want := t.place.group, t.adapter.pool
	var pools []*logical
	for _, l := range g.logical {
		if l.kind == thinPool {
			pools = append(pools, l)
		}
		if r, ours := t.place.ours(l); want == "" && ours && r.of == t.place.name {
			want = l.pool
		}
	}
	if want != "" {
		if p := g.logical[want]; p != nil && p.kind == thinPool {
			return p, nil
		}
		return nil, fault.Errorf(fault.Invalid, "its volume group %s has no thin pool %s (parameter pool)", g.name, want)
	}
	if len(pools) != 1 {
		return nil, fault.Errorf(fault.Invalid, "its volume group %s has %d thin pools; say which one with the parameter pool", g.name, len(pools))
	}
	return pools[0], nil
}

// claim locks a volume, activates it, and opens it alone.
func (t *target) claim(ctx context.Context, l *logical) (err error) {
	a, g := t.adapter, t.place.group
	if t.lock, err = a.state.tryLock("restore-"+string(g.id)+"."+l.id, unix.LOCK_EX); err != nil {
		return err
	}
	if t.lock == nil {
		return errUnderWay
	}
	pool, pl, err := g.poolOf(l)
	if err != nil {
		return err
	}
	t.volume, t.pool, t.zeroed = l, pool, pl.zeroes
	if pl.zeroes && pl.discards != "ignore" {
		t.chunk = pl.chunk
	}
	if err := t.complete(ctx); err != nil {
		return err
	}
	uuid := mapperUUID(g.id, l.id, "")
	d, err := a.mapper.find(uuid)
	if err == nil && d == nil {
		if err = a.start(ctx, g, l); err == nil {
			t.activated = true
			d, err = a.mapper.find(uuid)
		}
	}
	if err == nil && d == nil {
		err = fault.Errorf(fault.Unavailable, "it was activated, and is not active; try again")
	}
	if err != nil {
		return err
	}
	if d.users > 0 {
		return inUse(d, d.users)
	}
	if t.disk, err = openDisk(d.device, os.O_RDWR|unix.O_EXCL); err != nil {
		if errors.Is(err, unix.EBUSY) {
			return inUse(d, 1)
		}
		return errno(err)
	}
	if d, err = a.mapper.find(uuid); err == nil && d != nil && d.users > diskUsers {
		return inUse(d, d.users-diskUsers)
	}
	return err
}

// diskUsers is how many descriptors a disk is open by.
const diskUsers = 2

// inUse is Busy, with the way out.
func inUse(d *mapped, users int) error {
	return fault.Errorf(fault.Busy, "in use: %d mounts, programs or devices have %s open (lsof, findmnt and dmsetup ls --tree show which); stop them first", users, d.name)
}

// WriteAt writes, past the page cache where the alignment allows. It refuses before the pool is full: a write to a full
// pool would wait for a minute, and nothing could interrupt it.
func (t *target) WriteAt(ctx context.Context, p []byte, off int64) error {
	return t.access(off, int64(len(p)), func() error {
		status, err := t.adapter.mapper.poolStatus(t.pool)
		if err == nil {
			err = status.room(t.pool, t.adapter.limits)
		}
		if err == nil {
			_, err = t.disk.writeAt(ctx, p, off)
		}
		return err
	})
}

// ReadAt reads, past the page cache where the alignment allows.
func (t *target) ReadAt(ctx context.Context, p []byte, off int64) error {
	return t.access(off, int64(len(p)), func() error {
		_, err := t.disk.readAt(ctx, p, off)
		return err
	})
}

// Fresh is true of a volume that this Begin made.
func (t *target) Fresh() bool { return t.fresh }

// Zero makes a range read as zeros, and gives whole chunks back to the pool where that does it.
func (t *target) Zero(ctx context.Context, off, length int64) error {
	return t.access(off, length, func() error {
		if err := ctx.Err(); err != nil {
			return err
		}
		return t.disk.zero(ctx, off, length, t.chunk)
	})
}

// access runs a read or write within the bounds of an open target.
func (t *target) access(off, length int64, do func() error) error {
	t.mu.RLock()
	defer t.mu.RUnlock()
	if t.closed {
		return fault.Errorf(fault.Invalid, "volume %s: used after the target was closed", t.place.id)
	}
	if off < 0 || length < 0 || length > t.size || off > t.size-length {
		return fault.Errorf(fault.Invalid, "volume %s: %d bytes at %d are not within the target's %d", t.place.id, length, off, t.size)
	}
	if err := do(); err != nil {
		return failed(err, "volume %s: %d bytes at %d", t.place.id, length, off)
	}
	return nil
}

// ReadsZero is true for a new volume in a pool that zeroes a chunk before its first use. In others (lvcreate -Zn) the
// rest of a chunk that was written in part holds what some volume left there. A clone holds its snapshot's bytes.
func (t *target) ReadsZero() bool { return !t.overwrite && t.zeroed && t.of.snapshot == nil }

// Commit makes the content durable, then gives a new volume its name, then takes the marks of a restore off. A volume
// that kept them, because that last step failed, is one nevertheless.
func (t *target) Commit(ctx context.Context) (adapters.Volume, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return adapters.Volume{}, fault.Errorf(fault.Invalid, "volume %s: committed after the target was closed", t.place.id)
	}
	err := ctx.Err()
	if err == nil {
		err = t.commit(ctx)
	}
	if err = errors.Join(err, t.release()); err != nil {
		return adapters.Volume{}, failed(err, "volume %s: finishing the restore", t.place.id)
	}
	return t.adapter.Volume(ctx, t.place.id)
}

func (t *target) commit(ctx context.Context) error {
	if err := t.disk.cached.Sync(); err != nil || t.overwrite {
		return errno(err)
	}
	g := t.place.group
	_, err := t.adapter.change(ctx, g, task{
		args:   []string{"lvrename", "-q", "-y", g.name, t.volume.name, t.place.name},
		intent: t.adapter.intent(g, t.volume),
	})
	if err != nil {
		if fault.KindOf(err) == fault.Busy {
			return fmt.Errorf("%w; if somebody else made it meanwhile, choose another name or overwrite it", err)
		}
		return err
	}
	renamed := *t.volume
	renamed.name = t.place.name
	t.volume = &renamed
	var marks []string
	for _, tag := range t.volume.tags {
		if _, is := single([]string{tag}, tagRestore); is {
			marks = append(marks, tag)
		}
		if _, is := single([]string{tag}, tagSize); is {
			marks = append(marks, tag)
		}
		if _, is := single([]string{tag}, tagClone); is {
			marks = append(marks, tag)
		}
	}
	return t.adapter.changeTags(ctx, g, t.volume, marks, nil, "-kn")
}

// Abort removes what was not committed.
func (t *target) Abort(ctx context.Context) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return nil
	}
	t.closeDisk()
	var err error
	if !t.overwrite {
		t.origin = adapters.Origin{}
		if err = t.adapter.remove(ctx, t.place.group, t.volume); err != nil {
			err = fmt.Errorf("volume %s: giving the restore up: %w", t.place.id, err)
		}
	}
	return errors.Join(err, t.release())
}

// Close keeps the hidden volume.
func (t *target) Close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return nil
	}
	return t.release()
}

func (t *target) closeDisk() {
	if t.disk != nil {
		t.disk.close()
		t.disk = nil
	}
}

// release closes everything, and deactivates a volume that was activated to be overwritten, or is made for somebody, who
// will activate it.
func (t *target) release() error {
	t.closed = true
	t.closeDisk()
	var err error
	if t.volume != nil && (t.activated && t.overwrite || t.origin.Name != "") {
		ctx, cancel := context.WithTimeout(context.Background(), releasePatience)
		defer cancel()
		err = t.adapter.stop(ctx, t.place.group, t.volume)
	}
	if t.lock != nil {
		os.Remove(t.lock.Name())
		unlock(t.lock)
		t.lock = nil
	}
	return err
}
