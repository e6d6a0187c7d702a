package reflink

import (
	"context"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/cbt/fiemap"
	"stillpoint.io/stillpoint/fault"
)

// Forecast constants. Measured on Linux 6.18 with files of 100,000 extents on a loop device of a quiet machine: cloning
// one extent takes 9 to 14 µs on XFS and 4 to 6 µs on btrfs, listing one 1.3 and 0.95 µs. With all cores busy, cloning
// takes up to twice that, which is what a plan's reserve is for. BenchmarkFrozen measures it.
const (
	perSnapshot     = 5 * time.Millisecond
	perExtent       = 14 * time.Microsecond
	perStagedExtent = 2 * time.Microsecond // one listing on XFS, two on btrfs
)

// Gate checks that every volume can be cloned right now, by cloning one block of it, and that its pool has room: a
// clone takes no data blocks, but metadata, and every later write to the volume takes a new block. The forecast counts
// the volume's extents. One that is staged costs a seventh, and what was written since: ask for the forecast after Stage.
func (a *Adapter) Gate(ctx context.Context, ids []adapters.VolumeID) (adapters.Forecast, error) {
	frozen := map[adapters.Device]time.Duration{} // clones on one pool share its log: added up, to be safe
	var f adapters.Forecast
	for _, id := range ids {
		at, err := a.locate(ctx, id)
		if err != nil {
			return f, err
		}
		took, err := a.gate(ctx, at)
		if err != nil {
			return f, failed(err, "volume %s", id)
		}
		frozen[at.pool.device] += took
		f.Frozen = max(f.Frozen, frozen[at.pool.device])
	}
	return f, nil
}

func (a *Adapter) gate(ctx context.Context, at place) (time.Duration, error) {
	source, form, m, err := at.openVolume()
	if err != nil {
		return 0, err
	}
	defer source.Close()
	if form == adapters.TreeForm {
		return perSubvolume, gateTree(at, m)
	}
	folder, err := at.makeFolder()
	if err != nil {
		return 0, err
	}
	d, err := newDraft(folder, source)
	if err != nil {
		return 0, err
	}
	defer d.close()
	if err := room(d.folder, m.point); err != nil {
		return 0, err
	}
	st, err := stat(source)
	if err != nil {
		return 0, err
	}
	if err := cloneRange(d.file, source, 0, min(st.Size, d.block)); err != nil {
		return 0, err
	}
	if err := (record{}).write(d.file); err != nil {
		return 0, err
	}
	n, err := fiemap.Count(ctx, source)
	if err != nil {
		return 0, err
	}
	if a.isStaged(at.id) {
		return perSnapshot + time.Duration(n)*perStagedExtent, nil
	}
	return perSnapshot + time.Duration(n)*perExtent, nil
}

// room refuses a pool with less than 1 % and less than 64 MiB free.
func room(f *os.File, point string) error {
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &fs); err != nil {
		return err
	}
	free, least := int64(fs.Bavail)*fs.Bsize, leastFree(int64(fs.Blocks)*fs.Bsize)
	if free < least {
		return fault.Errorf(fault.Exhausted, "the pool %s has %d MiB free and a snapshot wants %d MiB (1 %%, at least 64 MiB); delete snapshots or enlarge it", point, free>>20, least>>20)
	}
	return nil
}

// leastFree is how much of a pool of size bytes must be free for a snapshot.
func leastFree(size int64) int64 { return max(size/100, 64<<20) }

// stage names what is staged: a volume and the wanted name of its snapshot.
type stage struct {
	volume adapters.VolumeID
	wanted string
}

// Stage clones the volume into an unnamed file, piece by piece, so that writers to the volume never wait long; on a
// repetition it catches up with the volume. What is staged lives and dies with this process, and until then keeps the
// pool from being unmounted.
func (a *Adapter) Stage(ctx context.Context, id adapters.VolumeID, wanted string) error {
	if err := checkWanted(id, wanted); err != nil {
		return err
	}
	at, err := a.locate(ctx, id)
	if err != nil {
		return err
	}
	source, form, _, err := at.openVolume()
	if err != nil {
		return failed(err, "volume %s", at.id)
	}
	defer source.Close()
	if form == adapters.TreeForm {
		if err := unix.Syncfs(int(source.Fd())); err != nil { // what is on the disk need not be flushed by the snapshot
			return failed(err, "volume %s: writing it to the disk ahead", at.id)
		}
		return nil
	}
	d := a.take(stage{at.id, wanted})
	if d != nil && sameFile(d.of, source) {
		err = d.refresh(ctx, source)
	} else {
		d.close()
		d, err = at.stage(ctx, source)
	}
	if err == nil {
		err = d.list(ctx)
	}
	if err != nil {
		d.close()
		return failed(err, "volume %s: cloning it ahead", at.id)
	}
	a.put(stage{at.id, wanted}, d)
	return nil
}

// stage makes a draft of the whole volume.
func (p place) stage(ctx context.Context, source *os.File) (*draft, error) {
	folder, err := p.makeFolder()
	if err != nil {
		return nil, err
	}
	d, err := newDraft(folder, source)
	if err != nil {
		return nil, err
	}
	if d.of, err = reopen(source, unix.O_PATH); err != nil {
		return d, err
	}
	return d, d.cloneAhead(ctx, source)
}

// Unstage throws away what is staged.
func (a *Adapter) Unstage(_ context.Context, id adapters.VolumeID, wanted string) error {
	a.take(a.key(id, wanted)).close()
	return nil
}

// key is what a volume is staged under: its canonical id, which may have been found before the volume went away.
func (a *Adapter) key(id adapters.VolumeID, wanted string) stage {
	if canonical, err := a.canonical(id); err == nil {
		id = canonical
	}
	return stage{id, wanted}
}

// take removes and returns what is staged, nil if nothing is: whoever takes it has it alone.
func (a *Adapter) take(key stage) *draft {
	a.mu.Lock()
	defer a.mu.Unlock()
	d := a.staged[key]
	delete(a.staged, key)
	return d
}

func (a *Adapter) put(key stage, d *draft) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.staged[key].close() // of a Stage that ran in parallel
	a.staged[key] = d
}

func (a *Adapter) isStaged(id adapters.VolumeID) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	for key := range a.staged {
		if key.volume == id {
			return true
		}
	}
	return false
}
