package freezer

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"runtime/debug"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Holder and guard speak over a socket pair: one byte of verb, then one byte an entry concerned; arm carries a
// descriptor an entry. The guard answers each with the same verb, or once, at its start, with ready or a complaint.
const (
	guardReady  = 'r'
	guardArm    = 'a'
	guardDisarm = 'd'
	guardFailed = '!' // followed by words
)

const guardAnswer = time.Second // more than this and the guard is taken for stalled

// Guard is the second process. It is started by the first with the socket as descriptor 3 and the ledger as 4, and
// ends when the first is gone and everything is thawed.
func Guard() error {
	// It ends with the holder and by nothing else: signals meant for the pair are the holder's business.
	signal.Ignore(unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGQUIT, unix.SIGPIPE, unix.SIGUSR1, unix.SIGUSR2)
	err := guard()
	if err != nil {
		unix.Write(3, append([]byte{guardFailed}, err.Error()...))
	}
	return err
}

func guard() error {
	l, err := mapLedger(os.NewFile(4, "ledger"))
	if err != nil {
		return err
	}
	l.header().Guard.set()
	g := &guardProcess{threads: newThreads(), ledger: l, commands: make(chan command)}
	for i := range g.fds {
		g.fds[i] = -1
	}
	holder, err := unix.PidfdOpen(int(l.header().Holder.PID.Load()), 0)
	if err != nil {
		return fmt.Errorf("finding the holder: %w", err)
	}
	g.warden = &warden{
		role: asGuard, ledger: l, threads: g.threads, other: &l.header().Holder,
		own:     func(h *header) { h.GuardBeat.Add(1) },
		seen:    func(h *header) uint64 { return h.HolderBeat.Load() },
		fd:      func(i int) int { return g.fds[i] },
		fence:   func() { _ = unix.PidfdSendSignal(holder, unix.SIGKILL, nil, 0) },
		settled: make(chan struct{}, 1),
	}
	g.threads.ensure(4)
	debug.SetGCPercent(-1) // it allocates next to nothing; the limit is for what nobody foresaw
	debug.SetMemoryLimit(32 << 20)
	go g.receive()
	if _, err := harden(); err != nil { // the holder, with the same rights, says what is weak
		return err
	}
	if err := g.send(guardReady, nil); err != nil {
		return err
	}
	g.run()
	return nil
}

type guardProcess struct {
	*warden
	threads  *threads
	ledger   *ledger
	fds      [MaxFilesystems]int // -1, or our own descriptor of an entry
	commands chan command        // closed when the holder's socket is
}

type command struct {
	verb    byte
	entries []byte
	fds     []int
}

func (g *guardProcess) run() {
	alive := true
	for {
		var ticks <-chan time.Time
		if g.armed() {
			ticks = time.After(tick)
		} else if g.rest(); !alive {
			return
		}
		select {
		case c, ok := <-g.commands:
			if !ok {
				alive, g.commands = false, nil
				break
			}
			g.obey(c)
		case <-g.settled:
		case <-ticks:
		}
		g.look(!alive)
		if !alive {
			g.disarm()
		}
	}
}

func (g *guardProcess) armed() bool {
	for _, fd := range g.fds {
		if fd >= 0 {
			return true
		}
	}
	return false
}

// disarm closes our descriptors of what is settled.
func (g *guardProcess) disarm() {
	for i, fd := range g.fds {
		if fd >= 0 && g.ledger.entry(i).state().settled() {
			g.threads.run(func() { unix.Close(fd) }) // the last descriptor of an unmounted filesystem takes its time
			g.fds[i] = -1
		}
	}
}

func (g *guardProcess) obey(c command) {
	switch c.verb {
	case guardArm:
		g.threads.ensure(len(c.fds) + 2)
		for n, i := range c.entries {
			if old := g.fds[i]; old >= 0 {
				unix.Close(old)
			}
			g.fds[i] = c.fds[n]
		}
	case guardDisarm:
		for _, i := range c.entries {
			if g.fds[i] >= 0 {
				unix.Close(g.fds[i])
				g.fds[i] = -1
			}
		}
	}
	_ = g.send(c.verb, c.entries) // a holder that cannot be told is gone, which the next receive shows
}

