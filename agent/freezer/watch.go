package freezer

import (
	"context"
	"slices"
	"time"
)

// watch looks at everything every tick while there is a lease, and ends leases. It never waits for anything.
func (h *holder) watch(ctx context.Context) {
	for {
		grants := h.unretired()
		var ticks <-chan time.Time
		stop := ctx.Done()
		if len(grants) > 0 {
			ticks, stop = time.After(h.until(grants)), nil
		} else {
			h.rest()
		}
		select {
		case <-ticks:
		case <-h.woken:
		case <-h.settled:
		case <-stop:
			return
		}
		guard, grants := h.theGuard(), h.unretired()
		for _, g := range grants {
			h.check(g, guard)
		}
		h.look(guard == nil || guard.dead())
		for _, g := range grants {
			h.settle(g)
		}
	}
}

func (h *holder) unretired() []*grant {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.grants)
}

func (h *holder) theGuard() *guardLink {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.guard
}

// until is the time to the next look: a tick, or less when a lease ends before.
func (h *holder) until(grants []*grant) time.Duration {
	next := tick
	for _, g := range grants {
		if left, _ := g.left(boottime()); left > 0 {
			next = min(next, left)
		}
	}
	return next
}

// check ends a lease that has run out, or that the guard no longer stands behind.
func (h *holder) check(g *grant, guard *guardLink) {
	if g.isOver() {
		return
	}
	if left, why := g.left(boottime()); left <= 0 {
		h.end(g, why, false)
	}
	g.mu.Lock()
	entries, armed := g.entries, g.armed
	g.mu.Unlock()
	if !armed {
		h.rest()
		return
	}
	switch {
	case guard == nil || guard.dead():
		h.end(g, "the freezer's guard process is gone", false)
	case h.still >= 2*stalledTicks:
		h.end(g, "the freezer's guard process does not answer", false)
	}
	for _, i := range entries {
		if h.ledger.entry(i).state() == thawingGuard {
			h.end(g, "the guard thawed, because the freezer's first process stood still", false)
		}
	}
}

// settle notes that nothing of an ended lease is left, or nothing but a FIFREEZE that hangs.
func (h *holder) settle(g *grant) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.isOver() {
		return
	}
	landing := false
	for _, i := range g.entries {
		switch s := h.ledger.entry(i).state(); {
		case s == doomed:
			landing = true
		case !s.settled():
			return
		}
	}
	if landing {
		shut(g.hanging)
	} else {
		shut(g.settled)
	}
}

// shut closes a channel that may be closed already. Only for one goroutine.
func shut(c chan struct{}) {
	select {
	case <-c:
	default:
		close(c)
	}
}
