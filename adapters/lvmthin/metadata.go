package lvmthin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/cbt/thinmeta"
	"stillpoint.io/stillpoint/fault"
)

// The metadata snapshot of a pool. There is one a pool, reserved and released by messages, and it is what allows
// reading the metadata of a pool at work (reserve_metadata_snap in thin-provisioning.rst). The pool commits when it is
// reserved.
//
// Between processes it is guarded by a lock (flock) on a file for the pool, which the kernel releases when its holder
// dies. Who has the lock alone reserves, reads and releases, for as long as a part of a stream takes to read:
// milliseconds, so that waiting for each other is cheap. Within a process, all who read at one time share one
// reservation.
//
// The locked file says what is reserved, and was written before: whoever gets the lock and finds a metadata snapshot
// looks there. If it is the one that is recorded, a dead process of ours left it, and it is released. If not, it is
// somebody else's, and neither released nor trusted: Busy.
//
// The pool remembers a reservation across a reboot, and the file in /run does not. So a reservation of ours bears a
// mark in itself: just before it is made, the pool makes a thin device of a number that is only for this, which is in the
// metadata snapshot then, and is deleted from the pool at once. Where nothing was recorded in this boot, a metadata
// snapshot with that device in it is one that a power failure interrupted, and is released.
type metadataKeeper struct {
	state  *state
	mapper mapper

	mu      sync.Mutex
	current map[string]*reservation // by the pool's UUID
	changed chan struct{}           // closed and made anew whenever current changes
}

func newMetadataKeeper(s *state, m mapper) *metadataKeeper {
	return &metadataKeeper{state: s, mapper: m, current: map[string]*reservation{}, changed: make(chan struct{})}
}

// reservation is a metadata snapshot that this process holds, or is just reserving or releasing (readers is 0).
type reservation struct {
	pool     poolRef
	readers  int
	leaving  bool // no new readers: it does not have what somebody wants
	lock     *os.File
	source   *thinmeta.File
	metadata *thinmeta.Metadata
	mark     reserved
}

// markDevice is the number of the thin device that marks our metadata snapshots: the last but one that a pool can have
// (MAX_DEV_ID in drivers/md/dm-thin.c). LVM counts from 1.
const markDevice thinmeta.DeviceID = 1<<24 - 2

// reserved is the record in the locked file, which is empty if nothing has been reserved in this boot. Block is 0 until the
// pool has answered; then Transaction, the pool's at that moment, is what tells our reservation from another's.
type reserved struct {
	Owner       process `json:"owner"`
	Pool        string  `json:"pool"`
	Block       uint64  `json:"block"`
	Transaction uint64  `json:"transaction"`
}

// read gives use the metadata of a pool, in which suitable finds what it needs. suitable's error is the answer if not
// even a metadata snapshot that was reserved just now suits. What use reads was held throughout, or the answer is Busy.
func (k *metadataKeeper) read(ctx context.Context, pool poolRef, suitable, use func(*thinmeta.Metadata) error) error {
	for {
		r, fresh, err := k.join(ctx, pool)
		if err != nil {
			return err
		}
		err = suitable(r.metadata)
		if err == nil {
			if err = use(r.metadata); err == nil {
				err = r.metadata.Held(ctx)
			}
			return errors.Join(err, k.leave(r, false))
		}
		if fresh {
			return errors.Join(err, k.leave(r, false))
		}
		if err := k.leave(r, true); err != nil {
			return err
		}
	}
}

// join shares the reservation of a pool that there is, or makes one; fresh says that it was made after join was called.
func (k *metadataKeeper) join(ctx context.Context, pool poolRef) (r *reservation, fresh bool, err error) {
	k.mu.Lock()
	for {
		r = k.current[pool.uuid]
		if r == nil {
			break
		}
		if r.readers > 0 && !r.leaving {
			r.readers++
			k.mu.Unlock()
			return r, false, nil
		}
		changed := k.changed
		k.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, false, context.Cause(ctx)
		}
		k.mu.Lock()
	}
	r = &reservation{pool: pool}
	k.current[pool.uuid] = r
	k.mu.Unlock()
	err = k.reserve(ctx, r)
	k.mu.Lock()
	defer k.mu.Unlock()
	if err != nil {
		delete(k.current, pool.uuid)
	} else {
		r.readers = 1
	}
	k.announce()
	return r, true, err
}

// leave ends a share, and releases the reservation if it was the last one.
func (k *metadataKeeper) leave(r *reservation, unsuitable bool) error {
	k.mu.Lock()
	r.leaving = r.leaving || unsuitable
	r.readers--
	last := r.readers == 0
	k.mu.Unlock()
	if !last {
		return nil
	}
	err := k.release(r)
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.current, r.pool.uuid)
	k.announce()
	return err
}

func (k *metadataKeeper) announce() {
	close(k.changed)
	k.changed = make(chan struct{})
}

// heldBlocks is how many blocks of a pool's metadata must be free before a metadata snapshot is reserved: a pool that runs
// out of them becomes read-only. It takes the superblock's copy, and a copy of each block on the way to what changes.
const heldBlocks = 32

// lockPatience is how long a pool's lock is waited for. Its holders read metadata only, and never wait for a consumer.
const lockPatience = 30 * time.Second

