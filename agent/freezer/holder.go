package freezer

import (
	"errors"
	"fmt"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// holder is the first process: it owns the leases.
type holder struct {
	*warden
	ledger   *ledger
	threads  *threads
	records  string
	version  string
	weakness string
	paths    []string          // whose filesystems are refused besides the system's
	own      map[Device]string // superblocks of our own open files and folders
	woken    chan struct{}     // capacity 1: there is a new lease, or one ended
	group    sync.WaitGroup    // every goroutine that outlives a call

	starting sync.Mutex // held while a guard is started; never together with mu for longer than a look

	mu      sync.Mutex
	closing bool
	guard   *guardLink
	current *grant                       // the lease that is granted, or nil
	grants  []*grant                     // all that are not retired
	fds     [MaxFilesystems]int          // of the entries; -1
	counts  map[Device]*FilesystemStatus // since the start
}

// newHolder makes the ledger, starts the guard and locks everything in memory.
func newHolder(o Options, own map[Device]string) (*holder, error) {
	l, err := createLedger(o.Records)
	if err != nil {
		return nil, err
	}
	h := &holder{
		ledger: l, threads: newThreads(), records: o.Records, version: o.Version, paths: o.Refuse, own: own,
		woken: make(chan struct{}, 1), counts: map[Device]*FilesystemStatus{},
	}
	for i := range h.fds {
		h.fds[i] = -1
	}
	h.warden = &warden{
		role: asHolder, ledger: l, threads: h.threads, other: &l.header().Guard,
		own:     func(hd *header) { hd.HolderBeat.Add(1) },
		seen:    func(hd *header) uint64 { return hd.GuardBeat.Load() },
		fd:      h.descriptor,
		fence:   h.killGuard,
		settled: make(chan struct{}, 1),
	}
	if err := h.ensureGuard(); err != nil {
		h.close()
		return nil, err
	}
	h.threads.ensure(4)
	if h.weakness, err = harden(); err != nil {
		h.close()
		return nil, err
	}
	if h.weakness != "" {
		o.Log("%s", h.weakness)
	}
	return h, nil
}

// freeze freezes everything or nothing. When it fails the lease is over and, but for an ioctl that hangs, retired.
func (h *holder) freeze(g *grant, gone <-chan struct{}) error {
	err := limits(g.request)
	if err == nil {
		err = h.enlist(g)
	}
	if err != nil {
		g.end(h.ledger, err.Error(), false)
		close(g.retired)
		return err
	}
	ready := make(chan error, 1)
	h.threads.run(func() { // it opens files: that might hang, though nothing should
		err := h.prepare(g)
		close(g.prepared)
		ready <- err
	})
	err = h.await(g, ready, gone)
	if err == nil {
		err = h.freezeNext(g, g.request.First, gone)
	}
	if err != nil {
		h.end(g, err.Error(), false)
	}
	h.group.Go(func() { h.retire(g) }) // whatever happens, the watch settles the entries, and this waits for it
	if err != nil {
		g.awaitRetired()
	}
	return err
}

// more freezes more of what the lease was given for. When it fails the lease is over, as with freeze.
func (h *holder) more(g *grant, count int, gone <-chan struct{}) error {
	err := h.freezeNext(g, count, gone)
	if err != nil {
		h.end(g, err.Error(), false)
		g.awaitRetired()
	}
	return err
}

// enlist makes g the current lease, if the request may be tried at all.
func (h *holder) enlist(g *grant) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closing {
		return errorf(Unavailable, "", "the freezer is stopping")
	}
	if c := h.current; c != nil {
		wait, _ := c.left(boottime())
		return &Error{Reason: Busy, Wait: max(wait, 0), Message: "the freezer has another lease"}
	}
	h.current = g
	h.grants = append(h.grants, g)
	debug.SetGCPercent(-1) // until retire; the memory limit stays as the way out
	h.wake()
	return nil
}

// prepare judges the request, opens the mount points, writes the intent and arms the guard.
func (h *holder) prepare(g *grant) error {
	if err := h.ensureGuard(); err != nil {
		return errorf(Unavailable, "", "%v", err)
	}
	mounts, err := readMounts("/proc/self/mountinfo")
	if err != nil {
		return errorf(Unavailable, "", "%v", err)
	}
	s := surroundings{mounts: mounts, protected: protect(mounts, h.paths, h.own), storedOn: func(f Filesystem, m mount) []Device {
		return storedOn(mounts, f.Device, m.Source)
	}}
	if g.below, err = accept(g.request, s); err != nil {
		return err
	}
	if err := h.rested(g.request.Filesystems); err != nil {
		return err
	}
	var fds []int
	give := func() {
		for _, fd := range fds {
			unix.Close(fd)
		}
	}
	for _, f := range g.request.Filesystems {
		fd, err := openVerified(f)
		if err != nil {
			give()
			return err
		}
		fds = append(fds, fd)
	}
	if err := h.claimEntries(g, mounts, fds); err != nil {
		give()
		return err
	}
	h.threads.ensure(len(fds) + 2)
	return h.arm(g)
}

