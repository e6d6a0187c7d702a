package freezer

import (
	"fmt"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// grant is a lease as the holder sees it. Its entries of the ledger are its own from claimEntries to retire.
type grant struct {
	request  Request
	started  int64 // CLOCK_BOOTTIME, ns, as all times here
	deadline int64

	mu      sync.Mutex
	entries []int // indexes in the ledger, ascending in the order of freezing
	fds     []int
	below   [][]Device // what each filesystem is stored on
	next    int        // the first that FIFREEZE was not called on yet
	busy    bool       // it is being called on some
	armed   bool       // the guard has its descriptors too
	until   int64      // the earlier of deadline and last beat + heartbeat
	endedAt int64
	asked   bool   // it was ended by its Thaw, in time
	why     string // why it ended
	report  Report // made when retired

	prepared chan struct{} // closed when nothing more is opened or armed for it
	over     chan struct{} // closed when it ended, for whatever reason
	hanging  chan struct{} // closed when, after that, only a FIFREEZE is left that has not come back
	settled  chan struct{} // closed when, after that, nothing of it is frozen or will be
	retired  chan struct{} // closed when its descriptors are closed in both processes
}

func newGrant(r Request, received int64) *grant {
	g := &grant{
		request: r, started: received, deadline: received + int64(r.MaxFreeze),
		prepared: make(chan struct{}), over: make(chan struct{}), hanging: make(chan struct{}), settled: make(chan struct{}), retired: make(chan struct{}),
	}
	g.until = min(g.deadline, received+int64(r.Heartbeat))
	return g
}

// end ends the lease, the first time. From then on its entries are overdue.
func (g *grant) end(l *ledger, why string, asked bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.isOver() {
		return
	}
	now := boottime()
	if asked && now >= g.until { // a Thaw that comes too late finds a freeze that we no longer vouch for
		why, asked = g.expiry(now), false
	}
	g.endedAt, g.why, g.asked, g.until = now, why, asked, now
	for _, i := range g.entries {
		l.entry(i).Until.Store(now)
	}
	close(g.over)
}

// beat extends the lease to a heartbeat from now, never beyond the deadline, and never when it has run out.
func (g *grant) beat(l *ledger) {
	g.mu.Lock()
	defer g.mu.Unlock()
	now := boottime()
	if g.isOver() || now >= g.until {
		return
	}
	g.until = min(g.deadline, now+int64(g.request.Heartbeat))
	for _, i := range g.entries {
		l.entry(i).Until.Store(g.until)
	}
}

// isOver is asked with mu held, or by those who can do with an answer from a moment ago.
func (g *grant) isOver() bool {
	select {
	case <-g.over:
		return true
	default:
		return false
	}
}

// left is how long the lease still runs, and why it has run out if that is not positive.
func (g *grant) left(now int64) (time.Duration, string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return time.Duration(g.until - now), g.expiry(now)
}

func (g *grant) expiry(now int64) string {
	if now >= g.deadline {
		return fmt.Sprintf("the deadline of %v has passed", time.Duration(g.deadline-g.started))
	}
	return fmt.Sprintf("the client gave no sign of life for %v", g.request.Heartbeat)
}

// reason is why it ended.
func (g *grant) reason() string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.why
}

// fill writes the intent into the ledger: everything that a sweep must know.
func (g *grant) fill(l *ledger, n int, m mount) {
	e, f := l.entry(g.entries[n]), g.request.Filesystems[n]
	e.Device, e.BlockDev = uint64(f.Device), 0
	put(e.Type[:], f.Type)
	put(e.Mount[:], f.Mount)
	put(e.Source[:], m.Source)
	var st unix.Stat_t
	if within(m.Source, "/dev") && unix.Stat(m.Source, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFBLK {
		e.BlockDev = st.Rdev
	}
	e.Thread.Store(0)
	e.FrozenAt.Store(0)
	e.ClaimedAt.Store(0)
	e.ThawedAt.Store(0)
	e.Until.Store(g.until)
}

// advance takes the next count filesystems, 0 for all that are left: [from, to).
func (g *grant) advance(count int) (from, to int, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	left := len(g.entries) - g.next
	switch {
	case g.busy:
		return 0, 0, errorf(Invalid, "", "the lease's filesystems are being frozen already")
	case count < 0 || count > left:
		return 0, 0, errorf(Invalid, "", "%d more filesystems: the lease has %d left", count, left)
	case count == 0:
		count = left
	}
	from, to = g.next, g.next+count
	g.next, g.busy = to, true
	return from, to, nil
}

func (g *grant) pause() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.busy = false
}

// awaitRetired waits until all of a lease that failed is thawed, but not for a FIFREEZE that hangs.
func (g *grant) awaitRetired() {
	late := time.After(time.Second)
	select {
	case <-g.retired:
	case <-g.hanging:
	case <-late:
	}
}

// finalReport is the report of a retired lease, or what can be said of one whose thaw hangs.
func (g *grant) finalReport(l *ledger) Report {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.report != nil {
		return g.report
	}
	return g.makeReport(l)
}

// makeReport says what happened to each. With mu held.
func (g *grant) makeReport(l *ledger) Report {
	out := make(Report, len(g.request.Filesystems))
	for n, f := range g.request.Filesystems {
		out[n] = Frozen{Filesystem: f, Why: g.why}
		if n >= len(g.entries) {
			continue
		}
		e := l.entry(g.entries[n])
		r := &out[n]
		if e.state() == thawed || e.state() == gone {
			if at := e.FrozenAt.Load(); at != 0 {
				r.Duration = time.Duration(e.ThawedAt.Load() - at)
			}
		}
		switch s := e.state(); {
		case s == gone:
			r.Why = "it was found not frozen: somebody else had thawed it"
		case s == idle:
			r.Why = "it was not frozen yet"
		case s != thawed && s != unfrozen:
			r.Why = fmt.Sprintf("its thaw has not come back yet (%v)", s)
		case s == thawed && g.asked && e.ClaimedAt.Load() >= g.endedAt:
			r.Held, r.Why = true, ""
		case g.asked && s == thawed:
			r.Why = "it was thawed before it was asked for"
		}
	}
	return out
}
