package cut

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/freezer"
	"stillpoint.io/stillpoint/agent/mounts"
	"stillpoint.io/stillpoint/fault"
)

// window is what happened between the first freeze and the thaw, and around it.
type window struct {
	wanted     string
	staged     bool                // something may be staged in the backends
	begun      bool                // snapshots may exist
	snapshots  []adapters.Snapshot // in the members' order
	took       []time.Duration     // by the calls that made them
	calls      sync.WaitGroup      // snapshot calls, which may outlive the freeze
	frozen     []FrozenFilesystem  // in the order of freezing
	lost       []string            // freezes that were not held, in words
	moved      []string            // devices that were written to while they were frozen
	jumped     time.Duration       // how far the wall clock moved against the monotonic one
	unverified []string
}

// margin is what is left of the freeze's deadline when the snapshot calls are given up, so that it is our thaw that
// ends the freeze and not the deadline.
const margin = 100 * time.Millisecond

// patience is how long a device is waited for that is asked whether it counts.
const patience = 5 * time.Second

// cutting syncs, freezes, snapshots and thaws. The window is returned also with an error, for discard.
func cutting(ctx context.Context, r Request, n Node, members []member, p Plan, client *freezer.Client) (*window, error) {
	w := &window{wanted: r.Name, snapshots: make([]adapters.Snapshot, len(members)), took: make([]time.Duration, len(members))}
	if err := n.sync(ctx, r, p.flushed()); err != nil {
		return w, err
	}
	w.staged = true
	if err := stage(ctx, r, members, p); err != nil {
		return w, err
	}
	forecasts, err := gate(ctx, members)
	if err == nil {
		err = inTime(r, forecasts)
	}
	if err != nil {
		return w, err
	}
	if err := n.sync(ctx, r, p.flushed()); err != nil {
		return w, err
	}
	for {
		// A snapshot call may outlive the process that made it, and what it makes so late is of no instant of ours.
		if done, err := adopt(ctx, r.Name, members); err != nil || done != nil {
			return w, cmp.Or(err, fault.Errorf(fault.Busy, "the cut %q was made by another process just now: repeat it", r.Name))
		}
		err := w.run(ctx, r, n, members, p, client)
		var busy *freezer.Error
		if w.begun || !errors.As(err, &busy) || busy.Reason != freezer.Busy || busy.Wait <= 0 {
			return w, inWords(err, r)
		}
		select { // it was frozen a moment ago, and has a right to some time in between
		case <-time.After(busy.Wait):
		case <-ctx.Done():
			return w, errors.Join(inWords(err, r), ctx.Err())
		}
		if err := n.sync(ctx, r, p.flushed()); err != nil {
			return w, err
		}
	}
}

// run is the window itself. From the first freeze to the last thaw it prints and logs nothing, opens no file but the
// counters in sysfs, and waits for nothing without a deadline.
func (w *window) run(ctx context.Context, r Request, n Node, members []member, p Plan, client *freezer.Client) error {
	var readings []reading
	begin := time.Now()
	wctx, cancel := context.WithTimeout(ctx, r.MaxFreeze-margin)
	defer cancel()

	var lease *freezer.Lease
	var err error
	for _, step := range p.Steps {
		if lease, err = grow(wctx, client, lease, step, p); err != nil {
			break
		}
		var before reading
		if before, err = n.read(wctx, step.Freeze); err != nil {
			break
		}
		readings = append(readings, before)
		w.begun = true
		if err = w.snapshot(wctx, r, members, step.Snapshot, lease); err != nil {
			break
		}
	}
	if err == nil {
		for i := range readings {
			if err = readings[i].again(wctx, n); err != nil {
				break
			}
		}
	}
	if lease != nil {
		w.thaw(lease)
	}
	for _, b := range readings {
		w.moved = append(w.moved, b.moved()...)
		w.unverified = append(w.unverified, b.uncounted(ctx, n)...)
	}
	if err == nil {
		w.itself(p)
	}
	w.jumped = time.Now().Round(0).Sub(begin.Round(0)) - time.Since(begin)
	return err
}

// itself reports on what backends froze by themselves. Nothing proves it: the snapshot's point in time is within the
// freeze, and what is written to the device just after it is so by right.
func (w *window) itself(p Plan) {
	for i, m := range p.Members {
		for _, f := range m.Itself {
			w.frozen = append(w.frozen, FrozenFilesystem{f.Filesystem, milliseconds(w.took[i]), true})
			w.unverified = append(w.unverified, fmt.Sprintf("%s (%s): its backend froze it in the moment of the snapshot, not we; a stranger's thaw in that moment would not have been noticed", f.Filesystem, f.Type))
		}
	}
}

// thaw ends the lease and keeps its report. It waits by the freezer's own time-outs, not by the cut's context.
func (w *window) thaw(lease *freezer.Lease) {
	report, err := lease.Thaw(context.Background())
	if err != nil {
		w.lost = append(w.lost, err.Error())
	}
	for _, f := range report {
		w.frozen = append(w.frozen, FrozenFilesystem{f.Mount, milliseconds(f.Duration), false})
		if !f.Held {
			w.lost = append(w.lost, fmt.Sprintf("%s: %s", f.Mount, f.Why))
		}
	}
}

