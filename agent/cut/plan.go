package cut

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"stillpoint.io/stillpoint/adapters"
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
	// Itself are the filesystems on it that are frozen not by us but by its backend, in the moment of the snapshot.
	Itself []Freezing `json:"freezes_itself,omitempty"`
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

// makePlan decides. Errors: Unsupported when a volume cannot be frozen, or not be of the cut's instant, and the request
// does not allow that; Invalid when no order of freezing and snapshotting exists.
func makePlan(r Request, volumes []adapters.Volume, f facts) (Plan, error) {
	p := Plan{Name: r.Name, MaxFreeze: r.MaxFreeze}
	needs, err := f.needs(volumes)
	if err != nil {
		return Plan{}, err
	}
	var refusals []error
	var alone []adapters.Volume // those that fix an instant of their own
	for i, v := range volumes {
		m := Member{Volume: v.ID.String(), Snapshot: adapters.SnapshotID{Volume: v.ID, Name: adapters.Name(r.Name)}.String(), Consistency: adapters.FilesystemConsistent}
		switch {
		case len(needs[i].why) > 0:
			m.Consistency, m.Why = adapters.CrashConsistent, needs[i].why
			if !r.AllowCrashConsistent {
				refusals = append(refusals, fault.Errorf(fault.Unsupported, "%s cannot be frozen: %s", v.ID, strings.Join(m.Why, "; ")))
			}
			needs[i] = need{}
		case needs[i].alone:
			if alone = append(alone, v); len(alone) > 1 {
				m.Consistency, m.Why = adapters.VolumeConsistent, []string{instantWhy(v) + ", as that of " + alone[0].ID.String() + " does"}
			}
			m.Itself = needs[i].itself
		}
		p.Members = append(p.Members, m)
	}
	if len(refusals) > 0 {
		return Plan{}, fmt.Errorf("%w; leave it out, or allow a crash-consistent snapshot of it with --allow-crash-consistent", errors.Join(refusals...))
	}
	if len(alone) > 1 && !r.AllowSeparateInstants {
		return Plan{}, separate(alone)
	}
	p.Steps, err = f.steps(volumes, needs, p.Members)
	return p, err
}

// instantWhy says why a volume's snapshot is at an instant of its own.
func instantWhy(v adapters.Volume) string {
	if v.Form == adapters.TreeForm {
		return "its snapshot fixes an instant of its own"
	}
	return "this kernel cannot snapshot it while its filesystem is frozen (device-mapper's suspend fails with EBUSY, as on Linux 6.1), so device-mapper freezes it for an instant of its own"
}

// separate is the error for more than one volume with an instant of its own.
func separate(alone []adapters.Volume) error {
	var all []string
	for _, v := range alone {
		all = append(all, fmt.Sprintf("%s: %s", v.ID, instantWhy(v)))
	}
	return fault.Errorf(fault.Unsupported, "only one such volume can be of one instant with the others: %s. Cut them one at a time, or accept an instant for each with --allow-separate-instants; for LVM, a newer kernel (Linux 6.12 is known to do) has no such limit",
		strings.Join(all, "; "))
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
			for _, f := range p.Members[i].Itself {
				fmt.Fprintf(&b, "            freezes %s (%s) by itself\n", f.Filesystem, f.Type)
			}
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

// flushed lists all that will be frozen, by us or by a backend: what is written out beforehand is not waited for then.
func (p Plan) flushed() []Freezing {
	all := p.frozen()
	for _, m := range p.Members {
		all = append(all, m.Itself...)
	}
	return all
}
