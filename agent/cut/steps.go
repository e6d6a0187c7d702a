package cut

import (
	"slices"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/mounts"
	"stillpoint.io/stillpoint/fault"
)

// steps orders freezing and snapshots: every filesystem of a volume is frozen before its snapshot, upper filesystems
// before the ones that they stand on, and a filesystem that a snapshot writes to only after that snapshot. One that a
// backend freezes has its place in that order as the others have, but nobody freezes it before: it stands still with
// the last step, which is where its volume's snapshot is, so that everything else is frozen by then.
func (f facts) steps(volumes []adapters.Volume, needs []need, members []Member) ([]Step, error) {
	ours := map[mounts.Device]Freezing{}
	var ids []mounts.Device
	for _, n := range needs {
		for _, fz := range n.frozen {
			ours[fz.Device] = fz
			ids = append(ids, fz.Device)
		}
		for _, fz := range n.itself {
			ids = append(ids, fz.Device)
		}
	}
	order, err := f.table.Order(ids...)
	if err != nil {
		return nil, err
	}
	pending := make([]int, len(volumes))
	blocks := make([]map[mounts.Device]bool, len(volumes)) // frozen, these would block a volume's snapshot
	for i, v := range volumes {
		pending[i] = i
		if blocks[i], err = f.blocks(v); err != nil {
			return nil, err
		}
	}
	steps := []Step{{}}
	frozen := map[mounts.Device]bool{}
	for _, fs := range order {
		var now []int
		pending = slices.DeleteFunc(pending, func(i int) bool {
			if blocks[i][fs.ID] {
				now = append(now, i)
			}
			return blocks[i][fs.ID]
		})
		for _, i := range now {
			late := slices.ContainsFunc(needs[i].frozen, func(fz Freezing) bool { return !frozen[fz.Device] })
			if late || slices.ContainsFunc(needs[i].itself, func(fz Freezing) bool { return fz.Device == fs.ID }) {
				return nil, fault.Errorf(fault.Invalid, "%s: its snapshot writes to %s, which would have to be frozen before it: cut them apart", volumes[i].ID, fs)
			}
			if needs[i].alone && members[i].Consistency == adapters.FilesystemConsistent {
				return nil, fault.Errorf(fault.Invalid, "%s: %s, and writes to %s, which is frozen only after it: they cannot be of one instant, cut them apart", volumes[i].ID, instantWhy(volumes[i]), fs)
			}
		}
		if len(now) > 0 {
			steps[len(steps)-1].Snapshot = now
			steps = append(steps, Step{})
		}
		if fz, ok := ours[fs.ID]; ok {
			steps[len(steps)-1].Freeze = append(steps[len(steps)-1].Freeze, fz)
			frozen[fs.ID] = true
		}
	}
	steps[len(steps)-1].Snapshot = pending
	return steps, nil
}

// blocks are the filesystems that a volume's snapshot writes to, and all that they stand on.
func (f facts) blocks(v adapters.Volume) (map[mounts.Device]bool, error) {
	found := map[mounts.Device]bool{}
	pool, ok := f.table.Filesystem(mounts.Device(v.WritesTo))
	if !ok {
		return found, nil
	}
	under, err := f.table.Under(pool.ID)
	if err != nil {
		return nil, err
	}
	for _, d := range append(under.Filesystems, pool.ID) {
		found[d] = true
	}
	return found, nil
}
