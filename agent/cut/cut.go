package cut

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/freezer"
	"stillpoint.io/stillpoint/agent/mounts"
	"stillpoint.io/stillpoint/fault"
)

// Request is a cut that somebody wants.
type Request struct {
	// Name becomes the wanted name of every snapshot. Repeating a cut by name is safe: one that succeeded is returned
	// as it is, one that died half-way is cleaned away first.
	Name string
	// Volumes are what is cut; naming one twice is naming it once.
	Volumes []Volume
	// MaxFreeze is the absolute deadline of the freeze, 0 < MaxFreeze ≤ 60 s. No filesystem stays frozen longer.
	MaxFreeze time.Duration
	// AllowCrashConsistent accepts volumes whose filesystems cannot be frozen, and records it on their snapshots.
	AllowCrashConsistent bool
	// AllowSeparateInstants accepts more than one volume whose snapshot is at an instant of its own, and records it on
	// the snapshots: the first of them in Volumes is of the cut's instant, each of the others is consistent by itself.
	AllowSeparateInstants bool
}

// Volume is a volume to cut: its id, which need not be canonical, and the adapter that knows it.
type Volume struct {
	ID      adapters.VolumeID
	Adapter adapters.Adapter
}

// Node is what a cut needs of the machine that it runs on.
type Node struct {
	// Host is where mounts and counters are read.
	Host mounts.Host
	// Freezer connects to the freezer. It is called before the freeze; the cut closes what it returns.
	Freezer func(context.Context) (*freezer.Client, error)
	// SyncCommand flushes the filesystem mounted at the path that is put behind it: a process that can be abandoned.
	SyncCommand []string
	// Lock is a file; holding it locked makes this the only cut on the node.
	Lock string
	// Refuse names paths whose filesystems are never frozen: our own state, logs, the kubelet, the container runtime.
	Refuse []string
}

// Result is a cut that succeeded.
type Result struct {
	Name      string             `json:"name"`
	Snapshots []string           `json:"snapshots"` // handles, in the order of the request
	Frozen    []FrozenFilesystem `json:"frozen"`
	// Adopted says that the cut had been made before, and Frozen is not known any more.
	Adopted bool `json:"adopted,omitempty"`
	// Crash lists the handles of the snapshots that are only crash-consistent.
	Crash []string `json:"crash_consistent,omitempty"`
	// Separate lists the handles of the snapshots that are consistent, but at an instant of their own.
	Separate []string `json:"separate_instants,omitempty"`
	// Unverified says in words what could not be proved.
	Unverified []string `json:"unverified,omitempty"`
}

// FrozenFilesystem is how long a filesystem stood still, from the return of FIFREEZE to the return of FITHAW.
type FrozenFilesystem struct {
	Filesystem   string  `json:"filesystem"` // its mount point
	Milliseconds float64 `json:"milliseconds"`
	// Itself says that not we but its backend froze it, within the call that took the snapshot. Milliseconds is that
	// call's time: it stood still for no longer.
	Itself bool `json:"by_backend,omitempty"`
}

// member is a volume of the cut with all that the cut knows of it.
type member struct {
	adapter adapters.Adapter
	volume  adapters.Volume
	id      adapters.SnapshotID
}

// discardTime is how long a failed cut tries to delete its snapshots, and waits for backend calls that outlived the
// freeze, before it leaves them, marked cutting, to the next cut.
const discardTime = 30 * time.Second

// Make makes the cut. Errors are of package fault's kinds: Void if the freeze was lost or the proof failed (the
// snapshots are deleted; trying again is right), others as their cause. Whatever happens, when Make returns every
// filesystem is thawed, and no snapshot of this cut is verified unless all are about to be.
func Make(ctx context.Context, r Request, n Node) (Result, error) {
	if err := r.check(); err != nil {
		return Result{}, err
	}
	unlock, err := lock(ctx, n.Lock)
	if err != nil {
		return Result{}, err
	}
	defer unlock()

	members, err := lookUp(ctx, r)
	if err != nil {
		return Result{}, err
	}
	if done, err := adopt(ctx, r.Name, members); err != nil || done != nil {
		return r.adopted(done), err
	}
	plan, err := plan(ctx, r, n, members)
	if err != nil {
		return Result{}, err
	}
	if _, err := gate(ctx, members); err != nil {
		return Result{}, err
	}
	client, err := n.Freezer(ctx)
	if err != nil {
		return Result{}, err
	}
	defer client.Close()

	window, err := cutting(ctx, r, n, members, plan, client)
	if err == nil {
		err = n.verify(ctx, r, members, plan, window)
	}
	if err != nil {
		return Result{}, errors.Join(err, discard(ctx, members, window))
	}
	return publish(ctx, r, members, plan, window)
}

// DryRun makes the plan of a cut, and asks the gates, but changes nothing.
func DryRun(ctx context.Context, r Request, n Node) (Plan, error) {
	if err := r.check(); err != nil {
		return Plan{}, err
	}
	members, err := lookUp(ctx, r)
	if err != nil {
		return Plan{}, err
	}
	p, err := plan(ctx, r, n, members)
	if err != nil {
		return Plan{}, err
	}
	_, err = gate(ctx, members)
	return p, err
}

