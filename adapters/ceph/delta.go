//go:build ceph && cgo

package ceph

import (
	"context"
	"encoding/binary"
	"fmt"
	"time"

	"github.com/ceph/go-ceph/rbd"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/cbt"
	"stillpoint.io/stillpoint/fault"
)

// Allocated lists what a snapshot holds, its parent's data included where the image is a clone.
func (a *Adapter) Allocated(ctx context.Context, id adapters.SnapshotID, from int64) (cbt.Delta, error) {
	all, err := a.known(ctx, from, id)
	if err != nil {
		return cbt.Delta{}, err
	}
	k := all[0]
	return cbt.Delta{TargetSize: k.size, Granularity: 1, Confidence: cbt.Superset, Extents: func(yield func(cbt.Extent, error) bool) {
		d, err := a.openDiff(ctx, id, k, nil)
		if err != nil {
			yield(cbt.Extent{}, err)
			return
		}
		defer d.shut()
		forward(cbt.Check(d.held(ctx, from), from, k.size), yield)
	}}, nil
}

// Changed lists what differs between two snapshots of an image. Ceph can only look forward; where base is the younger,
// what changed from target to base is told, as data where target holds any.
func (a *Adapter) Changed(ctx context.Context, base, target adapters.SnapshotID, from int64) (cbt.Delta, error) {
	if base.Volume != target.Volume {
		return a.betweenVolumes(ctx, base, target, from)
	}
	all, err := a.known(ctx, from, target, base)
	if err != nil {
		return cbt.Delta{}, err
	}
	t, b := all[0], all[1]
	return cbt.Delta{BaseSize: b.size, TargetSize: t.size, Granularity: 1, Confidence: cbt.Superset, Extents: func(yield func(cbt.Extent, error) bool) {
		switch {
		case b.number < t.number:
			d, err := a.openDiff(ctx, target, t, &b)
			if err != nil {
				yield(cbt.Extent{}, err)
				return
			}
			defer d.shut()
			forward(cbt.Check(d.since(ctx, b, from), from, t.size), yield)
		case b.number > t.number:
			d, err := a.openDiff(ctx, target, t, nil)
			if err != nil {
				yield(cbt.Extent{}, err)
				return
			}
			defer d.shut()
			later, err := a.openDiff(ctx, base, b, &t)
			if err != nil {
				yield(cbt.Extent{}, err)
				return
			}
			defer later.shut()
			forward(cbt.Check(backwards(later.since(ctx, t, from), d.held(ctx, from), from, b.size, t.size), from, t.size), yield)
		}
	}}, nil
}

// betweenVolumes compares where the two ids differ: they may still mean one volume.
func (a *Adapter) betweenVolumes(ctx context.Context, base, target adapters.SnapshotID, from int64) (cbt.Delta, error) {
	t, err := a.Volume(ctx, target.Volume)
	if err != nil {
		return cbt.Delta{}, err
	}
	b, err := a.Volume(ctx, base.Volume)
	if err != nil {
		return cbt.Delta{}, err
	}
	if b.ID != t.ID {
		return cbt.Delta{}, fault.Errorf(fault.Invalid, "snapshots %s and %s are of two volumes", base, target)
	}
	base.Volume, target.Volume = b.ID, t.ID
	return a.Changed(ctx, base, target, from)
}

// backwards turns the changes from target to a younger base into those from base to target: what changed is data where
// target holds something, and zeros elsewhere. What base has not is in it too.
func backwards(changes, held cbt.Seq, from, baseSize, targetSize int64) cbt.Seq {
	var beyond cbt.Seq = cbt.Of()
	if start := max(from, baseSize); start < targetSize {
		beyond = cbt.Of(cbt.Extent{Offset: start, Length: targetSize - start})
	}
	touched := cbt.Merge(cbt.Clip(asKind(changes, false), from, min(baseSize, targetSize)), beyond)
	return cbt.Merge(cbt.Intersect(touched, held), asKind(cbt.Subtract(touched, held), true))
}

// asKind gives all extents one kind.
func asKind(s cbt.Seq, zero bool) cbt.Seq {
	return func(yield func(cbt.Extent, error) bool) {
		for e, err := range s {
			if err == nil {
				e.Zero = zero
			}
			if !yield(e, err) {
				return
			}
		}
	}
}

func forward(s cbt.Seq, yield func(cbt.Extent, error) bool) {
	for e, err := range s {
		if !yield(e, err) {
			return
		}
	}
}

