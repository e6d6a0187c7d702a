package freezer

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// DefaultRecords is the folder of the ledgers. It is on a tmpfs of the host, shared by all freezers of a machine: if
// it is not, a small tmpfs is mounted there.
const DefaultRecords = "/run/stillpoint/freezer"

// Options of Serve. Exactly one of Socket and Inherited is given.
type Options struct {
	Socket    string                           // the path of a socket to listen on, in a folder that only its owner may enter
	Inherited int                              // the descriptor of one connection; the freezer ends with it
	Records   string                           // the record folder; empty: DefaultRecords
	Refuse    []string                         // absolute paths whose filesystems are never frozen, besides the system's and our own
	Version   string                           // shown in hello and status
	Log       func(format string, args ...any) // what a sweep found, and the like; never called while anything is frozen
}

const (
	maxClients = 16
	reply      = time.Second // how long a client may take to read one
	// thawAnswer is how long a Thaw is waited for before its reply says that it has not come back.
	thawAnswer = answer - reply
)

// Serve is the freezer's first process. It thaws what dead freezers left, starts the guard, locks itself in memory,
// and serves until ctx ends; then it thaws and returns nil. It must run in a program of its own, whose verb "guard"
// calls Guard, after Isolate.
func Serve(ctx context.Context, o Options) error {
	if o.Records == "" {
		o.Records = DefaultRecords
	}
	if o.Log == nil {
		o.Log = func(string, ...any) {}
	}
	if err := os.Chdir("/"); err != nil {
		return err
	}
	debug.SetMemoryLimit(64 << 20)
	unix.Umask(0o077)
	if err := prepareRecords(o.Records); err != nil {
		return err
	}
	paths := append([]string{o.Records}, o.Refuse...)
	if o.Socket != "" {
		if err := privateFolder(filepath.Dir(o.Socket)); err != nil {
			return err
		}
		paths = append(paths, filepath.Dir(o.Socket))
	}
	own, err := ownState(paths)
	if err != nil {
		return err
	}
	pending := logSweep(ctx, o)
	h, err := newHolder(o, own)
	if err != nil {
		return err
	}
	watching, stop := context.WithCancel(context.Background())
	h.group.Go(func() { h.watch(watching) })
	defer func() {
		h.drain()
		stop()
		h.group.Wait()
		h.close()
	}()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	h.group.Go(func() { h.sweep(ctx, o, pending) })
	if o.Socket == "" {
		c, err := newConn(o.Inherited)
		if err != nil {
			return err
		}
		h.session(ctx, c)
		return nil
	}
	return h.listen(ctx, o.Socket)
}

// sweep looks for what dead freezers left: often while something of them is not over, seldom else, and not while a
// lease runs.
func (h *holder) sweep(ctx context.Context, o Options, pending bool) {
	for {
		wait := 10 * time.Second
		if pending {
			wait = 200 * time.Millisecond
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
		if len(h.unretired()) == 0 {
			pending = logSweep(ctx, o)
		}
	}
}

// logSweep sweeps once and tells whether something is not over.
func logSweep(ctx context.Context, o Options) (pending bool) {
	swept, err := Sweep(ctx, o.Records)
	if err != nil {
		o.Log("sweeping %s: %v", o.Records, err)
	}
	for _, s := range swept {
		if s.Pending {
			pending = true
		} else {
			o.Log("%s", s)
		}
	}
	return pending
}

// listen accepts clients until ctx ends.
func (h *holder) listen(ctx context.Context, path string) error {
	folder, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer folder.Close()
	if err := unix.Flock(int(folder.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return fmt.Errorf("another freezer serves a socket in %s: stop it, or use another folder", filepath.Dir(path))
	}
	if st, err := os.Lstat(path); err == nil && st.Mode()&os.ModeSocket == 0 {
		return fmt.Errorf("%s is there and is no socket: choose another path", path)
	}
	_ = os.Remove(path) // what a killed freezer left; Bind says so if it cannot be removed
	fd, err := seqpacket()
	if err != nil {
		return err
	}
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		unix.Close(fd)
		return fmt.Errorf("the socket %s: %w", path, err)
	}
	defer os.Remove(path)
	if err := unix.Listen(fd, maxClients); err != nil {
		unix.Close(fd)
		return err
	}
	listener, err := newConn(fd)
	if err != nil {
		unix.Close(fd)
		return err
	}
	defer context.AfterFunc(ctx, listener.close)()
	raw, err := listener.f.SyscallConn()
	if err != nil {
		return err
	}
	var sessions sync.WaitGroup
	defer sessions.Wait()
	slots := make(chan struct{}, maxClients)
	for {
		var nfd int
		var failed error
		err := raw.Read(func(fd uintptr) bool {
			nfd, _, failed = unix.Accept4(int(fd), unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
			return failed != unix.EAGAIN
		})
		if err != nil { // closed, because ctx ended
			return nil
		}
		if failed != nil {
			time.Sleep(10 * time.Millisecond) // no descriptors, or a client that went: never a reason to end
			continue
		}
		c, err := newConn(nfd)
		if err != nil {
			unix.Close(nfd)
			continue
		}
		if !permitted(nfd) {
			c.send(message{Verb: verbHello, Error: errorf(Refused, "", "only root may use the freezer")}, reply)
			c.close()
			continue
		}
		select {
		case slots <- struct{}{}:
			sessions.Go(func() {
				h.session(ctx, c)
				<-slots
			})
		default:
			c.send(message{Verb: verbHello, Error: errorf(Busy, "", "the freezer has %d clients already", maxClients)}, reply)
			c.close()
		}
	}
}

// permitted asks the kernel who connected.
func permitted(fd int) bool {
	cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	return err == nil && (cred.Uid == 0 || int(cred.Uid) == os.Geteuid())
}

// session serves one client until its connection ends, which ends its lease. The reader never waits for a freeze: it
// must see beats, thaws and the end of the connection meanwhile. A client that sends rubbish, or does not read what
// it is sent, is disconnected.
func (h *holder) session(ctx context.Context, c conn) {
	defer context.AfterFunc(ctx, c.close)()
	s := &session{h: h, c: c, gone: make(chan struct{})}
	if c.send(message{Verb: verbHello, Protocol: protocol, Version: h.version}, reply) == nil {
		s.read()
	}
	close(s.gone)
	c.close()
	if g := s.grant.Load(); g != nil {
		h.end(g, "the client's connection closed", false)
	}
	s.running.Wait()
}