// rested refuses a superblock that was frozen too short a time ago, by any freezer of this machine, or still is.
func (h *holder) rested(filesystems []Filesystem) error {
	for _, f := range filesystems {
		if wait := restOf(h.records, f.Device, boottime()); wait > 0 {
			return &Error{Reason: Busy, Filesystem: f.Mount, Wait: wait, Message: fmt.Sprintf("was frozen just before; between two freezes lie %d times the last one's time, so wait %v", RestFactor, wait.Round(time.Millisecond))}
		}
		for i := range MaxFilesystems {
			if e := h.ledger.entry(i); e.Device == uint64(f.Device) && !e.state().settled() {
				return errorf(Busy, f.Mount, "an earlier freeze of it is not over (%v)", e.state())
			}
		}
	}
	return nil
}

func (h *holder) claimEntries(g *grant, mounts []mount, fds []int) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.isOver() {
		return errorf(Lost, "", "%s", g.why)
	}
	var free []int
	for i := range MaxFilesystems {
		if h.fds[i] < 0 {
			free = append(free, i)
		}
	}
	if len(free) < len(fds) {
		return errorf(Busy, "", "too many earlier freezes are not over")
	}
	g.entries, g.fds = free[:len(fds)], fds
	for n, i := range g.entries {
		h.fds[i] = fds[n]
		passed := route(mounts, g.request.Filesystems[n].Mount)
		g.fill(h.ledger, n, passed[len(passed)-1])
	}
	return nil
}

// arm gives the guard its own descriptors. A guard that has stopped, or worse, is replaced, once.
func (h *holder) arm(g *grant) error {
	guard := h.theGuard()
	if err := guard.arm(indexes(g.entries), g.fds); err != nil {
		guard.kill()
		<-guard.gone // it is in no system call that could hang: it has nothing frozen
		if err := h.ensureGuard(); err != nil {
			return errorf(Unavailable, "", "%v", err)
		}
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.armed = true
	return nil
}

// freezeNext freezes the next count filesystems, 0 for all that are left, wave after wave, each on a thread of its own,
// for as long as the lease lasts.
func (h *holder) freezeNext(g *grant, count int, gone <-chan struct{}) error {
	from, to, err := g.advance(count)
	if err != nil {
		return err
	}
	defer g.pause()
	for from < to {
		end := wave(g.request.Filesystems, g.below, from, to)
		if err := h.freezeWave(g, from, end, gone); err != nil {
			return err
		}
		from = end
	}
	return nil
}

func (h *holder) freezeWave(g *grant, from, to int, gone <-chan struct{}) error {
	g.mu.Lock()
	over := g.isOver()
	if !over {
		for n := from; n < to; n++ {
			h.ledger.entry(g.entries[n]).State.Store(uint32(freezing)) // the intent
		}
	}
	g.mu.Unlock()
	if over {
		return errorf(Lost, "", "%s", g.reason())
	}
	done := make(chan error, to-from)
	for n := from; n < to; n++ {
		e, fd, f := h.ledger.entry(g.entries[n]), g.fds[n], g.request.Filesystems[n]
		h.threads.run(func() {
			err := freeze(e, fd)
			if errno, ok := errors.AsType[unix.Errno](err); ok {
				err = freezeError(f, errno)
			}
			done <- err
			h.notify()
		})
	}
	for n := from; n < to; n++ {
		err := h.await(g, done, gone)
		if errors.Is(err, Lost) {
			return err // nobody waits for what hangs
		}
		if err != nil {
			h.end(g, err.Error(), false)
			late := time.After(time.Second)
			for others := to - n - 1; others > 0; others-- { // they thaw themselves as they land
				select {
				case <-done:
				case <-late:
					others = 0
				}
			}
			return err
		}
	}
	return nil
}

// await waits for a thread, but no longer than the lease lasts and the client is there.
func (h *holder) await(g *grant, done <-chan error, gone <-chan struct{}) error {
	select {
	case err := <-done:
		return err
	case <-gone:
		h.end(g, "the client is gone", false)
	case <-g.over:
	}
	return errorf(Lost, "", "%s, before all was frozen", g.reason())
}

func (h *holder) end(g *grant, why string, asked bool) {
	g.end(h.ledger, why, asked)
	h.wake()
}

// retire waits until everything of an ended lease is settled, then closes its descriptors in both processes, counts,
// and gives its entries back.
func (h *holder) retire(g *grant) {
	<-g.over
	select {
	case <-g.settled:
	case <-time.After(time.Second): // a hanging ioctl does not keep the others from being frozen
		h.leave(g)
		<-g.settled
	}
	g.mu.Lock()
	entries, fds := g.entries, g.fds
	g.report = g.makeReport(h.ledger)
	g.mu.Unlock()
	if len(entries) > 0 {
		<-g.prepared // its descriptors may be on their way to the guard at this moment
	}
	if guard := h.theGuard(); guard != nil && len(entries) > 0 {
		if err := guard.disarm(indexes(entries)); err != nil {
			guard.kill() // so that its descriptors do not keep anything busy
			select {
			case <-guard.gone:
			case <-time.After(time.Second):
			}
		}
	}
	h.mu.Lock()
	for n, i := range entries {
		e := h.ledger.entry(i)
		h.count(g.request.Filesystems[n], e)
		h.fds[i] = -1
		e.State.Store(uint32(idle))
	}
	h.mu.Unlock()
	for _, fd := range fds {
		unix.Close(fd) // of a filesystem that was unmounted meanwhile this is the end, and takes its time
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.grants = slices.DeleteFunc(h.grants, func(x *grant) bool { return x == g })
	if h.current == g {
		h.current = nil
	}
	if len(h.grants) == 0 {
		debug.SetGCPercent(100)
	}
	close(g.retired)
}

func (h *holder) leave(g *grant) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.current == g {
		h.current = nil
	}
}

// count keeps the figures, and the time to rest.
func (h *holder) count(f Filesystem, e *entry) {
	if e.FrozenAt.Load() == 0 {
		return
	}
	lasted := time.Duration(e.ThawedAt.Load() - e.FrozenAt.Load())
	c := h.counts[f.Device]
	if c == nil {
		c = &FilesystemStatus{}
		h.counts[f.Device] = c
	}
	c.Filesystem, c.Last, c.Max = f, lasted, max(c.Max, lasted)
	c.Freezes++
	keepRest(h.records, f.Device, lasted, e.ThawedAt.Load())
}

// ensureGuard starts a guard if there is none, and gives it everything that we have open.
func (h *holder) ensureGuard() error {
	h.starting.Lock()
	defer h.starting.Unlock()
	if old := h.theGuard(); old != nil {
		if !old.dead() {
			return nil
		}
		old.close()
	}
	guard, err := startGuard(h.ledger)
	if err != nil {
		return err
	}
	var entries, fds []int
	h.mu.Lock()
	h.guard = guard
	for i, fd := range h.fds {
		if fd >= 0 {
			entries, fds = append(entries, i), append(fds, fd)
		}
	}
	h.mu.Unlock()
	if len(entries) == 0 {
		return nil
	}
	return guard.arm(indexes(entries), fds)
}

func (h *holder) killGuard() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.guard != nil {
		h.guard.kill()
	}
}