// known looks snapshots of ours of one volume up, and checks that an offset is within the first of them.
func (a *Adapter) known(ctx context.Context, from int64, ids ...adapters.SnapshotID) ([]found, error) {
	all, err := callOn(ctx, a, ids[0].Volume, "", func(one *call, name imageName) (all []found, err error) {
		m, err := a.cluster.open(one, name, forReading)
		if err != nil {
			return nil, err
		}
		one.later(m.release)
		for _, id := range ids {
			err := checkName(id)
			var f *found
			if err == nil {
				f, err = m.find(id.Name)
			}
			if err == nil && (f == nil || !f.mine) {
				err = notFound()
			}
			if err != nil {
				return nil, fmt.Errorf("snapshot %s: %w", id.Name, err)
			}
			all = append(all, *f)
		}
		return all, nil
	})
	if err == nil && (from < 0 || from > all[0].size) {
		err = fault.Errorf(fault.Invalid, "snapshot %s: the offset %d is not within its %d bytes", ids[0], from, all[0].size)
	}
	return all, err
}

// diff is an image opened at the snapshot that is a delta's later end.
type diff struct {
	*image
	what    string // for errors
	number  snapshotNumber
	size    int64
	objects int64 // bytes of one
	flat    bool  // objects follow each other as the image's bytes do
	exact   bool  // do not believe object maps
	trust   bool  // believe them over a shrink too
	// How many bytes the image has, and had at a base, from its parent where it has no object of its own.
	now, before int64
}

// openDiff opens a snapshot, as long as it still has the number that was looked up. With a base, it also notes what the
// image had from its parent then.
func (a *Adapter) openDiff(ctx context.Context, id adapters.SnapshotID, at found, base *found) (*diff, error) {
	what := "changed blocks of the snapshot " + id.String()
	return callOn(ctx, a, id.Volume, what, func(one *call, name imageName) (*diff, error) {
		m, err := a.cluster.open(one, name, forReading)
		if err != nil {
			return nil, err
		}
		one.onAbandon(m.release)
		d := &diff{image: m, what: what, number: at.number, size: at.size, exact: a.exact, trust: a.keepTwoLevel}
		if base != nil {
			if err := m.rbd.SetSnapByID(uint64(base.number)); err != nil {
				return nil, fmt.Errorf("snapshot %s: %w", base.name, err)
			}
			if d.before, err = m.overlap(); err != nil {
				return nil, err
			}
		}
		if err := m.rbd.SetSnapByID(uint64(at.number)); err != nil {
			return nil, err
		}
		return d, d.layout()
	})
}

// layout reads how the image is cut into objects, and what it has from a parent.
func (d *diff) layout() error {
	info, err := d.rbd.Stat()
	if err != nil {
		return err
	}
	unit, err := d.rbd.GetStripeUnit()
	if err != nil {
		return err
	}
	count, err := d.rbd.GetStripeCount()
	if err != nil {
		return err
	}
	d.objects, d.flat = int64(info.Obj_size), unit == info.Obj_size && count == 1
	d.now, err = d.overlap()
	return err
}

// diffCall makes a call for a delta and gives its error a kind and a name.
func diffCall[T any](ctx context.Context, d *diff, f func(*call) (T, error)) (T, error) {
	began := time.Now()
	v, err := using(ctx, d.image, f)
	if err != nil {
		err = d.connection.failure(err, began, "%s", d.what)
	}
	return v, err
}

// since lists what changed since an earlier snapshot, from an offset on.
func (d *diff) since(ctx context.Context, base found, from int64) cbt.Seq {
	return func(yield func(cbt.Extent, error) bool) {
		set, err := d.changedObjects(ctx, base)
		if err != nil {
			yield(cbt.Extent{}, err)
			return
		}
		all := d.ask(ctx, base.name, set, from)
		if grown := max(from, base.size); grown < d.size { // what is not written there reads as zeros
			all = cbt.Merge(all, cbt.Of(cbt.Extent{Offset: grown, Length: d.size - grown, Zero: true}))
		}
		// What a clone had from its parent and has no more: because it shrank in between, which lets the parent go there for
		// ever, or because it was flattened. Neither way of asking Ceph tells.
		if start, end := max(from, d.now), min(d.before, d.size); start < end {
			all = cbt.Merge(all, cbt.Fill(cbt.Clip(d.held(ctx, start), start, end), start, end))
		}
		forward(all, yield)
	}
}

// overlap is how many bytes of an image, at the snapshot it is opened at, are its parent's where it has no object.
func (m *image) overlap() (int64, error) {
	n, err := m.rbd.GetOverlap()
	return int64(n), ignore(err)
}

