package lvmthin

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

// tagOrigin is on a volume that was made for somebody: an Origin in JSON.
const tagOrigin = tagPrefix + "origin."

// originTags are the tags of a volume that was made for somebody; none for one that was not.
func originTags(o adapters.Origin) ([]string, error) {
	if o.Name == "" {
		return nil, nil
	}
	b, err := json.Marshal(o)
	return split(tagOrigin, string(b)), err
}

// readOrigin reads the tags of a logical volume; false if it was not made for anybody.
func readOrigin(tags []string) (adapters.Origin, bool) {
	text, ok := join(tags, tagOrigin)
	var o adapters.Origin
	return o, ok && json.Unmarshal([]byte(text), &o) == nil && o.Name != ""
}

// newVolume is the name of a new volume: what adapters in general call it, where LVM has that name for its users and it cannot
// be taken for one of our own volumes.
func newVolume(wanted string) string {
	name := adapters.VolumeName(wanted)
	if checkVolumeName(name) != nil || strings.HasPrefix(name, snapshotPrefix) {
		return "v" + adapters.ShortName(wanted)
	}
	return name
}

// Place is in the only volume group that the backend is limited to or, without a limit, the only one that has a thin pool.
func (a *Adapter) Place(ctx context.Context, wanted string) (adapters.VolumeID, error) {
	groups, err := a.discover(ctx)
	if err != nil {
		return adapters.VolumeID{}, fmt.Errorf("backend %s: looking for the place of a new volume: %w", a.backend, err)
	}
	var fit []*group
	for _, g := range groups {
		for _, l := range g.logical {
			if l.kind == thinPool && (a.pool == "" || a.pool == l.name) {
				fit = append(fit, g)
				break
			}
		}
	}
	if len(fit) != 1 {
		return adapters.VolumeID{}, fault.Errorf(fault.Unsupported, "backend %s: %d volume groups have a thin pool for new volumes; limit the backend to one with the parameter groups, and to a pool with the parameter pool", a.backend, len(fit))
	}
	return a.canonical(fit[0], newVolume(wanted)), nil
}

// made is a volume that was made for somebody.
type made struct {
	place
	volume *logical
	origin adapters.Origin
}

func (a *Adapter) made(ctx context.Context, id adapters.VolumeID) (made, error) {
	p, err := a.locate(ctx, id)
	if err != nil {
		return made{}, err
	}
	l, err := p.volume()
	if err != nil {
		return made{}, err
	}
	o, ok := readOrigin(l.tags)
	if !ok {
		return made{}, fault.Errorf(fault.Invalid, "volume %s was not made by Stillpoint, and is left alone", p.id)
	}
	return made{p, l, o}, nil
}

// Origin tells for whom a volume was made.
func (a *Adapter) Origin(ctx context.Context, id adapters.VolumeID) (adapters.Origin, error) {
	v, err := a.made(ctx, id)
	return v.origin, err
}

// changing calls do with a volume that was made for somebody, when no other process of ours is at it.
func (a *Adapter) changing(ctx context.Context, id adapters.VolumeID, do func(v made) error) error {
	v, err := a.made(ctx, id)
	if err != nil {
		return err
	}
	release, err := a.state.exclusive(ctx, "volume-"+string(v.group.id)+"."+v.volume.id)
	if err != nil {
		return err
	}
	defer release()
	if v, err = a.made(ctx, id); err != nil { // as it is now
		return err
	}
	if err := do(v); err != nil {
		return failed(err, "volume %s", v.id)
	}
	return nil
}

// Grow extends the volume, by whole extents of its group. A filesystem on it is suspended for a moment.
func (a *Adapter) Grow(ctx context.Context, id adapters.VolumeID, size int64) (adapters.Volume, error) {
	err := a.changing(ctx, id, func(v made) error {
		extent := v.group.extent
		size = (size + extent - 1) / extent * extent
		if v.volume.size >= size {
			return nil
		}
		_, err := a.change(ctx, v.group, task{
			args:   []string{"lvextend", "-q", "-y", "-L", bytesOf(size), v.group.name + "/" + v.volume.name},
			intent: a.intent(v.group, v.volume),
		})
		return err
	})
	if err != nil {
		return adapters.Volume{}, err
	}
	return a.Volume(ctx, id)
}

// Attach activates the volume.
func (a *Adapter) Attach(ctx context.Context, id adapters.VolumeID) (node string, err error) {
	err = a.changing(ctx, id, func(v made) error {
		node = "/dev/mapper/" + mapperName(v.group.name, v.volume.name)
		d, err := a.mapper.find(v.uuid())
		if err != nil || d != nil {
			return err
		}
		return a.switchTo(ctx, "-ay", v.group, v.volume)
	})
	return node, err
}

func (v made) uuid() string { return mapperUUID(v.group.id, v.volume.id, "") }

// Detach deactivates the volume.
func (a *Adapter) Detach(ctx context.Context, id adapters.VolumeID) error {
	err := a.changing(ctx, id, func(v made) error {
		d, err := a.mapper.find(v.uuid())
		switch {
		case err != nil || d == nil:
			return err
		case d.users > 0:
			return inUse(d, d.users)
		}
		return a.switchTo(ctx, "-an", v.group, v.volume)
	})
	if fault.KindOf(err) == fault.NotFound {
		return nil
	}
	return err
}

// DeleteVolume removes the volume, if it is not active. Its snapshots stay: they have all that they share with it.
func (a *Adapter) DeleteVolume(ctx context.Context, id adapters.VolumeID) error {
	err := a.changing(ctx, id, func(v made) error {
		d, err := a.mapper.find(v.uuid())
		switch {
		case err != nil:
			return err
		case d != nil:
			return fault.Errorf(fault.Busy, "it is active, and may be in use; unstage it first (lvchange -an %s/%s)", v.group.name, v.volume.name)
		}
		return a.remove(ctx, v.group, v.volume)
	})
	if fault.KindOf(err) == fault.NotFound {
		return nil
	}
	return err
}
