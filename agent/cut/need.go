package cut

import (
	"fmt"
	"slices"
	"strings"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/freezer"
	"stillpoint.io/stillpoint/agent/mounts"
)

// need is what must stand still for the snapshot of a volume, and who stops it.
type need struct {
	frozen []Freezing // by us, from before the snapshot
	itself []Freezing // by its backend, in the moment of the snapshot: it fails if they are frozen already
	alone  bool       // the snapshot fixes an instant of its own, since not all of it is frozen before
	why    []string   // reasons, in words, why it cannot be stopped
}

// selfFrozen are the types that device-mapper's suspend freezes by itself, and whose freeze by somebody else makes it
// fail with EBUSY on some kernels: those that the kernel finds by the device that they are mounted from. btrfs, with
// more than one device to a superblock, is neither (all measured on Linux 6.1 and 6.12).
var selfFrozen = []string{"ext3", "ext4", "xfs", "f2fs"}

// freezesItself says whether a volume's backend freezes a filesystem. device-mapper freezes only what stands directly on
// the device that it suspends: not what is in a file on it, on a partition of it, or encrypted on it.
func freezesItself(v adapters.Volume, fs mounts.Filesystem) bool {
	return v.Freeze == adapters.FreezeSelf && v.Device != 0 && fs.ID == mounts.Device(v.Device) && slices.Contains(selfFrozen, fs.Type)
}

// needs finds out for each volume what must stand still, and what stands in the way of that.
func (f facts) needs(volumes []adapters.Volume) ([]need, error) {
	var devices []mounts.Device // of the whole cut
	for _, v := range volumes {
		if v.Device != 0 {
			devices = append(devices, mounts.Device(v.Device))
		}
	}
	needs := make([]need, len(volumes))
	for i, v := range volumes {
		var err error
		if needs[i], err = f.need(v, devices); err != nil {
			return nil, err
		}
	}
	contradictions(volumes, needs)
	return needs, nil
}

// need is what must stand still for one volume, whatever the others need.
func (f facts) need(v adapters.Volume, cut []mounts.Device) (n need, err error) {
	switch {
	case v.Freeze == adapters.FreezeNone:
		return need{why: []string{"what is on it cannot be frozen from this node"}}, nil
	case v.Device == 0 && v.Path == "":
		return need{why: []string{"it is not attached to this node, and nobody can say who writes to it"}}, nil
	case v.Device == 0 && f.open[v.ID]:
		return need{why: []string{"a process has it open: a virtual machine's disk must be frozen from inside"}}, nil
	case v.Device == 0 && v.Form == adapters.TreeForm:
		return need{alone: v.Freeze == adapters.FreezeSelf}, nil // a folder is written to all the time
	case v.Device == 0:
		return need{}, nil // at rest
	}
	for _, d := range f.hidden[v.ID] {
		n.why = append(n.why, fmt.Sprintf("something holds %s without a mount to be seen here (another mount namespace, a guest, swap)", f.name(d)))
	}
	on, err := f.table.On(mounts.Device(v.Device))
	if err != nil {
		return need{}, err
	}
	if len(on) == 0 && len(n.why) == 0 {
		n.why = append(n.why, fmt.Sprintf("%s is attached but not mounted: whoever writes to it raw cannot be stopped (detach it, or mount it)", f.name(mounts.Device(v.Device))))
	}
	for _, fs := range on {
		if fs.Type == "overlay" || fs.ReadOnly {
			continue // an overlay's data is its upper layer's; what is read-only stands still already
		}
		fz, no := f.freezing(fs, cut)
		switch {
		case no != "":
			n.why = append(n.why, no)
		case freezesItself(v, fs):
			n.itself, n.alone = append(n.itself, fz), true
		default:
			n.frozen = append(n.frozen, fz)
		}
	}
	return n, nil
}

// contradictions finds filesystems that a backend must find unfrozen and that must be frozen for another volume's
// snapshot: one that stands on several volumes, or in a file or a pool on another volume of the cut.
func contradictions(volumes []adapters.Volume, needs []need) {
	for i := range volumes {
		for _, own := range needs[i].itself {
			for j := range volumes {
				if !slices.ContainsFunc(needs[j].frozen, func(fz Freezing) bool { return fz.Device == own.Device }) {
					continue
				}
				needs[i].why = append(needs[i].why, fmt.Sprintf("%s must be frozen for the snapshot of %s, and %s; leave one of the two out", own.Filesystem, volumes[j].ID, instantWhy(volumes[i])))
				needs[j].why = append(needs[j].why, fmt.Sprintf("%s, which it carries too, freezes with the snapshot of %s only", own.Filesystem, volumes[i].ID))
			}
		}
	}
}

// freezing decides whether a filesystem can be frozen, or says in words why not.
func (f facts) freezing(fs mounts.Filesystem, cut []mounts.Device) (Freezing, string) {
	if why, ok := f.refused[fs.ID]; ok {
		return Freezing{}, fmt.Sprintf("%s is never frozen: %s", fs, why)
	}
	if !slices.Contains(freezer.Types, fs.Type) {
		return Freezing{}, fmt.Sprintf("%s: a filesystem of this type cannot be frozen", fs)
	}
	if out := f.table.Uncovered(fs.ID, cut...); len(out) > 0 {
		var names []string
		for _, d := range out {
			names = append(names, f.name(d))
		}
		return Freezing{}, fmt.Sprintf("%s also stands on %s, outside this cut: cut those volumes together", fs, strings.Join(names, ", "))
	}
	under, err := f.table.Under(fs.ID)
	if err != nil {
		return Freezing{}, err.Error()
	}
	if len(under.Unknown) > 0 { // what it stands on may have to be frozen later, and we would not know
		return Freezing{}, fmt.Sprintf("%s: %s", fs, strings.Join(under.Unknown, "; "))
	}
	at, err := f.table.OpenAt(fs.ID)
	if err != nil {
		return Freezing{}, err.Error()
	}
	return Freezing{Filesystem: at.Point, Type: fs.Type, Device: fs.ID, Members: fs.Members}, ""
}

func (f facts) name(d mounts.Device) string {
	if b, ok := f.table.Device(d); ok {
		return "/dev/" + b.Name
	}
	return "device " + d.String()
}
