package freezer

import "time"

// The rules by which holder and guard act on one ledger entry, as a pure function. Both look every tick.
const (
	tick = 50 * time.Millisecond
	// guardGrace is how much later than the holder the guard acts.
	guardGrace = 250 * time.Millisecond
	// patience is how long the next thaw waits for the one before it, so that they go in reverse order. A thaw that
	// hangs holds up no other.
	patience = 250 * time.Millisecond
	// A process whose beat has not moved for so many ticks of the other has stalled (stopped, or starved). Ticks of
	// one's own are counted, and not time, so that two processes that were stopped together do not blame each other.
	stalledTicks = 10
)

// role is which of the two processes looks.
type role struct {
	mine, theirs state
	grace        time.Duration
}

var (
	asHolder = role{mine: thawingHolder, theirs: thawingGuard}
	asGuard  = role{mine: thawingGuard, theirs: thawingHolder, grace: guardGrace}
)

// view is what one process sees of an entry.
type view struct {
	state      state
	now, until int64 // CLOCK_BOOTTIME, ns

	stalled    bool // the other process does not move
	finished   bool // the other process will never run again
	threadGone bool // and its thread that was in FIFREEZE has left the kernel
}

// action is what to do about it.
type action int

const (
	nothing action = iota
	doom           // mark a freeze under way, so that its own thread thaws it when it lands
	take           // claim the thaw, by compare-and-swap from the state seen, and call FITHAW
	fence          // kill the other process: it holds a claim or a freeze that it does not bring to an end
)

// decide is the whole of the safety argument:
//
//   - A frozen filesystem that is overdue is thawed by whoever comes first; the claim keeps the other away.
//   - A freeze under way is thawed by the thread that is in it. Nobody else may touch it while that thread can still
//     return, for it may return EBUSY: then the freeze is a stranger's.
//   - What the other process has begun is taken over only once it can no longer go on by itself, so that no FITHAW is
//     ever sent late, into the freeze of somebody else. A process that stands still is killed for that.
func decide(r role, v view) action {
	overdue := v.now >= v.until+int64(r.grace) || v.finished
	switch v.state {
	case frozen:
		if overdue {
			return take
		}
	case freezing, doomed:
		switch {
		case r == asHolder && overdue && v.state == freezing:
			return doom
		case r == asHolder: // the thread is our own
		case v.finished && v.threadGone:
			return take
		case overdue && v.stalled && !v.finished:
			return fence
		}
	case r.theirs:
		switch {
		case v.finished:
			return take
		case v.stalled:
			return fence
		}
	}
	return nothing
}

// ordered tells whether entry i may be thawed now, given the entries after it, which were frozen later: not while a
// thaw of one of them has been running for less than patience.
func ordered(l *ledger, i int, now int64) bool {
	for j := i + 1; j < MaxFilesystems; j++ {
		e := l.entry(j)
		switch e.state() {
		case thawingHolder, thawingGuard, thawingSweeper:
			if now-e.ClaimedAt.Load() < int64(patience) {
				return false
			}
		}
	}
	return true
}

// warden applies decide to every entry, in either process.
type warden struct {
	role    role
	ledger  *ledger
	threads *threads
	other   *process
	own     func(*header)        // counts our beat up
	seen    func(*header) uint64 // reads the other's
	fd      func(i int) int      // the descriptor of an entry, -1 if this process has none
	fence   func()               // kill the other process
	settled chan struct{}        // capacity 1: an entry was settled

	lastBeat uint64
	still    int       // ticks of ours without a beat of the other
	counted  time.Time // when still last changed
}

// look acts once on everything. It never blocks.
func (w *warden) look(otherGone bool) {
	h := w.ledger.header()
	w.own(h)
	if b := w.seen(h); b != w.lastBeat {
		w.lastBeat = b
		w.rest()
	} else if time.Since(w.counted) >= tick { // a look between ticks counts for nothing, and a long sleep for one tick
		w.still++
		w.counted = time.Now()
	}
	finished := otherGone || w.other.finished()
	for i := MaxFilesystems - 1; i >= 0; i-- {
		e := w.ledger.entry(i)
		fd := w.fd(i)
		if fd < 0 {
			continue
		}
		now := boottime()
		v := view{state: e.state(), now: now, until: e.Until.Load(), stalled: w.still >= stalledTicks, finished: finished}
		if v.state.settled() {
			continue
		}
		if finished && w.role == asGuard && (v.state == freezing || v.state == doomed) {
			v.threadGone = otherGone || w.other.threadGone(e.Thread.Load())
		}
		switch decide(w.role, v) {
		case doom:
			e.swap(freezing, doomed)
		case fence:
			w.fence()
		case take:
			if ordered(w.ledger, i, now) && e.claim(v.state, w.role.mine, now) {
				w.threads.run(func() {
					thaw(e, fd)
					w.notify()
				})
			}
		}
	}
}

func (w *warden) notify() {
	select {
	case w.settled <- struct{}{}:
	default:
	}
}

// rest forgets how long the other has stood still, when nothing is frozen and nobody beats.
func (w *warden) rest() { w.still, w.counted = 0, time.Now() }
