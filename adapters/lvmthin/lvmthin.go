// Package lvmthin is the backend for thin volumes of LVM: a volume is a thin logical volume, a snapshot is a read-only
// thin snapshot in the same pool, and what changed is read straight from the pool's metadata (package thinmeta).
// It needs root, LVM's programs (Debian: lvm2) and a kernel with device-mapper.
//
// # Names
//
// A person writes lvm-thin:VG/LV, or lvm-thin:*/LV for the only volume group that has such a volume. The canonical id
// is the volume group's UUID and the volume's name, lvm-thin:x7Yk…/LV: the UUID is the locality, so that a renamed
// group keeps its snapshots, and groups of one name on two nodes are two. A volume that is renamed becomes another
// volume.
//
// A snapshot is the logical volume sp-<hash of the volume's name>.<snapshot's name> in the same group. What it is
// stands in its tags, which LVM changes in one step with everything else: whose snapshot, wanted name, time, mark and
// notes (tags.go). Without our mark it is not ours.
//
// # Steps, and what a crash leaves
//
// The point in time is one `lvcreate -s`, which marks the snapshot cutting as it makes it. Publish changes tags.
// Whatever dies in between, there is a marked snapshot or none; one whose lvcreate died half-way is cutting for ever,
// can be deleted, and is never handed out.
//
// LVM's programs are never killed, not even at a deadline: lvcreate suspends the volume for a moment, and killed there
// it leaves the volume suspended, with every write to it waiting. A call that may not wait any longer leaves the
// program to itself and says so; the program's end is still watched (command.go). If something else kills it, or us,
// the record that was written before says which volumes may be suspended, and the next who opens the backend resumes
// them (sweep.go).
//
// # What else looks at a snapshot
//
// Nothing does. A snapshot holds the UUIDs of its volume's filesystem, and perhaps a volume group of a guest. It is
// active only while it is read, and so that neither udev nor a scan of LVM's looks into it (activate.go); the same goes
// for a volume that is being restored, until it is whole. LVM's programs are told to look at the group's own disks only.
//
// # Where what is kept
//
// In memory, by default /run/stillpoint/lvm-thin: records of programs under way, locks between processes, what was
// found out about the kernel. On disk: nothing but the tags. The pool's one metadata snapshot is reserved for
// milliseconds at a time, never while somebody consumes a stream; one that a power failure catches says itself that it is
// ours (metadata.go).
package lvmthin

import (
	"context"
	"errors"
	"strings"
	"sync"
	"time"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/cbt"
	"stillpoint.io/stillpoint/cbt/audit"
	"stillpoint.io/stillpoint/fault"
)

// Kind is the adapter's row in the registry.
func Kind() adapters.Kind {
	return adapters.Kind{
		Name:    "lvm-thin",
		Summary: "thin volumes of LVM on this node, snapshotted in their pool, with changed blocks from the pool's metadata",
		Keys: []adapters.Key{
			{Name: "groups", Usage: "volume groups, separated by commas, that the backend is limited to; default: every one that LVM shows on this node"},
			{Name: "devices", Usage: "block devices, separated by commas, that LVM may look at for volume groups; default: those that lvm.conf and the devices file allow"},
			{Name: "pool", Usage: "the thin pool that restores make new volumes in; default: that of the volume's snapshots, or the only one of its group"},
			{Name: "data-limit", Usage: "no snapshot or restore once so many percent of a pool's data space are used, 1 to 100; default 95"},
			{Name: "metadata-limit", Usage: "no snapshot or restore once so many percent of a pool's metadata space are used, 1 to 100, or earlier where the kernel's own threshold is lower; default 90"},
			{Name: "lock-wait", Usage: "how long to wait for a volume group that another program has locked; default 30s"},
			{Name: "state", Usage: "folder of locks and records, on tmpfs and seen by all that use the backend on this node; default /run/stillpoint/lvm-thin"},
		},
		Open:    open,
		Drivers: []string{topoLVM, topoLVMOld, openEBSLVM, csiDriverLVM},
		Resolve: resolve,
	}
}