// reserve takes the lock, cleans up what a dead process left, and reserves.
func (k *metadataKeeper) reserve(ctx context.Context, r *reservation) (err error) {
	limited, cancel := context.WithTimeout(ctx, lockPatience)
	defer cancel()
	if r.lock, err = k.state.lock(limited, "metadata-"+r.pool.uuid); err != nil {
		if ctx.Err() == nil && limited.Err() != nil {
			err = fault.Errorf(fault.Busy, "thin pool %s: another process of ours has its metadata snapshot for more than %v", r.pool.name, lockPatience)
		}
		return err
	}
	defer func() {
		if err != nil {
			r.close()
		}
	}()
	device, err := k.mapper.poolMetadata(r.pool)
	if err != nil {
		return err
	}
	path, err := node(device)
	if err != nil {
		return err
	}
	if r.source, err = thinmeta.OpenFile(path); err != nil {
		return err
	}
	status, err := k.mapper.poolStatus(r.pool)
	if err == nil {
		err = status.usable(r.pool)
	}
	if err != nil && fault.KindOf(err) != fault.Exhausted { // out of data space hinders nobody from reading
		return err
	}
	if status.metadata.free() < heldBlocks {
		return fault.Errorf(fault.Exhausted, "thin pool %s: %d blocks of metadata are free (%s used), too few to reserve a metadata snapshot without danger: extend it with lvextend --poolmetadatasize",
			r.pool.name, status.metadata.free(), status.metadata)
	}
	if status.held != 0 {
		if err := k.reclaim(ctx, r, status); err != nil {
			return err
		}
	}
	r.mark = reserved{Owner: thisProcess(), Pool: r.pool.uuid, Transaction: status.transaction}
	if err := r.mark.write(r.lock); err != nil {
		return err
	}
	made, err := k.mark(r.pool)
	if err != nil {
		return errors.Join(err, erase(r.lock))
	}
	if err := k.mapper.message(r.pool.uuid, "reserve_metadata_snap"); err != nil {
		if made {
			err = errors.Join(err, k.unmark(r.pool))
		}
		return errors.Join(err, erase(r.lock))
	}
	return k.begin(ctx, r)
}

// mark makes the device that marks our metadata snapshots, unless a dead process left one.
func (k *metadataKeeper) mark(pool poolRef) (made bool, err error) {
	err = k.mapper.message(pool.uuid, fmt.Sprintf("create_thin %d", markDevice))
	if errors.Is(err, unix.EEXIST) {
		return false, nil
	}
	return err == nil, err
}

func (k *metadataKeeper) unmark(pool poolRef) error {
	return k.mapper.message(pool.uuid, fmt.Sprintf("delete %d", markDevice))
}

// marked reports whether a metadata snapshot has the mark. A device with blocks is somebody's.
func marked(ctx context.Context, m *thinmeta.Metadata) (bool, error) {
	d, err := m.Device(ctx, markDevice)
	if fault.KindOf(err) == fault.NotFound {
		return false, nil
	}
	return err == nil && d.Mapped == 0, err
}

// begin finds the metadata snapshot that was reserved and opens it. If it cannot, it releases it.
func (k *metadataKeeper) begin(ctx context.Context, r *reservation) (err error) {
	defer func() {
		if err != nil {
			err = errors.Join(err, k.mapper.message(r.pool.uuid, "release_metadata_snap"), erase(r.lock))
		}
	}()
	line, err := k.mapper.fresh(r.pool.uuid)
	if err != nil {
		return err
	}
	status, err := parsePool(line)
	if err != nil {
		return err
	}
	r.mark.Block = status.held
	if err := r.mark.write(r.lock); err != nil {
		return err
	}
	if r.metadata, err = thinmeta.OpenSnapshot(ctx, r.source, status.held); err != nil {
		return err
	}
	ours, err := marked(ctx, r.metadata)
	if err == nil && ours {
		err = k.unmark(r.pool)
	}
	return err
}

// reclaim releases a metadata snapshot that a dead process of ours left, in this boot or an earlier one, and is Busy with
// any other.
func (k *metadataKeeper) reclaim(ctx context.Context, r *reservation, status poolStatus) error {
	foreign := fault.Errorf(fault.Busy, "thin pool %s: somebody else has reserved its metadata snapshot (block %d), and there is one a pool; when they are done, or are no more: dmsetup message %s 0 release_metadata_snap",
		r.pool.name, status.held, r.pool.uuid)
	b, err := io.ReadAll(io.NewSectionReader(r.lock, 0, 4096))
	if err != nil {
		return err
	}
	var left reserved
	if len(b) > 0 && (json.Unmarshal(b, &left) != nil || left.Pool != r.pool.uuid || left.Block != 0 && left.Block != status.held) {
		return foreign
	}
	held, err := thinmeta.OpenSnapshot(ctx, r.source, status.held)
	if err != nil {
		return fmt.Errorf("%w (%w)", foreign, err)
	}
	ours := held.Superblock().Transaction == left.Transaction
	if len(b) == 0 {
		ours, err = marked(ctx, held)
	}
	if err != nil || !ours {
		return errors.Join(err, foreign)
	}
	return k.mapper.message(r.pool.uuid, "release_metadata_snap")
}

// release releases the metadata snapshot, unless it is another one by now.
func (k *metadataKeeper) release(r *reservation) error {
	defer r.close()
	status, err := k.mapper.poolStatus(r.pool)
	if err == nil && status.held == r.mark.Block {
		err = k.mapper.message(r.pool.uuid, "release_metadata_snap")
	}
	if err != nil {
		return fmt.Errorf("releasing the metadata snapshot of thin pool %s: %w", r.pool.name, err)
	}
	return erase(r.lock)
}

func (r *reservation) close() {
	if r.source != nil {
		r.source.Close()
	}
	unlock(r.lock)
}

// write replaces the record. The file is in memory; what matters is its content when this process dies.
func (m reserved) write(f *os.File) error {
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	if err := f.Truncate(0); err != nil {
		return err
	}
	_, err = f.WriteAt(b, 0)
	return err
}

// erase leaves a record that nothing is reserved.
func erase(f *os.File) error { return reserved{}.write(f) }
