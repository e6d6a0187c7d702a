//go:build ceph && cgo

package ceph

import (
	"context"
	"errors"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/ceph/go-ceph/rados"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

// none is what a call answers that only fails or does not.
type none = struct{}

// CreateSnapshot takes a snapshot. One that was abandoned half-way removes what it made, when it can.
func (a *Adapter) CreateSnapshot(ctx context.Context, id adapters.VolumeID, wanted string) (adapters.Snapshot, error) {
	if wanted == "" || len(wanted) > wantedMax {
		return adapters.Snapshot{}, fault.Errorf(fault.Invalid, "volume %s: a snapshot's wanted name has 1 to %d bytes, not %d", id, wantedMax, len(wanted))
	}
	began := time.Now()
	s, err := callOn(ctx, a, id, "", func(one *call, name imageName) (adapters.Snapshot, error) {
		m, err := a.change(one, name)
		if err != nil {
			return adapters.Snapshot{}, err
		}
		for {
			f, err := m.find(adapters.Name(wanted))
			if err == nil && f == nil {
				f, err = m.create(one, wanted)
			}
			switch {
			case errors.Is(err, errTaken):
				continue // somebody else was quicker: theirs is the snapshot, unless it is gone again
			case err != nil:
				return adapters.Snapshot{}, err
			}
			return existing(*f, name.id(a.backend), wanted)
		}
	})
	if err == nil {
		a.pace.note(time.Since(began))
	}
	return s, err
}

// wantedMax is the most bytes of a wanted name.
const wantedMax = 4096

// existing is what CreateSnapshot answers where the name is taken.
func existing(f found, id adapters.VolumeID, wanted string) (adapters.Snapshot, error) {
	switch {
	case !f.mine:
		return adapters.Snapshot{}, fault.Errorf(fault.Busy, "the name %s is taken by a snapshot that is not ours; choose another", f.name)
	case f.record.Wanted != wanted:
		return adapters.Snapshot{}, fault.Errorf(fault.Busy, "the name %s is taken by the snapshot %q; choose another", f.name, f.record.Wanted)
	}
	return f.snapshot(id), nil
}

// errTaken says that a name that was free is not any more, or that a draft was taken away.
var errTaken = errors.New("the name was taken meanwhile")

// create takes a snapshot under a name that nobody else has, writes its record, and then gives it its name.
func (m *image) create(one *call, wanted string) (*found, error) {
	if err := one.wanted(); err != nil {
		return nil, err
	}
	name, draft := adapters.Name(wanted), draftName(adapters.Name(wanted))
	if _, err := m.rbd.CreateSnapshot(draft); err != nil {
		// A time-out does not say that it was not made.
		return nil, errors.Join(err, m.discard(draft))
	}
	number, err := m.rbd.GetSnapID(draft)
	if err == nil {
		err = one.wanted()
	}
	if err == nil {
		err = m.write(snapshotNumber(number), record{Wanted: wanted, Mark: adapters.Cutting})
	}
	if err == nil {
		err = one.wanted()
	}
	if err == nil {
		switch err = m.rbd.GetSnapshot(draft).Rename(name); errnoOf(err) {
		case syscall.EEXIST, syscall.ENOENT:
			err = errTaken
		}
	}
	if err != nil {
		return nil, first(err, m.discard(draft))
	}
	// Between the renaming and here the call may have been abandoned: the snapshot is there, cutting, for a repetition to find.
	f, err := m.find(name)
	if err == nil && f == nil {
		err = errTaken
	}
	return f, err
}

// first is the first error: what failed while cleaning up does not change what is answered.
func first(err, _ error) error { return err }

// discard removes a snapshot that was being made, and its record.
func (m *image) discard(draft string) error {
	number, err := m.rbd.GetSnapID(draft)
	if err != nil {
		return ignore(err)
	}
	return m.remove(snapshotNumber(number))
}

// write writes the record of a snapshot.
func (m *image) write(n snapshotNumber, r record) error {
	r.Image = m.id
	text, err := r.encode()
	if err != nil {
		return err
	}
	return m.setMetadata(recordKey(n), text)
}

// remove removes a snapshot and then its record: a record without its snapshot harms nobody.
func (m *image) remove(n snapshotNumber) error {
	if err := ignore(m.rbd.RemoveSnapByID(uint64(n))); err != nil {
		return err
	}
	return m.removeMetadata(recordKey(n))
}

// Publish writes the mark and the notes. RADOS has made both durable when it answers.
func (a *Adapter) Publish(ctx context.Context, id adapters.SnapshotID, notes adapters.Notes) error {
	_, err := callOn(ctx, a, id.Volume, "publishing the snapshot "+id.String(), func(one *call, name imageName) (none, error) {
		if err := checkName(id); err != nil {
			return none{}, err
		}
		m, err := a.change(one, name)
		if err != nil {
			return none{}, err
		}
		f, err := m.find(id.Name)
		if err == nil && (f == nil || !f.mine) {
			err = notFound()
		}
		if err != nil {
			return none{}, err
		}
		f.record.Mark, f.record.Notes = adapters.Verified, notes
		if err := m.write(f.number, f.record); err != nil {
			return none{}, err
		}
		// It may have been deleted in between, by somebody who looked for a record before this one was written.
		if again, err := m.find(id.Name); err != nil || again == nil || again.number != f.number {
			if err == nil {
				err = first(notFound(), m.removeMetadata(recordKey(f.number)))
			}
			return none{}, err
		}
		return none{}, m.sweep(one, time.Now().Add(-draftAge))
	})
	return err
}

// change opens an image for a change until the call ends. Changes of one image come one after the other.
func (a *Adapter) change(one *call, name imageName) (*image, error) {
	var m *image
	var pool *rados.IOContext
	giveBack := func() {}
	// Noted before the turns are taken, and so done before they are given back.
	one.later(func() {
		if m != nil {
			m.release()
		}
		giveBack()
		if pool != nil {
			pool.Destroy()
		}
	})
	if err := a.turns.take(one, name); err != nil {
		return nil, err
	}
	n, err := a.cluster.connection(one)
	if err != nil {
		return nil, err
	}
	if pool, err = n.pool(name.pool, name.namespace); err != nil {
		return nil, err
	}
	back, err := clusterTurn(one, pool, name.image)
	if err != nil {
		return nil, err
	}
	giveBack = back
	opened, err := a.cluster.open(one, name, forChange)
	if err != nil {
		return nil, err
	}
	m = opened
	return m, one.wanted()
}

// lookup finds a snapshot; nil if there is none of that name.
func (a *Adapter) lookup(one *call, name imageName, id adapters.SnapshotID) (*found, error) {
	if err := checkName(id); err != nil {
		return nil, err
	}
	m, err := a.cluster.open(one, name, forReading)
	if err != nil {
		return nil, err
	}
	one.later(m.release)
	return m.find(id.Name)
}

// Snapshot looks a snapshot up.
func (a *Adapter) Snapshot(ctx context.Context, id adapters.SnapshotID) (adapters.Snapshot, error) {
	return callOn(ctx, a, id.Volume, "snapshot "+id.String(), func(one *call, name imageName) (adapters.Snapshot, error) {
		f, err := a.lookup(one, name, id)
		if err == nil && (f == nil || !f.mine) {
			err = notFound()
		}
		if err != nil {
			return adapters.Snapshot{}, err
		}
		return f.snapshot(name.id(a.backend)), nil
	})
}

// DeleteSnapshot removes a snapshot. One with clones goes to Ceph's trash, or is Busy where its clones keep it.
func (a *Adapter) DeleteSnapshot(ctx context.Context, id adapters.SnapshotID) error {
	_, err := callOn(ctx, a, id.Volume, "deleting the snapshot "+id.String(), func(one *call, name imageName) (none, error) {
		f, err := a.lookup(one, name, id)
		switch {
		case isAbsent(err):
			return none{}, nil
		case err != nil || f == nil:
			return none{}, err
		case !f.mine:
			return none{}, fault.Errorf(fault.Invalid, "it is not ours and stays")
		}
		m, err := a.change(one, name)
		if err != nil {
			return none{}, ignore(err)
		}
		if err := m.remove(f.number); err != nil {
			if errnoOf(err) == syscall.EBUSY {
				err = fault.Errorf(fault.Busy, "%w; it has clones or is protected: `rbd children` lists the clones, to be flattened or deleted first", err)
			}
			return none{}, err
		}
		return none{}, m.sweep(one, time.Now().Add(-draftAge))
	})
	return err
}

// Gate opens every image for a change, as CreateSnapshot does.
func (a *Adapter) Gate(ctx context.Context, ids []adapters.VolumeID) (adapters.Forecast, error) {
	for _, id := range ids {
		_, err := callOn(ctx, a, id, "", func(one *call, name imageName) (none, error) {
			began := time.Now()
			m, err := a.cluster.open(one, name, forChange)
			if err != nil {
				return none{}, err
			}
			one.later(m.release)
			full, err := m.connection.full()
			if err == nil && full != "" {
				err = fault.Errorf(fault.Exhausted, "the cluster is full (%s): a snapshot would stop the volume's writes; add OSDs or delete something", full)
			}
			a.pace.note(openShare * time.Since(began))
			return none{}, err
		})
		if err != nil {
			return adapters.Forecast{}, err
		}
	}
	return adapters.Forecast{Frozen: a.pace.forecast()}, nil
}

// openShare is how many times longer a snapshot takes than the opening of an image, at the most seen.
const openShare = 4

// pace remembers how long snapshots take.
type pace struct{ nanoseconds atomic.Int64 }

// note takes a time into account: the longest counts, and fades.
func (p *pace) note(d time.Duration) {
	old := p.nanoseconds.Load()
	p.nanoseconds.CompareAndSwap(old, max(int64(d), old*7/8))
}

func (p *pace) forecast() time.Duration { return time.Duration(p.nanoseconds.Load()) }

// full says why a cluster takes no writes; empty if it does.
func (n *connection) full() (string, error) {
	answer, _, err := n.rados.MonCommand([]byte(`{"prefix":"health"}`))
	if err != nil {
		return "", err
	}
	for _, check := range []string{"OSD_FULL", "POOL_FULL"} {
		if strings.Contains(string(answer), check) {
			return check, nil
		}
	}
	return "", nil
}
