package lvmthin

import (
	"context"
	"fmt"
	"time"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/cbt"
	"stillpoint.io/stillpoint/cbt/thinmeta"
	"stillpoint.io/stillpoint/fault"
)

// Allocated lists what a snapshot has mapped in its pool.
func (a *Adapter) Allocated(ctx context.Context, id adapters.SnapshotID, from int64) (cbt.Delta, error) {
	s, err := a.comparable(ctx, id)
	if err != nil {
		return cbt.Delta{}, err
	}
	return a.delta(ctx, id, s.pool, []source{s}, from, func(m *thinmeta.Metadata, at int64) (cbt.Delta, error) {
		return m.Allocated(ctx, s.thin, at)
	})
}

// Changed compares the mappings of two snapshots. They must lie in one pool: a volume that was made anew in another
// pool has snapshots which cannot be compared with the older ones.
func (a *Adapter) Changed(ctx context.Context, base, target adapters.SnapshotID, from int64) (cbt.Delta, error) {
	b, err := a.comparable(ctx, base)
	if err != nil {
		return cbt.Delta{}, err
	}
	t, err := a.comparable(ctx, target)
	if err != nil {
		return cbt.Delta{}, err
	}
	switch {
	case b.volume != t.volume:
		return cbt.Delta{}, fault.Errorf(fault.Invalid, "snapshots %s and %s are of different volumes", base, target)
	case b.pool.uuid != t.pool.uuid:
		return cbt.Delta{}, fault.Errorf(fault.Unsupported, "snapshots %s and %s lie in different pools (%s and %s), whose metadata cannot be compared", base, target, b.pool.name, t.pool.name)
	}
	return a.delta(ctx, target, t.pool, []source{b, t}, from, func(m *thinmeta.Metadata, at int64) (cbt.Delta, error) {
		return m.Changed(ctx, b.thin, t.thin, at)
	})
}

// source is a snapshot whose mappings are asked for.
type source struct {
	id          adapters.SnapshotID
	volume      adapters.VolumeID
	pool        poolRef
	thin        thinmeta.Volume
	transaction uint64 // of the pool, when the thin device was made
}

// comparable looks a published snapshot up.
func (a *Adapter) comparable(ctx context.Context, id adapters.SnapshotID) (source, error) {
	p, s, r, err := a.lookup(ctx, id)
	if err != nil {
		return source{}, err
	}
	if err := readable(id, s, r); err != nil {
		return source{}, err
	}
	if p.group.external(s) {
		return source{}, fault.Errorf(fault.Unsupported, "snapshot %s: its volume has an external origin (lvs -o +origin), of which the pool's metadata know nothing", id)
	}
	pool, _, err := p.group.poolOf(s)
	if err != nil {
		return source{}, fmt.Errorf("snapshot %s: %w", id, err)
	}
	return source{id: id, volume: p.id, pool: pool, thin: thinmeta.Volume{ID: thinmeta.DeviceID(s.thin), Size: s.size}, transaction: s.transaction}, nil
}

// readable refuses snapshots that nobody may read.
func readable(id adapters.SnapshotID, s *logical, r record) error {
	switch {
	case r.mark != adapters.Verified:
		return fault.Errorf(fault.Invalid, "snapshot %s is still cutting: nobody may read it before it is published", id)
	case !s.readOnly:
		return fault.Errorf(fault.Corrupt, "snapshot %s: somebody has made its logical volume %s writable, so it may not be the point in time any more", id, s.name)
	}
	return nil
}

// in checks that the thin device in the metadata is the snapshot: its number may have been given to another since LVM
// was asked, but not together with the pool's transaction at which it was made.
func (s source) in(ctx context.Context, m *thinmeta.Metadata) error {
	d, err := m.Device(ctx, s.thin.ID)
	if fault.KindOf(err) == fault.NotFound {
		return fault.Errorf(fault.NotFound, "snapshot %s was deleted: its pool has no thin device %d", s.id, s.thin.ID)
	}
	if err != nil {
		return err
	}
	if d.Transaction != s.transaction {
		return fault.Errorf(fault.Unavailable, "snapshot %s was deleted, or LVM and the pool disagree: thin device %d was made in transaction %d of the pool, and the snapshot in %d", s.id, s.thin.ID, d.Transaction, s.transaction)
	}
	return nil
}

const (
	// partMost is how many extents are read ahead of their consumer: 768 KiB of them.
	partMost = 1 << 15
	// partTime is how long a part may take to read, once it has anything: the pool's metadata snapshot is held
	// meanwhile.
	partTime = 500 * time.Millisecond
)

// delta is an answer whose stream is read in parts. For each, the metadata snapshot is reserved, the part is read, and
// it is released before anything is handed on: however slow the consumer is, nothing stays reserved.
func (a *Adapter) delta(ctx context.Context, id adapters.SnapshotID, pool poolRef, of []source, from int64, ask func(m *thinmeta.Metadata, at int64) (cbt.Delta, error)) (cbt.Delta, error) {
	read := func(at int64, use func(cbt.Delta) error) error {
		err := a.metadata.read(ctx, pool, func(m *thinmeta.Metadata) error {
			for _, s := range of {
				if err := s.in(ctx, m); err != nil {
					return err
				}
			}
			return nil
		}, func(m *thinmeta.Metadata) error {
			d, err := ask(m, at)
			if err != nil {
				return err
			}
			return use(d)
		})
		if err != nil {
			return failed(err, "snapshot %s", id)
		}
		return nil
	}
	var answer cbt.Delta
	if err := read(from, func(d cbt.Delta) error { answer = d; return nil }); err != nil {
		return cbt.Delta{}, err
	}
	answer.Extents = func(yield func(cbt.Extent, error) bool) {
		part := make([]cbt.Extent, 0, 256)
		for at, more := from, true; more; {
			part, more = part[:0], false
			err := read(at, func(d cbt.Delta) error {
				start := time.Now()
				for e, err := range d.Extents {
					if err != nil {
						return err
					}
					if part = append(part, e); len(part) >= partMost || time.Since(start) > partTime {
						more = true
						return nil
					}
				}
				return nil
			})
			for _, e := range part {
				if !yield(e, nil) {
					return
				}
				at = e.End()
			}
			if err != nil {
				yield(cbt.Extent{}, err)
				return
			}
		}
	}
	return answer, nil
}
