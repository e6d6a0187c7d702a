package lvmthin

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"slices"
	"time"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

// CreateSnapshot makes a thin snapshot, with one command of LVM's: whatever else it must know it takes from the last
// report, which is still true as long as the group's fingerprint is. Requests for volumes of one group that come while
// another is under way are made together.
func (a *Adapter) CreateSnapshot(ctx context.Context, id adapters.VolumeID, wanted string) (adapters.Snapshot, error) {
	if err := checkWanted(id, wanted); err != nil {
		return adapters.Snapshot{}, err
	}
	for {
		p, err := a.locate(ctx, id)
		if err != nil {
			return adapters.Snapshot{}, err
		}
		l, err := p.volume()
		if err != nil {
			return adapters.Snapshot{}, err
		}
		if s := p.group.logical[snapshotVolume(l.name, adapters.Name(wanted))]; s != nil {
			return a.existing(p, s, wanted)
		}
		if err := a.ready(ctx, p, l); err != nil {
			return adapters.Snapshot{}, err
		}
		r := record{of: l.name, wanted: wanted, mark: adapters.Cutting, created: time.Now().UTC()}
		err = a.batches.create(ctx, p, l, r)
		switch {
		case err == nil && a.sizeNow(p, l) == l.size:
			return a.snapshot(p, r, l.size), nil
		case err == nil: // resized since the report: the snapshot has one size or the other
			_, s, r, err := a.lookup(ctx, adapters.SnapshotID{Volume: p.id, Name: adapters.Name(wanted)})
			if err != nil {
				return adapters.Snapshot{}, err
			}
			return a.found(p, s, r), nil
		case !errors.Is(err, errTaken):
			return adapters.Snapshot{}, err
		}
		// Somebody else was faster: theirs is the snapshot. If it is gone again, make another.
	}
}

// sizeNow is the size of a volume by its device, which shows a change first; by the report, if it is not active.
func (a *Adapter) sizeNow(p place, l *logical) int64 {
	d, err := a.mapper.find(mapperUUID(p.group.id, l.id, ""))
	if err != nil || d == nil {
		return l.size
	}
	size, err := sizeOf(d.device)
	if err != nil {
		return -1
	}
	return size
}

// existing is what CreateSnapshot answers where the name is taken.
func (a *Adapter) existing(p place, s *logical, wanted string) (adapters.Snapshot, error) {
	r, ours := p.ours(s)
	switch {
	case !ours:
		return adapters.Snapshot{}, fault.Errorf(fault.Busy, "volume %s: the name %s is taken by the logical volume %s, which is not ours; choose another", p.id, adapters.Name(wanted), s.name)
	case r.wanted != wanted:
		return adapters.Snapshot{}, fault.Errorf(fault.Busy, "volume %s: the name %s is taken by the snapshot %q; choose another", p.id, adapters.Name(wanted), r.wanted)
	}
	return a.found(p, s, r), nil
}

// ours is the record of a logical volume, if that is a snapshot of the place's volume.
func (p place) ours(s *logical) (record, bool) {
	r, ours := readRecord(s.tags)
	return r, ours && r.of == p.name && s.kind == thinVolume && s.name == snapshotVolume(r.of, adapters.Name(r.wanted))
}

// snapshot is what callers see of a snapshot.
func (a *Adapter) snapshot(p place, r record, size int64) adapters.Snapshot {
	return adapters.Snapshot{
		ID:      adapters.SnapshotID{Volume: a.canonical(p.group, r.of), Name: adapters.Name(r.wanted)},
		Wanted:  r.wanted,
		Size:    size,
		Created: r.created,
		State:   adapters.Ready,
		Mark:    r.mark,
		Notes:   r.notes,
	}
}

// found is that of a logical volume. One that somebody made writable is Failed: it may not be the point in time any
// more.
func (a *Adapter) found(p place, s *logical, r record) adapters.Snapshot {
	v := a.snapshot(p, r, s.size)
	if !s.readOnly {
		v.State = adapters.Failed
	}
	return v
}

// lookup finds a snapshot of ours.
func (a *Adapter) lookup(ctx context.Context, id adapters.SnapshotID) (place, *logical, record, error) {
	p, s, err := a.lookupAny(ctx, id)
	if err != nil {
		return p, nil, record{}, err
	}
	if s != nil {
		if r, ours := p.ours(s); ours {
			return p, s, r, nil
		}
	}
	return p, nil, record{}, fault.Errorf(fault.NotFound, "snapshot %s: there is none of ours", id)
}