func (r Request) check() error {
	switch {
	case r.Name == "":
		return fault.Errorf(fault.Invalid, "the cut has no name: give one with --name")
	case len(r.Name) > 253:
		return fault.Errorf(fault.Invalid, "the cut's name has %d bytes: at most 253", len(r.Name))
	case len(r.Volumes) == 0:
		return fault.Errorf(fault.Invalid, "the cut %q has no volumes", r.Name)
	case r.MaxFreeze <= 0 || r.MaxFreeze > time.Minute:
		return fault.Errorf(fault.Invalid, "a freeze of at most %v: the deadline must be more than 0 and at most 60s", r.MaxFreeze)
	}
	return nil
}

// lookUp finds the volumes, each once, by their canonical ids.
func lookUp(ctx context.Context, r Request) ([]member, error) {
	found := make([]member, len(r.Volumes))
	err := each(len(r.Volumes), func(i int) error {
		v, err := r.Volumes[i].Adapter.Volume(ctx, r.Volumes[i].ID)
		if err != nil {
			return err
		}
		found[i] = member{r.Volumes[i].Adapter, v, adapters.SnapshotID{Volume: v.ID, Name: adapters.Name(r.Name)}}
		return nil
	})
	if err != nil {
		return nil, err
	}
	seen := map[adapters.VolumeID]bool{}
	return slices.DeleteFunc(found, func(m member) bool {
		twice := seen[m.volume.ID]
		seen[m.volume.ID] = true
		return twice
	}), nil
}

// forecast is what a backend expects of the window.
type forecast struct {
	backend string
	volumes int
	frozen  time.Duration
}

// gate asks every backend whether it can snapshot all of its volumes now, and how long that will take.
func gate(ctx context.Context, members []member) ([]forecast, error) {
	ids := map[string][]adapters.VolumeID{}
	gaters := map[string]adapters.Gater{}
	for _, m := range members {
		if g, ok := adapters.As[adapters.Gater](m.adapter); ok {
			ids[m.volume.ID.Backend] = append(ids[m.volume.ID.Backend], m.volume.ID)
			gaters[m.volume.ID.Backend] = g
		}
	}
	backends := slices.Sorted(maps.Keys(ids))
	forecasts := make([]forecast, len(backends))
	err := each(len(backends), func(i int) error {
		name := backends[i]
		f, err := gaters[name].Gate(ctx, ids[name])
		forecasts[i] = forecast{name, len(ids[name]), f.Frozen}
		return err
	})
	return forecasts, err
}

// inTime refuses a window that would take more than half of the deadline. It is judged when everything is staged.
func inTime(r Request, forecasts []forecast) error {
	for _, f := range forecasts {
		if f.frozen > r.MaxFreeze/2 {
			return fault.Errorf(fault.Exhausted, "backend %q needs about %v to snapshot %d volumes, more than half of the freeze's deadline of %v: raise --max-freeze (at most 60s), cut fewer volumes at once, or defragment them",
				f.backend, f.frozen.Round(time.Millisecond), f.volumes, r.MaxFreeze)
		}
	}
	return nil
}

// publish marks the snapshots verified. The first one carries the proof for all: see adopt.
func publish(ctx context.Context, r Request, members []member, p Plan, w *window) (Result, error) {
	res := Result{Name: r.Name, Frozen: append([]FrozenFilesystem{}, w.frozen...), Unverified: w.unverified}
	instant := instantOf(w.snapshots)
	for i, m := range members {
		notes := adapters.Notes{Cut: r.Name, Instant: instant, Consistency: p.Members[i].Consistency, Unverified: w.unverified}
		if err := m.adapter.Publish(ctx, m.id, notes); err != nil {
			return Result{}, fmt.Errorf("the cut %q is verified, but not all of it is published: %w; repeat it to finish", r.Name, err)
		}
		res.add(m.id, notes.Consistency)
	}
	return res, nil
}

// add lists a snapshot, and what it is if that is less than the cut's best.
func (res *Result) add(id adapters.SnapshotID, c adapters.Consistency) {
	res.Snapshots = append(res.Snapshots, id.String())
	switch c {
	case adapters.CrashConsistent:
		res.Crash = append(res.Crash, id.String())
	case adapters.VolumeConsistent:
		res.Separate = append(res.Separate, id.String())
	}
}

// discard deletes what a failed cut made, even when its context is over.
func discard(ctx context.Context, members []member, w *window) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), discardTime)
	defer cancel()
	w.settle(ctx)
	return each(len(members), func(i int) error {
		if stager, ok := adapters.As[adapters.Stager](members[i].adapter); ok && w.staged {
			if err := stager.Unstage(ctx, members[i].volume.ID, w.wanted); err != nil {
				return fmt.Errorf("throwing away what was staged for %s: %w", members[i].volume.ID, err)
			}
		}
		if !w.begun {
			return nil
		}
		err := members[i].adapter.DeleteSnapshot(ctx, members[i].id)
		if err != nil && !errors.Is(err, fault.Invalid) { // what is not ours stays
			return fmt.Errorf("deleting %s, which belongs to no cut: %w; the next cut of this name tries again", members[i].id, err)
		}
		return nil
	})
}

// each calls f for 0 … n−1 in parallel, waits for all, and joins the errors.
func each(n int, f func(i int) error) error {
	errs := make([]error, n)
	var all sync.WaitGroup
	for i := range n {
		all.Go(func() { errs[i] = f(i) })
	}
	all.Wait()
	return errors.Join(errs...)
}
