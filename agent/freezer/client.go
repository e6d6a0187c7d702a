package freezer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// answer is how long a client waits for the freezer to answer beyond the time that the request itself takes, before
// it closes the connection, which thaws everything.
const answer = 5 * time.Second

// Client is a connection to a freezer. Its methods may be called in parallel. It has one lease at a time.
type Client struct {
	conn  conn
	child *child // the process that Spawn started, or nil

	mu      sync.Mutex
	last    uint64
	spoke   time.Time // when the last message came
	pending map[uint64]chan message
	lease   *Lease
	down    error         // why the connection ended
	ended   chan struct{} // closed with down
	beats   sync.WaitGroup
}

// Lease is a freeze of several filesystems, kept alive by a goroutine that sends heartbeats until Thaw, loss or Close.
type Lease struct {
	c       *Client
	longest time.Duration
	lost    chan struct{}
	done    chan struct{} // stops the heartbeats
	over    sync.Once     // of lost
	calm    sync.Once     // of done
	err     error         // set before lost is closed
}

// Connect connects to a freezer that serves the socket. Errors: Unavailable.
func Connect(ctx context.Context, socket string) (*Client, error) {
	fd, err := seqpacket()
	if err != nil {
		return nil, errorf(Unavailable, "", "opening a socket: %v", err)
	}
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: socket}); err != nil {
		unix.Close(fd)
		return nil, errorf(Unavailable, "", "no freezer answers at %s: %v; start one with `stillpoint freezer --socket %s`", socket, err, socket)
	}
	return newClient(ctx, fd, nil)
}

// SpawnOptions say how Spawn starts a freezer. The zero value is right for almost everybody.
type SpawnOptions struct {
	Program string   // the freezer's binary; empty: stillpoint-freezer beside the running program, then in PATH
	Records string   // its record folder; empty: its default
	Refuse  []string // more paths whose filesystems it refuses to freeze, such as that of our own state
}

// Spawn starts a freezer of our own for the time of one command. It is connected by a socket pair that nobody else
// can reach; when that closes, because of Close or because we died, it thaws and exits. It runs in a session of its
// own, so that an interrupt from the keyboard reaches us alone. Errors: Unavailable, with what it said.
func Spawn(ctx context.Context, o SpawnOptions) (*Client, error) {
	program, err := o.program()
	if err != nil {
		return nil, err
	}
	ours, theirs, err := pair()
	if err != nil {
		return nil, errorf(Unavailable, "", "opening a pair of sockets: %v", err)
	}
	inherited := os.NewFile(uintptr(theirs), "freezer socket")
	defer inherited.Close()
	args := []string{"serve", "--fd", "3"}
	if o.Records != "" {
		args = append(args, "--records", o.Records)
	}
	for _, path := range o.Refuse {
		args = append(args, "--refuse", path)
	}
	ch := &child{cmd: exec.Command(program, args...), exited: make(chan struct{})}
	ch.cmd.ExtraFiles = []*os.File{inherited}
	ch.cmd.Stderr = &ch.said                                                                                  // a pipe: never a file that may lie on what is frozen
	ch.cmd.Env = slices.DeleteFunc(os.Environ(), func(s string) bool { return strings.HasPrefix(s, "AWS_") }) // secrets are not its business
	ch.cmd.Dir = "/"
	ch.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := ch.cmd.Start(); err != nil {
		unix.Close(ours)
		return nil, errorf(Unavailable, "", "starting %s: %v", program, err)
	}
	go func() {
		ch.err = ch.cmd.Wait()
		close(ch.exited)
	}()
	return newClient(ctx, ours, ch)
}

// Freeze freezes all the filesystems, in order, or none: on an error everything that had been frozen is thawed when
// it returns, and one whose FIFREEZE hangs is thawed at the moment that it lands. It returns by the deadline even if
// the kernel does not. Cancelling ctx thaws. Errors: all Reasons.
func (c *Client) Freeze(ctx context.Context, r Request) (*Lease, error) {
	heartbeat := r.Heartbeat
	if heartbeat == 0 {
		heartbeat = DefaultHeartbeat
	}
	l := &Lease{c: c, longest: r.MaxFreeze, lost: make(chan struct{}), done: make(chan struct{})}
	c.mu.Lock()
	if c.lease != nil {
		c.mu.Unlock()
		return nil, errorf(Invalid, "", "this client has a lease already: thaw it first")
	}
	c.lease = l
	if c.down == nil { // else Close may be waiting for the beats already
		c.beats.Go(func() { l.beat(heartbeat) })
	}
	c.mu.Unlock()

	_, err := c.call(ctx, message{Verb: verbFreeze, Filesystems: r.Filesystems, Count: r.First, MaxFreeze: r.MaxFreeze, Heartbeat: heartbeat}, r.MaxFreeze+answer)
	if err != nil {
		l.end(err)
		c.release(l)
		return nil, err
	}
	return l, nil
}

