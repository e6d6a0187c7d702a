package lvmthin

import (
	"context"
	"fmt"
	"iter"
	"maps"
	"slices"
	"strings"
	"time"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

// place is where an id leads: a group as LVM reports it now, and the name of a volume in it, which need not exist.
type place struct {
	id    adapters.VolumeID // canonical
	group *group
	name  string
}

// canonical is the id of a volume of a group.
func (a *Adapter) canonical(g *group, name string) adapters.VolumeID {
	return adapters.VolumeID{Backend: a.backend, ID: string(g.id) + "/" + name}
}

// locate finds the group of an id, with a fresh report of it. A group that is not here is Unavailable: its disks may
// only be unplugged.
func (a *Adapter) locate(ctx context.Context, id adapters.VolumeID) (place, error) {
	at, err := a.parseID(id)
	if err != nil {
		return place{}, err
	}
	if err := ctx.Err(); err != nil {
		return place{}, err
	}
	if g := a.remembered(at); g != nil {
		if g, err := a.report(ctx, g); err != nil || g != nil && at.matches(g) {
			if err != nil {
				return place{}, fmt.Errorf("volume %s: %w", id, err)
			}
			return place{id: a.canonical(g, at.volume), group: g, name: at.volume}, healthy(id, g)
		}
	}
	groups, err := a.discover(ctx)
	var found []*group
	for _, g := range groups {
		if at.matches(g) && (at.group != "" || g.logical[at.volume] != nil) {
			found = append(found, g)
		}
	}
	switch {
	case len(found) == 0 && err != nil:
		return place{}, fmt.Errorf("volume %s: %w", id, err)
	case len(found) == 0:
		return place{}, missing(id, at, groups)
	case len(found) > 1:
		return place{}, fault.Errorf(fault.Invalid, "volume %s: %d volume groups of this node could be meant; write the group's UUID instead (vgs -o name,uuid)", id, len(found))
	}
	return place{id: a.canonical(found[0], at.volume), group: found[0], name: at.volume}, healthy(id, found[0])
}

// matches reports whether a group can be the one that is meant.
func (at address) matches(g *group) bool {
	switch {
	case at.isUUID:
		return string(g.id) == at.group
	case at.group != "":
		return g.name == at.group
	}
	return true
}

// missing is the error for a group that is not there, with what was probably meant.
func missing(id adapters.VolumeID, at address, groups []*group) error {
	var names []string
	for _, g := range groups {
		names = append(names, g.name)
	}
	switch {
	case at.group == "":
		return fault.Errorf(fault.NotFound, "volume %s: no volume group of this node has a volume %s", id, at.volume)
	case at.isUUID:
		return fault.Errorf(fault.Unavailable, "volume %s: the volume group with that UUID is not on this node now", id)
	case adapters.Nearest(at.group, names) != "":
		return fault.Errorf(fault.Unavailable, "volume %s: there is no volume group %s on this node now; did you mean %s?", id, at.group, adapters.Nearest(at.group, names))
	}
	slices.Sort(names)
	return fault.Errorf(fault.Unavailable, "volume %s: there is no volume group %s on this node now; there is %s", id, at.group, strings.Join(names, ", "))
}

// healthy refuses groups that LVM does not work with.
func healthy(id adapters.VolumeID, g *group) error {
	switch {
	case g.exported:
		return fault.Errorf(fault.Unavailable, "volume %s: the volume group %s is exported; vgimport %s brings it back", id, g.name, g.name)
	case g.partial:
		return fault.Errorf(fault.Unavailable, "volume %s: the volume group %s lacks a physical volume (vgs -o +pv_missing); plug it in", id, g.name)
	}
	return nil
}

// remembered is the group of an id as it was last seen.
func (a *Adapter) remembered(at address) *group {
	if at.group == "" {
		return nil
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, g := range a.known {
		if at.matches(g) && !g.duplicates {
			return g
		}
	}
	return nil
}

func (a *Adapter) remember(groups ...*group) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, g := range groups {
		a.known[g.id] = g
	}
}

// report is a group that was seen before, as it is now; nil if it is not there any more, or not whole: then it must be
// looked for everywhere. LVM is asked, about the group's physical volumes only, if its metadata have changed.
func (a *Adapter) report(ctx context.Context, known *group) (*group, error) {
	turn := "report-" + string(known.id) // who waits here finds the report of who did not
	if err := a.turns.take(ctx, turn); err != nil {
		return nil, err
	}
	defer a.turns.give(turn)
	if now := a.remembered(address{group: string(known.id), isUUID: true}); now != nil {
		known = now
	}
	before, wrong := fingerprint(known.devices)
	if wrong == nil && before == known.print {
		return known, nil
	}
	c, err := a.lvm.run(ctx, task{args: append(slices.Clone(reportArgs), known.name), devices: known.devices})
	if err != nil && c == nil {
		return nil, err
	}
	if err == nil {
		groups, err := parseReport(c.stdout)
		if err != nil {
			return nil, err
		}
		if len(groups) == 1 && groups[0].id == known.id && !groups[0].partial {
			if wrong == nil && slices.Equal(groups[0].devices, known.devices) {
				groups[0].print = before
			}
			a.remember(groups[0])
			return groups[0], nil
		}
	} else if fault.KindOf(err) == fault.Busy {
		return nil, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.known, known.id)
	return nil, ctx.Err()
}

// discover asks LVM about all groups that it sees, or those that the backend is limited to. Groups that it could not
// read, because they are locked, are missing, and the error says why.
func (a *Adapter) discover(ctx context.Context) ([]*group, error) {
	var devices []string
	if a.lvm.devices != nil {
		devices = a.lvm.devices
	}
	c, err := a.lvm.run(ctx, task{args: append(slices.Clone(reportArgs), a.groups...), devices: devices})
	if c == nil {
		return nil, err
	}
	groups, wrong := parseReport(c.stdout)
	if wrong != nil && err == nil {
		err = wrong
	}
	if fault.KindOf(err) == fault.Unavailable && ctx.Err() == nil {
		err = nil // one of the groups that were asked for is not there
	}
	for _, g := range groups {
		if !g.duplicates {
			a.remember(g)
		}
	}
	return groups, err
}

// volume is the logical volume of a place, if it is one that can be snapshotted.
func (p place) volume() (*logical, error) {
	l := p.group.logical[p.name]
	switch {
	case l == nil || l.hidden || unfinished(l):
		return nil, fault.Errorf(fault.NotFound, "volume %s: the volume group %s has no logical volume %s", p.id, p.group.name, p.name)
	case l.kind == thinPool:
		return nil, fault.Errorf(fault.Unsupported, "volume %s: it is a thin pool; the thin volumes in it can be snapshotted (lvs %s)", p.id, p.group.name)
	case l.kind != thinVolume:
		return nil, fault.Errorf(fault.Unsupported, "volume %s: it is not a thin volume but %s; lvconvert --type thin makes it one", p.id, l.kind)
	}
	if _, ours := readRecord(l.tags); ours {
		return nil, fault.Errorf(fault.Unsupported, "volume %s: it is a snapshot of ours, and there are no snapshots of snapshots; restore it into a volume first", p.id)
	}
	if _, ours := single(l.tags, tagScratch); ours {
		return nil, fault.Errorf(fault.NotFound, "volume %s: it was made to try something, and is no volume", p.id)
	}
	return l, nil
}

// unfinished reports whether a volume is the target of a restore that is not committed.
func unfinished(l *logical) bool {
	_, ours := join(l.tags, tagRestore)
	return ours && strings.HasPrefix(l.name, restorePrefix)
}

// Volume looks a volume up. Its device is that of device-mapper, 0 if the volume is not active. The first call of a
// boot tries out how this kernel's snapshots get along with frozen filesystems, which takes seconds (freeze.go).
func (a *Adapter) Volume(ctx context.Context, id adapters.VolumeID) (adapters.Volume, error) {
	p, err := a.locate(ctx, id)
	if err != nil {
		return adapters.Volume{}, err
	}
	l, err := p.volume()
	if err != nil {
		return adapters.Volume{}, err
	}
	return a.describe(ctx, p, l)
}

func (a *Adapter) describe(ctx context.Context, p place, l *logical) (adapters.Volume, error) {
	a.tidy(ctx, p.group)
	v := adapters.Volume{ID: p.id, Size: l.size}
	d, err := a.mapper.find(mapperUUID(p.group.id, l.id, ""))
	if err != nil {
		return adapters.Volume{}, failed(err, "volume %s", p.id)
	}
	if d != nil {
		v.Device, v.Path = d.device, "/dev/"+p.group.name+"/"+l.name
	}
	v.Freeze, err = a.freezeMode(ctx, p.group, l)
	if err != nil {
		return adapters.Volume{}, fmt.Errorf("volume %s: %w", p.id, err)
	}
	return v, nil
}

// Volumes lists the active thin volumes of this node's groups. A group that is not whole is passed over.
func (a *Adapter) Volumes(ctx context.Context) iter.Seq2[adapters.Volume, error] {
	return func(yield func(adapters.Volume, error) bool) {
		if err := ctx.Err(); err != nil {
			yield(adapters.Volume{}, err)
			return
		}
		groups, err := a.discover(ctx)
		for _, g := range groups {
			for _, name := range slices.Sorted(maps.Keys(g.logical)) {
				p := place{id: a.canonical(g, name), group: g, name: name}
				l, wrong := p.volume()
				if wrong != nil || healthy(p.id, g) != nil || checkVolumeName(name) != nil {
					continue
				}
				v, wrong := a.describe(ctx, p, l)
				if wrong == nil && v.Device == 0 {
					continue
				}
				if !yield(v, wrong) || wrong != nil {
					return
				}
			}
		}
		if err != nil {
			yield(adapters.Volume{}, fmt.Errorf("listing volumes: %w", err))
		}
	}
}

// Gate asks for every volume: is it there, is its pool active, healthy and not too full. It waits until no program is at
// work any more that an earlier call left, perhaps one of a process that is dead: who looks for leftovers after Gate sees
// all that there will be. It says how long the snapshots will take, from what they took before.
func (a *Adapter) Gate(ctx context.Context, ids []adapters.VolumeID) (adapters.Forecast, error) {
	if err := a.sweepFailure(); err != nil {
		return adapters.Forecast{}, err
	}
	groups := map[groupID]int{}
	for _, id := range ids {
		p, err := a.locate(ctx, id)
		if err != nil {
			return adapters.Forecast{}, err
		}
		l, err := p.volume()
		if err != nil {
			return adapters.Forecast{}, err
		}
		a.tidy(ctx, p.group)
		if groups[p.group.id]++; groups[p.group.id] == 1 {
			if err := a.quiet(ctx, p.group); err != nil {
				return adapters.Forecast{}, fmt.Errorf("volume %s: %w", p.id, err)
			}
		}
		if err := a.ready(ctx, p, l); err != nil {
			return adapters.Forecast{}, err
		}
	}
	var forecast adapters.Forecast
	for _, n := range groups {
		forecast.Frozen = max(forecast.Frozen, a.batches.forecast(n))
	}
	return forecast, nil
}

// suspendPatience is how long a suspended volume is waited for: LVM's programs suspend one for a moment.
const suspendPatience = 5 * time.Second

// ready decides whether a volume can be snapshotted now, as far as the kernel knows.
func (a *Adapter) ready(ctx context.Context, p place, l *logical) error {
	pool, _, err := p.group.poolOf(l)
	if err != nil {
		return fault.Errorf(fault.KindOf(err), "volume %s: %w", p.id, err)
	}
	status, err := a.mapper.poolStatus(pool)
	if err == nil {
		err = status.room(pool, a.limits)
	}
	if err != nil {
		return failed(err, "volume %s", p.id)
	}
	limited, cancel := context.WithTimeout(ctx, suspendPatience)
	defer cancel()
	var d *mapped
	err = poll(limited, pollStep, func() (still bool, err error) {
		d, err = a.mapper.find(mapperUUID(p.group.id, l.id, ""))
		return d == nil || !d.suspended, err
	})
	if d != nil && d.suspended && ctx.Err() == nil {
		err = fault.Errorf(fault.Busy, "its device %s is suspended, by a program of LVM's at work or one that died: dmsetup resume %s, if none is", d.name, d.name)
	}
	if err != nil {
		return failed(err, "volume %s", p.id)
	}
	return nil
}