// changedObjects is the set of the objects to be asked about: nil for all of them.
func (d *diff) changedObjects(ctx context.Context, base found) (objectSet, error) {
	if d.exact || !d.flat {
		return nil, nil
	}
	return diffCall(ctx, d, func(one *call) (objectSet, error) {
		all, err := d.numbers()
		if err != nil {
			return nil, err
		}
		var c changes
		var sizes []int64
		for _, s := range all {
			if n := snapshotNumber(s.Id); n < base.number || n > d.number {
				continue
			}
			sizes = append(sizes, int64(s.Size))
			if shrank(sizes) && !d.trust {
				return nil, nil
			}
			if err := one.wanted(); err != nil {
				return nil, err
			}
			m, ok, err := d.objectMap(snapshotNumber(s.Id), int64(s.Size))
			if err != nil || !ok {
				return nil, err
			}
			c.step(m)
		}
		return c.changed(), nil
	})
}

// Flags of an image at a snapshot. Source: src/include/rbd/librbd.h.
const (
	flagObjectMapInvalid = 1 << 0
	flagFastDiffInvalid  = 1 << 1
)

// objectMap reads the object map of a snapshot. ok is false if there is none, or Ceph says that it is not valid.
func (d *diff) objectMap(n snapshotNumber, size int64) (m objectMap, ok bool, err error) {
	features, err := d.rbd.GetFeatures()
	if err != nil || features&rbd.FeatureFastDiff == 0 || features&rbd.FeatureObjectMap == 0 {
		return m, false, err
	}
	number := binary.LittleEndian.AppendUint64(nil, uint64(n))
	flags, err := d.method(headerObject+d.id, "get_flags", number)
	if err != nil || len(flags) < 8 || binary.LittleEndian.Uint64(flags)&(flagObjectMapInvalid|flagFastDiffInvalid) != 0 {
		return m, false, err
	}
	b, err := d.method(fmt.Sprintf("rbd_object_map.%s.%016x", d.id, uint64(n)), "object_map_load", nil)
	if err != nil {
		return m, false, ignore(err)
	}
	if m, err = decodeObjectMap(b); err != nil {
		return m, false, fault.Errorf(fault.Corrupt, "%w; `rbd object-map check` tells more", err)
	}
	return m, m.objects == (size+d.objects-1)/d.objects, nil
}

// held lists what the snapshot holds, from an offset on: its own objects, and where it has none its parent's data.
func (d *diff) held(ctx context.Context, from int64) cbt.Seq {
	return func(yield func(cbt.Extent, error) bool) {
		set, err := d.ownObjects(ctx)
		if err != nil {
			yield(cbt.Extent{}, err)
			return
		}
		own := dropZeros(d.ask(ctx, rbd.NoSnapshot, set, from))
		parent, err := d.parent(ctx)
		if err != nil {
			yield(cbt.Extent{}, err)
			return
		}
		if parent == nil {
			forward(own, yield)
			return
		}
		defer parent.shut()
		theirs := cbt.Clip(parent.held(ctx, min(from, parent.size)), from, min(d.now, d.size))
		if set != nil { // an object hides the parent's data, also where it holds nothing itself
			theirs = cbt.Subtract(theirs, set.extents(d.objects, d.size))
		}
		forward(cbt.Merge(own, theirs), yield)
	}
}

// dropZeros leaves out what is known to be zero.
func dropZeros(s cbt.Seq) cbt.Seq {
	return func(yield func(cbt.Extent, error) bool) {
		for e, err := range s {
			if (err != nil || !e.Zero) && !yield(e, err) {
				return
			}
		}
	}
}

// ownObjects is the set of the objects that the snapshot has: nil if that is not known.
func (d *diff) ownObjects(ctx context.Context) (objectSet, error) {
	if d.exact || !d.flat {
		return nil, nil
	}
	return diffCall(ctx, d, func(*call) (objectSet, error) {
		m, ok, err := d.objectMap(d.number, d.size)
		if err != nil || !ok {
			return nil, err
		}
		return m.existing(), nil
	})
}

// parent opens the snapshot that this one is a clone of, wherever it is by now; nil if it is none.
func (d *diff) parent(ctx context.Context) (*diff, error) {
	if d.now == 0 {
		return nil, nil
	}
	return diffCall(ctx, d, func(one *call) (*diff, error) {
		m, number, err := d.openParent()
		if err != nil || m == nil {
			return nil, err
		}
		one.onAbandon(m.release)
		size, err := m.rbd.GetSize()
		if err != nil {
			return nil, err
		}
		p := &diff{image: m, what: d.what, number: number, size: int64(size), exact: d.exact}
		return p, p.layout()
	})
}