// More freezes the next count of the request's filesystems, 0 for all that are left, under the same deadline. On an error
// the lease is over and everything is thawed; Thaw still reports. Cancelling ctx stops only the waiting: call Thaw then.
func (l *Lease) More(ctx context.Context, count int) error {
	_, err := l.c.call(ctx, message{Verb: verbMore, Count: count}, l.longest+answer)
	return err
}

// Thaw thaws in reverse order and reports. With an error nothing is known of the lease, so what was copied under it
// is void; the filesystems are thawed by the freezer all the same. Cancelling ctx does not stop the thaw, only the
// waiting. The lease is over in any case; a second Thaw is Invalid.
func (l *Lease) Thaw(ctx context.Context) (Report, error) {
	l.c.mu.Lock()
	current := l.c.lease == l
	l.c.mu.Unlock()
	if !current {
		return nil, errorf(Invalid, "", "this lease is over")
	}
	l.quiet() // the server's reader has no time for them while it thaws
	m, err := l.c.call(ctx, message{Verb: verbThaw}, answer)
	l.end(errorf(Lost, "", "the lease was ended by its Thaw"))
	l.c.release(l)
	return m.Report, err
}

// Lost is closed as soon as the lease is known to be over, for whatever reason. Thaw still reports what happened.
func (l *Lease) Lost() <-chan struct{} { return l.lost }

// Err says why the lease is over; nil while it is not.
func (l *Lease) Err() error {
	select {
	case <-l.lost:
		return l.err
	default:
		return nil
	}
}

// Status asks the freezer about itself.
func (c *Client) Status(ctx context.Context) (Status, error) {
	m, err := c.call(ctx, message{Verb: verbStatus}, answer)
	if err != nil {
		return Status{}, err
	}
	if m.Status == nil {
		return Status{}, errorf(Unavailable, "", "the freezer sent no status")
	}
	return *m.Status, nil
}

// Close closes the connection, which ends a lease with a thaw. After Spawn it waits, for a while, until the freezer
// has exited; an error says that it has not, or how.
func (c *Client) Close() error {
	c.fail(errorf(Lost, "", "the connection to the freezer was closed"))
	c.conn.close()
	<-c.ended
	c.beats.Wait()
	if c.child == nil {
		return nil
	}
	return c.child.wait(2 * answer)
}

func newClient(ctx context.Context, fd int, ch *child) (*Client, error) {
	cn, err := newConn(fd)
	if err != nil {
		return nil, errorf(Unavailable, "", "%v", err)
	}
	c := &Client{conn: cn, child: ch, pending: map[uint64]chan message{}, ended: make(chan struct{})}
	hello := make(chan message, 1)
	c.pending[0] = hello
	go c.read()
	var exited chan struct{} // stays nil, and so silent, without a child
	if ch != nil {
		exited = ch.exited
	}
	timeout := time.NewTimer(2 * answer)
	defer timeout.Stop()
	err = nil
	select {
	case m := <-hello:
		err = m.refusal()
	case <-exited:
		err = errorf(Unavailable, "", "the freezer did not start: %s", ch.words())
	case <-c.ended:
		select {
		case m := <-hello: // it said why before it closed
			err = m.refusal()
		default:
		}
		if err == nil {
			err = errorf(Unavailable, "", "the freezer closed the connection")
		}
		if ch != nil {
			ch.wait(answer)
			err = errorf(Unavailable, "", "the freezer did not start: %s", ch.words())
		}
	case <-timeout.C:
		err = errorf(Unavailable, "", "the freezer says nothing")
	case <-ctx.Done():
		err = ctx.Err()
	}
	if err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// refusal is why a freezer that greets with m cannot be used, nil if it can.
func (m message) refusal() error {
	switch {
	case m.Error != nil:
		return m.Error
	case m.Protocol != protocol:
		return errorf(Unavailable, "", "the freezer speaks protocol %d, this program %d: they must be of one version", m.Protocol, protocol)
	}
	return nil
}

// read delivers replies until the connection ends.
func (c *Client) read() {
	defer close(c.ended)
	buf := make([]byte, maxMessage+1)
	for {
		m, err := c.conn.recv(buf)
		if err != nil {
			c.fail(errorf(Lost, "", "the connection to the freezer broke: %v", err))
			return
		}
		c.mu.Lock()
		c.spoke = time.Now()
		if m.Verb == verbLost {
			if c.lease != nil {
				c.lease.end(errorf(Lost, "", "%s", m.Why))
			}
		} else if reply, ok := c.pending[m.ID]; ok {
			delete(c.pending, m.ID)
			reply <- m
		}
		c.mu.Unlock()
	}
}

// fail records why the connection ended, the first time.
func (c *Client) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.down != nil {
		return
	}
	c.down = err
	if c.lease != nil {
		c.lease.end(err)
	}
}

