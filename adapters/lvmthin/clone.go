package lvmthin

import (
	"context"
	"strconv"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

// clone is the snapshot that a new volume shares its chunks with; the zero clone is none.
type clone struct {
	group    *group
	snapshot *logical
}

// BeginClone makes a writable thin snapshot of the snapshot, under a hidden name, and makes it larger if need be: in the
// snapshot's own pool, another one is Unsupported.
func (a *Adapter) BeginClone(ctx context.Context, id adapters.SnapshotID, spec adapters.VolumeSpec) (adapters.Target, error) {
	p, s, _, err := a.lookup(ctx, id)
	if err != nil {
		return nil, err
	}
	if spec.Token == "" || spec.Overwrite || spec.Size < s.size {
		return nil, fault.Errorf(fault.Invalid, "volume %s: a clone of %s is a new volume of at least %d bytes, and needs a token", spec.ID, id, s.size)
	}
	return a.begin(ctx, spec, clone{p.group, s})
}

// origin is what is noted on an unfinished clone: LVM's UUID of the snapshot, which no other will ever have.
func (c clone) origin() string {
	if c.snapshot == nil {
		return ""
	}
	return c.snapshot.id
}

// poolIn is the snapshot's pool, if a volume of size bytes in the group g can share its chunks. wanted is the pool that is
// configured for new volumes, empty if none is.
func (c clone) poolIn(g *group, wanted string, size int64) (*logical, error) {
	if c.group.id != g.id || wanted != "" && wanted != c.snapshot.pool {
		return nil, fault.Errorf(fault.Unsupported, "it is to be in another pool than the snapshot, and can share no chunks with it")
	}
	_, pool, err := g.poolOf(c.snapshot)
	if err != nil {
		return nil, err
	}
	if !pool.zeroes && size > c.snapshot.size && c.snapshot.size%pool.chunk != 0 {
		return nil, fault.Errorf(fault.Unsupported, "it is to be larger than the snapshot, whose last chunk has old bytes behind its end in a pool that does not zero (lvcreate -Zn)")
	}
	return pool, nil
}

// complete makes a clone as large as it shall be, before it is active: LVM would resume it with udev looking on.
func (t *target) complete(ctx context.Context) error {
	size := t.wholeSize()
	if t.of.snapshot == nil || t.volume.size >= size {
		return nil
	}
	g := t.place.group
	_, err := t.adapter.change(ctx, g, task{
		args:   []string{"lvextend", "-q", "-y", "-L", bytesOf(size), g.name + "/" + t.volume.name},
		intent: t.adapter.intent(g, t.volume),
	})
	return err
}

// wholeSize is the size of a new volume: whole extents of its group.
func (t *target) wholeSize() int64 {
	extent := t.place.group.extent
	return (t.size + extent - 1) / extent * extent
}

func bytesOf(n int64) string { return strconv.FormatInt(n, 10) + "b" }