const defaultState = "/run/stillpoint/lvm-thin"

// Adapter is the backend on this node.
type Adapter struct {
	backend  string
	groups   []string // volume groups it is limited to; none: no limit
	pool     string   // for new volumes; empty: found
	limits   limits
	lvm      *lvm
	mapper   mapper
	state    *state
	metadata *metadataKeeper
	images   *activations
	batches  *batches

	mu     sync.Mutex
	known  map[groupID]*group // as last seen
	tidied map[groupID]bool
	swept  error // of the last sweep

	freeze freezeProbe
	turns  turns
}

func open(ctx context.Context, c adapters.Config) (adapters.Adapter, error) {
	params, err := Kind().Params(c)
	if err != nil {
		return nil, err
	}
	a := &Adapter{backend: c.Name, known: map[groupID]*group{}, tidied: map[groupID]bool{}}
	if a.groups, err = list(c, params, "groups", checkGroupName); err != nil {
		return nil, err
	}
	devices, err := list(c, params, "devices", checkDevice)
	if err != nil {
		return nil, err
	}
	a.pool = params.String("pool", "")
	a.limits = limits{data: params.Int("data-limit", 95), metadata: params.Int("metadata-limit", 90)}
	wait := params.Duration("lock-wait", 30*time.Second)
	folder := params.String("state", defaultState)
	if err := params.Err(); err != nil {
		return nil, err
	}
	if err := a.limits.check(); err != nil {
		return nil, fault.Errorf(fault.Invalid, "backend %s: %w", c.Name, err)
	}
	if !strings.HasPrefix(folder, "/") {
		return nil, fault.Errorf(fault.Invalid, "backend %s: state: %q is not an absolute path", c.Name, folder)
	}
	a.state = &state{folder: folder}
	a.lvm = newLVM(a.state, devices, wait)
	a.metadata = newMetadataKeeper(a.state, a.mapper)
	a.images = newActivations(a)
	a.batches = newBatches(a)
	a.sweep(ctx)
	return a, nil
}

// list reads a parameter that is a list.
func list(c adapters.Config, params *adapters.Params, key string, check func(string) error) ([]string, error) {
	if _, given := c.Parameters[key]; !given {
		return nil, nil
	}
	var all []string
	for s := range strings.SplitSeq(params.String(key, ""), ",") {
		s = strings.TrimSpace(s)
		if err := check(s); err != nil {
			return nil, fault.Errorf(fault.Invalid, "backend %s: %s: %w", c.Name, key, err)
		}
		all = append(all, s)
	}
	return all, nil
}

func checkDevice(path string) error {
	if !strings.HasPrefix(path, "/dev/") || strings.ContainsAny(path, " \t\n\"'\\") {
		return fault.Errorf(fault.Invalid, "%q is not the path of a block device", path)
	}
	return nil
}

// Capabilities describes the adapter.
func (a *Adapter) Capabilities() adapters.Capabilities {
	return adapters.Capabilities{
		Quiesce:     a.quiesce(),
		Changed:     "the mappings of the two snapshots in the pool's metadata (dm-thin), exact to the pool's chunk",
		PointInTime: "the exit of lvcreate -s: the origin was suspended, flushed, snapshotted in the pool and resumed (Documentation/admin-guide/device-mapper/thin-provisioning.rst, \"Internal snapshots\")",
		Confidence:  cbt.Exact,
		Source:      audit.Source{Name: "dm-thin"},
		NodeLocal:   true,
	}
}

// Close waits a little for LVM's programs that are still under way for calls which gave up on them, and is Busy if some
// remain: they are neither killed nor harmed by that, and the record of each stays.
func (a *Adapter) Close() error {
	a.freeze.settled()
	return errors.Join(a.lvm.close(closePatience), a.batches.close(closePatience))
}

// closePatience is how long Close waits for programs under way.
const closePatience = 10 * time.Second