func (g *guardProcess) receive() {
	defer close(g.commands)
	buf, oob := make([]byte, 1+MaxFilesystems), make([]byte, unix.CmsgSpace(4*MaxFilesystems))
	for {
		n, oobn, _, _, err := unix.Recvmsg(3, buf, oob, unix.MSG_CMSG_CLOEXEC)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || n == 0 {
			return
		}
		c := command{verb: buf[0], entries: append([]byte(nil), buf[1:n]...)}
		if messages, err := unix.ParseSocketControlMessage(oob[:oobn]); err == nil {
			for _, m := range messages {
				if fds, err := unix.ParseUnixRights(&m); err == nil {
					c.fds = append(c.fds, fds...)
				}
			}
		}
		if c.verb == guardArm && len(c.fds) != len(c.entries) {
			return
		}
		g.commands <- c
	}
}

func (g *guardProcess) send(verb byte, entries []byte) error {
	_, err := unix.Write(3, append([]byte{verb}, entries...))
	return err
}

// guardLink is the holder's end.
type guardLink struct {
	cmd     *exec.Cmd
	conn    conn
	mu      sync.Mutex // one exchange at a time
	replies chan []byte
	gone    chan struct{} // closed when the process has been reaped
}

// startGuard starts a guard and waits until it is ready.
func startGuard(l *ledger) (*guardLink, error) {
	ours, theirs, err := pair()
	if err != nil {
		return nil, err
	}
	inherited := os.NewFile(uintptr(theirs), "guard socket")
	defer inherited.Close()
	c, err := newConn(ours)
	if err != nil {
		unix.Close(ours)
		return nil, err
	}
	g := &guardLink{conn: c, replies: make(chan []byte, 4), gone: make(chan struct{})}
	g.cmd = exec.Command("/proc/self/exe", "guard")
	g.cmd.Args[0] = "stillpoint-freezer"
	g.cmd.Env = append(os.Environ(), isolated+"=1")
	g.cmd.Dir = "/"
	g.cmd.ExtraFiles = []*os.File{inherited, l.file}
	g.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := g.cmd.Start(); err != nil {
		c.close()
		return nil, fmt.Errorf("starting the guard: %w", err)
	}
	go func() {
		defer close(g.gone)
		_ = g.cmd.Wait() // however it ended, it is gone
	}()
	go g.receive()
	select {
	case r := <-g.replies:
		if r[0] == guardReady {
			return g, nil
		}
		err = fmt.Errorf("the guard did not start: %s", r[1:])
	case <-g.gone:
		err = errors.New("the guard did not start")
		select {
		case r := <-g.replies: // its last words
			err = fmt.Errorf("the guard did not start: %s", r[1:])
		case <-time.After(tick):
		}
	case <-time.After(10 * time.Second):
		err = errors.New("the guard did not start in 10 s")
	}
	g.kill()
	return nil, err
}

func (g *guardLink) receive() {
	buf := make([]byte, 4096)
	for {
		n, err := g.conn.f.Read(buf)
		if err != nil {
			return
		}
		select {
		case g.replies <- append([]byte(nil), buf[:n]...):
		default: // nobody waits any more
		}
	}
}

// arm gives the guard its own descriptors of entries; disarm takes them back. An error means that it must be killed.
func (g *guardLink) arm(entries []byte, fds []int) error {
	return g.exchange(guardArm, entries, unix.UnixRights(fds...))
}

func (g *guardLink) disarm(entries []byte) error { return g.exchange(guardDisarm, entries, nil) }

func (g *guardLink) exchange(verb byte, entries, oob []byte) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	for len(g.replies) > 0 {
		<-g.replies
	}
	if err := unix.Sendmsg(int(g.conn.f.Fd()), append([]byte{verb}, entries...), oob, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL); err != nil {
		return fmt.Errorf("sending to the guard: %w", err)
	}
	timeout := time.NewTimer(guardAnswer)
	defer timeout.Stop()
	for {
		select {
		case r := <-g.replies:
			if r[0] == verb && string(r[1:]) == string(entries) {
				return nil
			}
		case <-g.gone:
			return errors.New("the guard is gone")
		case <-timeout.C:
			return errors.New("the guard does not answer")
		}
	}
}

// dead tells whether the process is gone.
func (g *guardLink) dead() bool {
	select {
	case <-g.gone:
		return true
	default:
		return false
	}
}

func (g *guardLink) kill() { _ = g.cmd.Process.Kill() } // an error means that it is gone already

// close lets the guard go, which ends by itself once nothing is frozen.
func (g *guardLink) close() { g.conn.close() }