// lookupAny finds the logical volume that has the name of a snapshot; nil if there is none.
func (a *Adapter) lookupAny(ctx context.Context, id adapters.SnapshotID) (place, *logical, error) {
	if id.Name == "" || adapters.Name(id.Name) != id.Name {
		return place{}, nil, fault.Errorf(fault.Invalid, "snapshot %s: %q is not a snapshot's name: at most %d of [a-z0-9-]", id, id.Name, adapters.NameMax)
	}
	p, err := a.locate(ctx, id.Volume)
	if err != nil {
		return p, nil, fmt.Errorf("snapshot %s: %w", id, err)
	}
	return p, p.group.logical[snapshotVolume(p.name, id.Name)], nil
}

// Snapshot looks a snapshot up.
func (a *Adapter) Snapshot(ctx context.Context, id adapters.SnapshotID) (adapters.Snapshot, error) {
	p, s, r, err := a.lookup(ctx, id)
	if err != nil {
		return adapters.Snapshot{}, err
	}
	return a.found(p, s, r), nil
}

// Publish changes the tags, in one step. LVM writes its metadata past all caches before it answers, and the pool has
// committed the snapshot before that.
func (a *Adapter) Publish(ctx context.Context, id adapters.SnapshotID, notes adapters.Notes) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	p, err := a.locate(ctx, id.Volume)
	if err != nil {
		return fmt.Errorf("snapshot %s: %w", id, err)
	}
	release, err := a.state.exclusive(ctx, "tags-"+string(p.group.id)) // two publishers would leave the tags of both
	if err != nil {
		return failed(err, "publishing the snapshot %s", id)
	}
	defer release()
	p, s, _, err := a.lookup(ctx, id)
	if err != nil {
		return err
	}
	remove, add, err := published(s.tags, notes)
	if err != nil {
		return fmt.Errorf("publishing the snapshot %s: %w", id, err)
	}
	if len(remove)+len(add) == 0 {
		return nil
	}
	if err := a.changeTags(ctx, p.group, s, remove, add); err != nil {
		return fmt.Errorf("publishing the snapshot %s: %w", id, err)
	}
	return nil
}

// changeTags changes tags of the very volume that was looked at, and what other options say. (LVM selects none if it is not there any more, and
// says nothing: a later look will.)
func (a *Adapter) changeTags(ctx context.Context, g *group, l *logical, remove, add []string, options ...string) error {
	args := append([]string{"lvchange", "-q", "-y"}, options...)
	for _, t := range remove {
		args = append(args, "--deltag", t)
	}
	for _, t := range add {
		args = append(args, "--addtag", t)
	}
	args = append(args, "--select", "lv_uuid="+l.id, g.name)
	_, err := a.change(ctx, g, task{args: args})
	return err
}

// DeleteSnapshot removes a snapshot. One that is being read is Busy.
func (a *Adapter) DeleteSnapshot(ctx context.Context, id adapters.SnapshotID) error {
	p, s, err := a.lookupAny(ctx, id)
	if err != nil || s == nil {
		return err
	}
	if _, ours := p.ours(s); !ours {
		return fault.Errorf(fault.Invalid, "deleting the snapshot %s: the logical volume %s/%s is not ours and stays", id, p.group.name, s.name)
	}
	if err := a.remove(ctx, p.group, s); err != nil {
		return fmt.Errorf("deleting the snapshot %s: %w", id, err)
	}
	return nil
}

// remove removes the very volume that was looked at, unless it is in use.
func (a *Adapter) remove(ctx context.Context, g *group, l *logical) error {
	_, err := a.change(ctx, g, task{
		args:   []string{"lvremove", "-q", "-y", "-f", "--select", "lv_uuid=" + l.id, g.name},
		intent: a.intent(g, l),
	})
	return err
}

// Snapshots lists the snapshots of one volume, or of all groups. A group that could not be read does not hide the
// others: its error comes last.
func (a *Adapter) Snapshots(ctx context.Context, f adapters.Filter) iter.Seq2[adapters.Snapshot, error] {
	return func(yield func(adapters.Snapshot, error) bool) {
		var groups []*group
		var err error
		name := ""
		if f.Volume != (adapters.VolumeID{}) {
			var p place
			if p, err = a.locate(ctx, f.Volume); err == nil {
				groups, name = []*group{p.group}, p.name
			}
		} else if err = ctx.Err(); err == nil {
			groups, err = a.discover(ctx)
		}
		for _, g := range groups {
			for _, lv := range slices.Sorted(maps.Keys(g.logical)) {
				s := g.logical[lv]
				r, ours := readRecord(s.tags)
				p := place{id: a.canonical(g, r.of), group: g, name: r.of}
				if !ours || name != "" && r.of != name || r.mark == adapters.Cutting && !f.Cutting {
					continue
				}
				if r, ours = p.ours(s); ours && !yield(a.found(p, s, r), nil) {
					return
				}
			}
		}
		if err != nil {
			yield(adapters.Snapshot{}, fmt.Errorf("listing snapshots: %w", err))
		}
	}
}
