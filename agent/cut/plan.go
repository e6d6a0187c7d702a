package cut

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/freezer"
	"stillpoint.io/stillpoint/agent/mounts"
	"stillpoint.io/stillpoint/fault"
)

// Plan is what a cut will do: steps of freezing and snapshotting, one after the other, and one thaw at the end. There
// is one step unless a snapshot writes to a filesystem that is to be frozen as well.
type Plan struct {
	Name      string        `json:"name"`
	MaxFreeze time.Duration `json:"max_freeze_ns"`
	Members   []Member      `json:"volumes"`
	Steps     []Step        `json:"steps"`
}

// Step freezes filesystems, upper before lower, and then snapshots volumes, all at once.
type Step struct {
	Freeze   []Freezing `json:"freeze"`
	Snapshot []int      `json:"snapshot"` // indexes into Plan.Members
}

// Freezing is a filesystem to freeze.
type Freezing struct {
	Filesystem string        `json:"filesystem"` // the mount point through which it is opened
	Type       string        `json:"type"`
	Device     mounts.Device `json:"-"`
	// Members are the block devices that must not be written to while it is frozen.
	Members []mounts.Device `json:"-"`
}

// Member is a volume in the plan.
type Member struct {
	Volume      string               `json:"volume"`
	Snapshot    string               `json:"snapshot"`
	Consistency adapters.Consistency `json:"consistency"`
	// Why is the reason, in words, for a consistency that is less than the filesystem's; or what could not be checked.
	Why []string `json:"why,omitempty"`
}

// facts is what the plan follows from, besides the request: read before, so that the plan is a pure function.
type facts struct {
	table   mounts.Table
	hidden  map[adapters.VolumeID][]mounts.Device // devices of a volume that somebody unseen holds
	open    map[adapters.VolumeID]bool            // volumes without a device whose file somebody has open
	refused map[mounts.Device]string              // filesystems never frozen, and why
}

// selfFrozen are the types that device-mapper's suspend freezes by itself; btrfs, with more than one device to a
// superblock, it does not (measured on Linux 6.1 and 6.12).
var selfFrozen = []string{"ext3", "ext4", "xfs"}

// makePlan decides. Errors: Unsupported when a volume cannot be frozen and crash consistency is not allowed, Invalid
// when no order of freezing and snapshotting exists.
func makePlan(r Request, volumes []adapters.Volume, f facts) (Plan, error) {
	p := Plan{Name: r.Name, MaxFreeze: r.MaxFreeze}
	var devices []mounts.Device // of the whole cut
	for _, v := range volumes {
		if v.Device != 0 {
			devices = append(devices, mounts.Device(v.Device))
		}
	}
	freeze := make([][]Freezing, len(volumes)) // what must be frozen before a volume's snapshot
	var refusals []error
	selves := 0
	for i, v := range volumes {
		m := Member{Volume: v.ID.String(), Snapshot: adapters.SnapshotID{Volume: v.ID, Name: adapters.Name(r.Name)}.String(), Consistency: adapters.FilesystemConsistent}
		frozen, self, why, err := f.freezings(v, devices)
		if err != nil {
			return Plan{}, err
		}
		if self {
			if selves++; selves > 1 {
				why = append(why, "its backend freezes by itself and fails under our freeze on this kernel, which works for one volume of a cut only")
			}
		}
		if len(why) > 0 {
			m.Consistency, m.Why = adapters.CrashConsistent, why
			if !r.AllowCrashConsistent {
				refusals = append(refusals, fault.Errorf(fault.Unsupported, "%s cannot be frozen: %s", v.ID, strings.Join(why, "; ")))
			}
			frozen = nil
		}
		freeze[i] = frozen
		p.Members = append(p.Members, m)
	}
	if len(refusals) > 0 {
		return Plan{}, fmt.Errorf("%w; leave it out, or allow a crash-consistent snapshot of it with --allow-crash-consistent", errors.Join(refusals...))
	}
	var err error
	p.Steps, err = f.steps(volumes, freeze)
	return p, err
}