// snapshot takes the snapshots of a step in parallel, and returns when all are fixed, one has failed, the lease is
// lost or ctx is over, whichever is first. Calls still under way then are settled by discard.
func (w *window) snapshot(ctx context.Context, r Request, members []member, step []int, lease *freezer.Lease) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	done := make(chan error, len(step))
	for _, i := range step {
		w.calls.Go(func() {
			begin := time.Now()
			s, err := members[i].adapter.CreateSnapshot(ctx, members[i].volume.ID, r.Name)
			w.snapshots[i], w.took[i] = s, time.Since(begin)
			done <- err
		})
	}
	var lost <-chan struct{}
	if lease != nil {
		lost = lease.Lost()
	}
	for range step {
		select {
		case err := <-done:
			if err != nil {
				return err
			}
		case <-lost:
			return fault.Errorf(fault.Void, "the freeze was lost before every snapshot was taken: %w", lease.Err())
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// settle waits for snapshot calls that outlived the freeze, so that what they made can be deleted.
func (w *window) settle(ctx context.Context) {
	settled := make(chan struct{})
	go func() { w.calls.Wait(); close(settled) }() // ends with the last call; a call that never ends keeps it for ever
	select {
	case <-settled:
	case <-ctx.Done():
	}
}

// grow freezes a step's filesystems: under the lease, or with a lease over the whole plan whose first step it is.
func grow(ctx context.Context, client *freezer.Client, lease *freezer.Lease, step Step, p Plan) (*freezer.Lease, error) {
	if len(step.Freeze) == 0 {
		return lease, nil
	}
	if lease != nil {
		return lease, lease.More(ctx, len(step.Freeze))
	}
	var all []freezer.Filesystem
	for _, f := range p.frozen() {
		all = append(all, freezer.Filesystem{Mount: f.Filesystem, Device: freezer.Device(f.Device), Type: f.Type})
	}
	return client.Freeze(ctx, freezer.Request{Filesystems: all, First: len(step.Freeze), MaxFreeze: p.MaxFreeze})
}

// stage lets the backends do ahead what they can, for the volumes that nothing will write to while they are cut, and for
// those that freeze themselves.
func stage(ctx context.Context, r Request, members []member, p Plan) error {
	return each(len(members), func(i int) error {
		stager, ok := adapters.As[adapters.Stager](members[i].adapter)
		if !ok || p.Members[i].Consistency != adapters.FilesystemConsistent {
			return nil
		}
		return stager.Stage(ctx, members[i].volume.ID, r.Name)
	})
}

// reading is the write counters of the devices below frozen filesystems, at two moments.
type reading struct {
	devices       []mounts.Device
	names         []string
	before, after []mounts.Counters
}

// read reads the counters of the devices for the first time.
func (n Node) read(ctx context.Context, frozen []Freezing) (reading, error) {
	var b reading
	for _, f := range frozen {
		for _, d := range f.Members {
			b.devices = append(b.devices, d)
			b.names = append(b.names, f.Filesystem)
		}
	}
	var err error
	b.before, err = n.Host.Counters(ctx, b.devices...)
	return b, err
}

// again reads them for the second time.
func (b *reading) again(ctx context.Context, n Node) (err error) {
	b.after, err = n.Host.Counters(ctx, b.devices...)
	return err
}

// uncounted says in words for which devices the counters prove nothing. It is called after the thaw: where a device is
// said to have none, it is tried.
func (b reading) uncounted(ctx context.Context, n Node) (words []string) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for i, c := range b.after {
		if c.Kept {
			continue
		}
		if counts, err := n.Host.CountsRegardless(ctx, b.devices[i]); err != nil || !counts {
			words = append(words, fmt.Sprintf("%s: the kernel keeps no write counters for device %s", b.names[i], b.devices[i]))
		}
	}
	return words
}

// moved names the filesystems whose devices were written to between the readings.
func (b reading) moved() (names []string) {
	for i := range b.after {
		if b.after[i].Moved(b.before[i]) {
			names = append(names, fmt.Sprintf("%s (device %s)", b.names[i], b.devices[i]))
		}
	}
	return names
}

func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// inWords gives an error from the window a kind and the deadline's name.
func inWords(err error, r Request) error {
	var f *freezer.Error
	switch {
	case err == nil:
		return nil
	case errors.Is(err, context.DeadlineExceeded):
		return fault.Errorf(fault.Unavailable, "the cut %q was given up: not every snapshot was taken within the freeze's deadline of %v; everything is thawed", r.Name, r.MaxFreeze)
	case errors.As(err, &f):
		kind := map[freezer.Reason]fault.Kind{
			freezer.Busy: fault.Busy, freezer.Refused: fault.Unsupported, freezer.Invalid: fault.Invalid,
			freezer.Lost: fault.Void, freezer.Unavailable: fault.Unavailable,
		}[f.Reason]
		return &fault.Error{Kind: kind, RetryAfter: f.Wait, Err: err}
	default:
		return err
	}
}