// call sends a request and waits for its reply. A freeze whose ctx ends is thawed, and its reply awaited. When the
// freezer does not answer in time the connection is closed, so that a freezer that is alive thaws.
func (c *Client) call(ctx context.Context, m message, within time.Duration) (message, error) {
	reply := make(chan message, 1)
	c.mu.Lock()
	if c.down != nil {
		defer c.mu.Unlock()
		return message{}, c.down
	}
	c.last++
	m.ID = c.last
	c.pending[m.ID] = reply
	c.mu.Unlock()

	if err := c.conn.send(m, answer); err != nil {
		c.drop(errorf(Lost, "", "sending to the freezer: %v", err))
		return message{}, errorf(Unavailable, "", "sending to the freezer: %v", err)
	}
	timeout := time.NewTimer(within)
	defer timeout.Stop()
	cancelled := ctx.Done()
	for {
		select {
		case r := <-reply:
			if ctx.Err() != nil && m.Verb == verbFreeze {
				if r.Error == nil { // frozen just as it was cancelled
					c.call(context.Background(), message{Verb: verbThaw}, answer)
				}
				return message{}, ctx.Err()
			}
			if r.Error != nil {
				return r, r.Error
			}
			return r, nil
		case <-cancelled:
			if m.Verb != verbFreeze {
				return message{}, ctx.Err()
			}
			cancelled = nil // the freeze's own reply comes after the thaw
			timeout.Reset(answer)
			if err := c.conn.send(message{Verb: verbThaw}, answer); err != nil {
				c.drop(errorf(Lost, "", "sending to the freezer: %v", err))
			}
		case <-c.ended:
			return message{}, c.down
		case <-timeout.C:
			err := errorf(Unavailable, "", "the freezer does not answer; the connection was closed, which thaws")
			c.drop(err)
			return message{}, err
		}
	}
}

// heard is when the freezer last said anything.
func (c *Client) heard() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.spoke
}

func (c *Client) drop(err error) {
	c.fail(err)
	c.conn.close()
}

func (c *Client) release(l *Lease) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.lease == l {
		c.lease = nil
	}
}

func (l *Lease) end(err error) {
	l.over.Do(func() {
		l.err = err
		close(l.lost)
	})
	l.quiet()
}

// quiet ends the heartbeats.
func (l *Lease) quiet() { l.calm.Do(func() { close(l.done) }) }

// beat sends signs of life and looks for those of the freezer. A freezer that answers none for a whole heartbeat has
// stopped or is dying, and whoever is left of it thaws: the lease is given up. (A killed process does not close its
// connections as long as a thread of it hangs in FIFREEZE.)
func (l *Lease) beat(heartbeat time.Duration) {
	every := max(heartbeat, MinHeartbeat) / 4
	start := time.Now()
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			l.c.conn.send(message{Verb: verbBeat}, every)
			if silent := time.Since(l.c.heard()); silent > heartbeat && time.Since(start) > heartbeat {
				l.c.drop(errorf(Lost, "", "the freezer has not answered for %v", silent.Round(time.Millisecond)))
				return
			}
		case <-l.done:
			return
		}
	}
}

// child is a spawned freezer.
type child struct {
	cmd    *exec.Cmd
	said   capped
	exited chan struct{}
	err    error // of Wait, set before exited is closed
}

func (ch *child) wait(within time.Duration) error {
	timeout := time.NewTimer(within)
	defer timeout.Stop()
	select {
	case <-ch.exited:
		if ch.err != nil {
			return errorf(Unavailable, "", "the freezer ended badly: %s", ch.words())
		}
		return nil
	case <-timeout.C:
		return errorf(Unavailable, "", "the freezer (process %d) has not exited: a filesystem still hangs in a freeze or a thaw", ch.cmd.Process.Pid)
	}
}

// words is what the child said, or how it ended. Only after exited.
func (ch *child) words() string {
	if s := strings.TrimSpace(ch.said.String()); s != "" {
		return strings.TrimPrefix(s, "stillpoint-freezer: ")
	}
	return fmt.Sprint(ch.err)
}

// capped keeps the beginning of what is written to it.
type capped struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (c *capped) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.b.Write(p[:min(len(p), max(0, 4096-c.b.Len()))])
	return len(p), nil
}

func (c *capped) String() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.b.String()
}

func (o SpawnOptions) program() (string, error) {
	const name = "stillpoint-freezer"
	if o.Program != "" {
		return o.Program, nil
	}
	if exe, err := os.Executable(); err == nil {
		beside := filepath.Join(filepath.Dir(exe), name)
		if _, err := os.Stat(beside); err == nil {
			return beside, nil
		}
	}
	path, err := exec.LookPath(name)
	if err != nil && !errors.Is(err, exec.ErrDot) {
		return "", errorf(Unavailable, "", "%s is neither beside this program nor in PATH: install it there", name)
	}
	return filepath.Abs(path)
}
