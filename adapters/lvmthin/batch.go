package lvmthin

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

// batches makes snapshots, those of one group together. LVM takes the group's lock for every snapshot, so that commands
// side by side wait for each other; one program that makes several saves what each would need to start and to look at
// the disks. The first request goes at once, alone; those that come while it runs go together when it is done.
type batches struct {
	a *Adapter

	mu      sync.Mutex
	waiting map[groupID][]*request
	busy    map[groupID]bool
	now     map[groupID]*batch // under way
	took    time.Duration      // for one snapshot, lately
	working sync.WaitGroup
}

func newBatches(a *Adapter) *batches {
	return &batches{a: a, waiting: map[groupID][]*request{}, busy: map[groupID]bool{}, now: map[groupID]*batch{}, took: 300 * time.Millisecond}
}

// request is a snapshot to be made.
type request struct {
	p      place
	volume *logical
	record record
	name   string // of the logical volume to be
	with   *batch // that it is made with; nil while it is waiting
	done   chan struct{}
	err    error
}

// batch is what one program makes.
type batch struct {
	ctx    context.Context
	leave  context.CancelFunc
	absent int // requests whose callers have left
	all    []*request
	over   chan struct{} // closed when all are made, or cannot be
}

// create makes a snapshot, or returns at the context's end, while LVM may be still at it.
func (b *batches) create(ctx context.Context, p place, l *logical, r record) error {
	q := &request{p: p, volume: l, record: r, name: snapshotVolume(l.name, adapters.Name(r.wanted)), done: make(chan struct{})}
	b.mu.Lock()
	id := p.group.id
	b.waiting[id] = append(b.waiting[id], q)
	if !b.busy[id] {
		b.busy[id] = true
		b.working.Go(func() { b.work(id) })
	}
	b.mu.Unlock()
	select {
	case <-q.done:
		return q.err
	case <-ctx.Done():
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if q.with == nil { // not begun: it shall not be made behind the caller's back
		b.waiting[id] = slices.DeleteFunc(b.waiting[id], func(w *request) bool { return w == q })
		return context.Cause(ctx)
	}
	if q.with.absent++; q.with.absent == len(q.with.all) {
		q.with.leave() // nobody is left to wait for the group's lock, or for the program
	}
	return fault.Errorf(fault.Unavailable, "volume %s: lvcreate is still running, and is left to finish, because LVM must not be killed: %w", p.id, context.Cause(ctx))
}

// work makes what is waiting for a group, until nothing is.
func (b *batches) work(id groupID) {
	for {
		b.mu.Lock()
		all := b.waiting[id]
		delete(b.waiting, id)
		if len(all) == 0 {
			b.busy[id] = false
			b.mu.Unlock()
			return
		}
		now := &batch{all: all, over: make(chan struct{})}
		b.now[id] = now
		now.ctx, now.leave = context.WithCancel(context.Background())
		for _, q := range all {
			q.with = now
		}
		b.mu.Unlock()
		start := time.Now()
		b.make(now)
		now.leave()
		b.mu.Lock()
		b.took = (b.took + time.Since(start)/time.Duration(len(all))) / 2
		delete(b.now, id)
		b.mu.Unlock()
		close(now.over)
		for _, q := range all {
			close(q.done)
		}
	}
}

// settled waits for what is being made in a group now, perhaps for callers that have left.
func (b *batches) settled(ctx context.Context, id groupID) error {
	b.mu.Lock()
	now := b.now[id]
	b.mu.Unlock()
	if now == nil {
		return nil
	}
	select {
	case <-now.over:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// close waits for what is being made for callers that have left, but not for ever.
func (b *batches) close(patience time.Duration) error {
	idle := make(chan struct{})
	go func() {
		b.working.Wait()
		close(idle)
	}()
	select {
	case <-idle:
		return nil
	case <-time.After(patience):
		return fault.Errorf(fault.Busy, "snapshots are still being made for calls that have ended")
	}
}

// forecast is how long n snapshots of one group take.
func (b *batches) forecast(n int) time.Duration {
	b.mu.Lock()
	defer b.mu.Unlock()
	return time.Duration(n) * b.took
}

// make makes snapshots of volumes of one group, and sets every request's error.
func (b *batches) make(now *batch) {
	all := now.all
	g := all[0].p.group
	volumes := make([]*logical, len(all))
	for i, q := range all {
		volumes[i] = q.volume
	}
	in := b.a.intent(g, volumes...)
	if len(all) == 1 {
		_, all[0].err = b.a.change(now.ctx, g, task{args: createArgs(all[0]), frozen: true, intent: in})
	} else {
		in.Line = fmt.Sprintf("lvm: lvcreate -s of %d volumes", len(all))
		c, err := b.a.change(now.ctx, g, task{frozen: true, intent: in, script: func(options []string) string { return script(all, options) }})
		for _, q := range all {
			q.err = outcome(q, c, err)
		}
	}
	for _, q := range all {
		if q.err != nil {
			q.err = explain(q, q.err)
		}
	}
}

// createArgs are the command for a request.
func createArgs(q *request) []string {
	return snapshotArgs(q.p.group.name+"/"+q.volume.name, q.name, q.record.tags())
}

// snapshotArgs are the command for a snapshot: read-only, and not active until it is read.
func snapshotArgs(of, name string, tags []string) []string {
	args := []string{"lvcreate", "-q", "-y", "-s", "-pr", "-ky", "-n", name}
	for _, t := range tags {
		args = append(args, "--addtag", t)
	}
	return append(args, of)
}

// script is a batch for the program lvm, which reads commands from its standard input. It splits words at spaces and
// takes single quotes off (lvm_split in lvm2's tools/lvmcmdline.c); no word of ours has one in it.
func script(all []*request, options []string) string {
	var s strings.Builder
	for _, q := range all {
		for _, word := range append(createArgs(q), options...) {
			s.WriteString("'" + word + "' ")
		}
		s.WriteString("\n")
	}
	return s.String()
}

// outcome finds out what became of one snapshot of a batch: the program says of each that it made it.
func outcome(q *request, c *command, err error) error {
	if c == nil {
		return err
	}
	for line := range strings.Lines(string(c.stdout)) {
		if strings.TrimSpace(line) == fmt.Sprintf("Logical volume %q created.", q.name) {
			return nil
		}
	}
	if err == nil {
		err = fault.Errorf(complaint(c.stderr), "lvcreate -s: %s", gist(c.stderr))
	}
	return err
}

// errTaken says that a logical volume of that name exists.
var errTaken = errors.New("a logical volume of that name exists")

// explain adds what a caller can do about a failure.
func explain(q *request, err error) error {
	if strings.Contains(err.Error(), fmt.Sprintf("%q already exists", q.name)) {
		return fault.Errorf(fault.Busy, "volume %s: %w: %w", q.p.id, errTaken, err)
	}
	if strings.Contains(err.Error(), "suspend ioctl on") {
		return fault.Errorf(fault.Busy, "volume %s: %w; this kernel cannot snapshot a volume whose filesystem is frozen already: let device-mapper freeze it", q.p.id, err)
	}
	return fmt.Errorf("volume %s: %w", q.p.id, err)
}