func (h *holder) descriptor(i int) int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.fds[i]
}

func (h *holder) wake() {
	select {
	case h.woken <- struct{}{}:
	default:
	}
}

// status answers the status verb.
func (h *holder) status() *Status {
	h.mu.Lock()
	defer h.mu.Unlock()
	s := &Status{Version: h.version, Weakness: h.weakness, Guard: h.guard != nil && !h.guard.dead()}
	now := boottime()
	if g := h.current; g != nil {
		s.Lease = &LeaseStatus{Filesystems: g.request.Filesystems, Age: time.Duration(now - g.started), Deadline: time.Duration(g.deadline - now)}
	}
	for _, c := range h.counts {
		f := *c
		f.State = thawed.String()
		s.Filesystems = append(s.Filesystems, f)
	}
	for i, fd := range h.fds {
		e := h.ledger.entry(i)
		if fd < 0 || e.state().settled() {
			continue
		}
		at := slices.IndexFunc(s.Filesystems, func(f FilesystemStatus) bool { return f.Device == Device(e.Device) })
		if at < 0 {
			s.Filesystems = append(s.Filesystems, FilesystemStatus{Filesystem: e.filesystem()})
			at = len(s.Filesystems) - 1
		}
		s.Filesystems[at].State = e.state().String()
	}
	slices.SortFunc(s.Filesystems, func(a, b FilesystemStatus) int { return int(a.Device) - int(b.Device) })
	return s
}

// drain refuses new leases, and ends and retires those that there are.
func (h *holder) drain() {
	h.mu.Lock()
	h.closing = true
	h.mu.Unlock()
	grants := h.unretired()
	for _, g := range grants {
		h.end(g, "the freezer is stopping", false)
	}
	for _, g := range grants {
		<-g.retired
	}
}

// close lets the guard and the ledger go. Nobody may use h any more.
func (h *holder) close() {
	if guard := h.theGuard(); guard != nil {
		guard.close()
		select {
		case <-guard.gone:
		case <-time.After(guardAnswer):
			guard.kill()
		}
	}
	_ = unix.Unlink(h.ledger.path) // a settled ledger that stays is removed by the next sweep
	h.ledger.close()
}

func indexes(entries []int) []byte {
	out := make([]byte, len(entries))
	for n, i := range entries {
		out[n] = byte(i)
	}
	return out
}