// freezings returns the filesystems to freeze for a volume; whether its backend freezes them instead; and the reasons,
// in words, why they cannot be frozen.
func (f facts) freezings(v adapters.Volume, cut []mounts.Device) (frozen []Freezing, self bool, why []string, err error) {
	switch {
	case v.Freeze == adapters.FreezeNone:
		return nil, false, []string{"what is on it cannot be frozen from this node"}, nil
	case v.Device == 0 && v.Path == "":
		return nil, false, []string{"it is not attached to this node, and nobody can say who writes to it"}, nil
	case v.Device == 0 && f.open[v.ID]:
		return nil, false, []string{"a process has it open: a virtual machine's disk must be frozen from inside"}, nil
	case v.Device == 0:
		return nil, false, nil, nil // at rest
	}
	for _, d := range f.hidden[v.ID] {
		why = append(why, fmt.Sprintf("something holds %s without a mount to be seen here (another mount namespace, a guest, swap)", f.name(d)))
	}
	on, err := f.table.On(mounts.Device(v.Device))
	if err != nil {
		return nil, false, nil, err
	}
	if len(on) == 0 && len(why) == 0 {
		why = append(why, fmt.Sprintf("%s is attached but not mounted: whoever writes to it raw cannot be stopped (detach it, or mount it)", f.name(mounts.Device(v.Device))))
	}
	for _, fs := range on {
		if fs.Type == "overlay" || fs.ReadOnly {
			continue // an overlay's data is its upper layer's; what is read-only stands still already
		}
		if v.Freeze == adapters.FreezeSelf && slices.Contains(selfFrozen, fs.Type) {
			self = true
			continue
		}
		fz, no := f.freezing(fs, cut)
		if no != "" {
			why = append(why, no)
			continue
		}
		frozen = append(frozen, fz)
	}
	return frozen, self, why, nil
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

// steps orders freezing and snapshots: every filesystem of a volume is frozen before its snapshot, upper filesystems
// before the ones that they stand on, and a filesystem that a snapshot writes to only after that snapshot.
func (f facts) steps(volumes []adapters.Volume, freeze [][]Freezing) ([]Step, error) {
	byDevice := map[mounts.Device]Freezing{}
	var ids []mounts.Device
	for _, list := range freeze {
		for _, fz := range list {
			if _, ok := byDevice[fz.Device]; !ok {
				byDevice[fz.Device] = fz
				ids = append(ids, fz.Device)
			}
		}
	}
	order, err := f.table.Order(ids...)
	if err != nil {
		return nil, err
	}
	var pending []int
	blocks := make([]map[mounts.Device]bool, len(volumes)) // frozen, these would block a volume's snapshot
	for i, v := range volumes {
		pending = append(pending, i)
		blocks[i] = map[mounts.Device]bool{}
		if pool, ok := f.table.Filesystem(mounts.Device(v.WritesTo)); ok {
			under, err := f.table.Under(pool.ID)
			if err != nil {
				return nil, err
			}
			for _, d := range append(under.Filesystems, pool.ID) {
				blocks[i][d] = true
			}
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
			for _, needed := range freeze[i] {
				if !frozen[needed.Device] {
					return nil, fault.Errorf(fault.Invalid, "%s: its snapshot writes to %s, which would have to be frozen before it: cut them apart", volumes[i].ID, fs)
				}
			}
		}
		if len(now) > 0 {
			steps[len(steps)-1].Snapshot = now
			steps = append(steps, Step{})
		}
		steps[len(steps)-1].Freeze = append(steps[len(steps)-1].Freeze, byDevice[fs.ID])
		frozen[fs.ID] = true
	}
	steps[len(steps)-1].Snapshot = pending
	return steps, nil
}

func (f facts) name(d mounts.Device) string {
	if b, ok := f.table.Device(d); ok {
		return "/dev/" + b.Name
	}
	return "device " + d.String()
}

// String is the plan for people, a line a thing to do.
func (p Plan) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "cut %s, frozen for at most %v\n", p.Name, p.MaxFreeze)
	for _, s := range p.Steps {
		for _, f := range s.Freeze {
			fmt.Fprintf(&b, "  freeze    %s (%s, device %s)\n", f.Filesystem, f.Type, f.Device)
		}
		for _, i := range s.Snapshot {
			fmt.Fprintf(&b, "  snapshot  %s\n", p.Members[i].Snapshot)
			for _, why := range p.Members[i].Why {
				fmt.Fprintf(&b, "            %s-consistent: %s\n", p.Members[i].Consistency, why)
			}
		}
	}
	b.WriteString("  thaw in reverse, verify, publish\n")
	return b.String()
}

// frozen lists all that the plan freezes.
func (p Plan) frozen() (all []Freezing) {
	for _, s := range p.Steps {
		all = append(all, s.Freeze...)
	}
	return all
}
