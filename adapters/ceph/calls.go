//go:build ceph && cgo

package ceph

import (
	"context"
	"errors"
	"sync"
	"time"

	"stillpoint.io/stillpoint/fault"
)

const (
	// slow is how long a call that was left to itself may still run before the backend counts as out of reach.
	slow = time.Second
	// callsMax is the most calls, and so the most threads, that are in Ceph's libraries at once for one backend.
	callsMax = 128
)

// calls keeps account of what is under way in Ceph's libraries. No call there can be cancelled, so each runs in a
// goroutine of its own, and who asked waits for it no longer than for its context.
type calls struct {
	owner string        // the backend's name, for messages
	limit time.Duration // for one call
	slots chan struct{}

	mu    sync.Mutex
	under map[*call]struct{}
	idle  *sync.Cond // under became empty
	hung  bool       // a call that hung has ended since wasHung was asked
}

func newCalls(backend string, limit time.Duration) *calls {
	c := &calls{owner: backend, limit: limit, slots: make(chan struct{}, callsMax), under: map[*call]struct{}{}}
	c.idle = sync.NewCond(&c.mu)
	return c
}

// call is one of them, as its own goroutine sees it.
type call struct {
	ctx   context.Context
	all   *calls
	begun time.Time
	state callState // guarded by all.mu
	undo  []func()
	after []func()
}

type callState uint8

const (
	callRuns callState = iota
	callAnswered
	callAbandoned
)

// wanted is nil as long as somebody waits for the call: what takes several steps asks between them.
func (c *call) wanted() error { return c.ctx.Err() }

func (c *call) isAbandoned() bool {
	c.all.mu.Lock()
	defer c.all.mu.Unlock()
	return c.state == callAbandoned
}

// onAbandon has something undone if nobody waits for the call any more when it ends, or if it fails. The last is undone
// first.
func (c *call) onAbandon(f func()) { c.undo = append(c.undo, f) }

// later has something done after the answer was given. The call counts as under way until then.
func (c *call) later(f func()) { c.after = append(c.after, f) }

// do makes a call into Ceph's libraries and waits for it, or for the end of the context, whichever comes first. In the
// latter case the call is abandoned: it goes on by itself, and what its function noted for that case is undone when it
// ends. The function must use nothing that the caller goes on using.
//
// While a call that was abandoned has been running for longer than slow, do answers Unavailable at once. It waits for
// the limit at most, also where the context has no end: not everything in the libraries ends by their own time limits (the
// registration of a watcher does not).
func do[T any](ctx context.Context, all *calls, f func(*call) (T, error)) (T, error) {
	limited, cancel := all.limited(ctx)
	defer cancel()
	return doLong(limited, all, f)
}

// limited ends a context after the limit of a call, and says then whose time is up.
func (c *calls) limited(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(ctx, c.limit, fault.Errorf(fault.Unavailable, "Ceph did not answer within %v: see `ceph -s`", c.limit))
}

// doLong is do without a limit: for what takes as long as the data are many.
func doLong[T any](ctx context.Context, all *calls, f func(*call) (T, error)) (T, error) {
	if err := all.admit(ctx); err != nil {
		var none T
		return none, err
	}
	return run(ctx, all, func(c *call) (T, error) {
		c.later(all.leave)
		return f(c)
	})
}

// admit waits for a slot, which leave gives back.
func (c *calls) admit(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := c.healthy(); err != nil {
		return err
	}
	select {
	case c.slots <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ended(ctx)
	}
}

// ended is why a context ended: its own error, or that of our limit.
func ended(ctx context.Context) error {
	if cause := context.Cause(ctx); errors.Is(cause, fault.Unavailable) {
		return cause
	}
	return ctx.Err()
}

func (c *calls) leave() { <-c.slots }

// run is do without admission: for what must be done also when nothing answers, such as closing.
func run[T any](ctx context.Context, all *calls, f func(*call) (T, error)) (T, error) {
	type answer struct {
		value T
		err   error
	}
	c := &call{ctx: ctx, all: all, begun: time.Now()}
	done := make(chan answer, 1)
	all.begin(c)
	go func() {
		defer all.end(c)
		value, err := f(c)
		kept := all.settle(c, callAnswered) && err == nil
		done <- answer{value, err}
		for i := len(c.undo) - 1; i >= 0 && !kept; i-- {
			c.undo[i]()
		}
		for _, f := range c.after {
			f()
		}
	}()
	var none T
	select {
	case a := <-done:
		return a.value, a.err
	case <-ctx.Done():
		if all.settle(c, callAbandoned) {
			return none, ended(ctx)
		}
		a := <-done // it was quicker after all
		return a.value, a.err
	}
}

func (c *calls) begin(one *call) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.under[one] = struct{}{}
}

func (c *calls) end(one *call) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.under, one)
	c.hung = c.hung || one.state == callAbandoned && time.Since(one.begun) > slow
	if len(c.under) == 0 {
		c.idle.Broadcast()
	}
}

// settle decides once how a call ended, and reports whether it was decided so.
func (c *calls) settle(one *call, s callState) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if one.state == callRuns {
		one.state = s
	}
	return one.state == s
}

// abandoned counts the calls that nobody waits for any more, and those of them that hang.
func (c *calls) abandoned() (all, hanging int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for one := range c.under {
		if one.state == callAbandoned {
			all++
			if time.Since(one.begun) > slow {
				hanging++
			}
		}
	}
	return all, hanging
}

// wasHung reports whether a call that hung has ended since it was last asked.
func (c *calls) wasHung() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	hung := c.hung
	c.hung = false
	return hung
}

// healthy is nil if nothing hangs.
func (c *calls) healthy() error {
	if _, n := c.abandoned(); n > 0 {
		return fault.Errorf(fault.Unavailable, "backend %s: Ceph does not answer: %d calls to it hang beyond their deadlines; see `ceph -s`", c.owner, n)
	}
	return nil
}

// wait waits until nothing is under way, at most for a time, and returns how many calls then are.
func (c *calls) wait(most time.Duration) int {
	timer := time.AfterFunc(most, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.idle.Broadcast()
	})
	defer timer.Stop()
	end := time.Now().Add(most)
	c.mu.Lock()
	defer c.mu.Unlock()
	for len(c.under) > 0 && time.Now().Before(end) {
		c.idle.Wait()
	}
	return len(c.under)
}

// turns let the changes of one thing be made one after the other.
type turns[K comparable] struct {
	mu    sync.Mutex
	taken map[K]chan struct{}
}

func newTurns[K comparable]() *turns[K] { return &turns[K]{taken: map[K]chan struct{}{}} }

// take waits for the turn, which the call gives back when it has ended.
func (t *turns[K]) take(one *call, n K) error {
	for {
		t.mu.Lock()
		other, taken := t.taken[n]
		if !taken {
			mine := make(chan struct{})
			t.taken[n] = mine
			one.later(func() {
				t.mu.Lock()
				defer t.mu.Unlock()
				delete(t.taken, n)
				close(mine)
			})
		}
		t.mu.Unlock()
		if !taken {
			return nil
		}
		select {
		case <-other:
		case <-one.ctx.Done():
			return one.ctx.Err()
		}
	}
}
