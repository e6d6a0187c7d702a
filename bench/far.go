//go:build ceph && cgo

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// far is a network namespace from which this machine's services on the loopback device are farther away: connections to
// their ports go through a relay that delivers everything a while later, in both directions. (This kernel has no netem.)
type far struct {
	file      *os.File // the namespace
	delay     time.Duration
	listeners []net.Listener
	group     sync.WaitGroup
	mu        sync.Mutex
	open      map[net.Conn]struct{}
	closed    bool
}

// newFar makes such a namespace, for the TCP ports [first, last] of 127.0.0.1. The delay is that of one direction.
func newFar(first, last int, delay time.Duration) (*far, error) {
	f := &far{delay: delay, open: map[net.Conn]struct{}{}}
	failed := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with its namespace
		failed <- f.enter(first, last)
	}()
	if err := <-failed; err != nil {
		return nil, errors.Join(err, f.Close())
	}
	for _, l := range f.listeners {
		f.group.Go(func() { f.serve(l) })
	}
	return f, nil
}

// enter makes the calling thread's network a new one, and listens there.
func (f *far) enter(first, last int) (err error) {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("making a network namespace: %w", err)
	}
	if f.file, err = os.Open(fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid())); err != nil {
		return err
	}
	if err := raiseLoopback(); err != nil {
		return fmt.Errorf("raising the loopback device: %w", err)
	}
	for port := first; port <= last; port++ {
		l, err := net.Listen("tcp4", fmt.Sprintf("127.0.0.1:%d", port))
		if err != nil {
			return err
		}
		f.listeners = append(f.listeners, l)
	}
	return nil
}

// raiseLoopback sets lo up in the calling thread's network: netdevice(7), SIOCSIFFLAGS.
func raiseLoopback() error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(s)
	lo, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	lo.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	return unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, lo)
}

// run runs a program in the namespace.
func (f *far) run(c *exec.Cmd) error {
	failed := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: a program inherits the network of the thread that starts it
		err := unix.Setns(int(f.file.Fd()), unix.CLONE_NEWNET)
		if err == nil {
			err = c.Run()
		}
		failed <- err
	}()
	return <-failed
}

func (f *far) serve(l net.Listener) {
	for {
		near, err := l.Accept()
		if err != nil {
			return
		}
		f.group.Go(func() { f.relay(near, l.Addr().String()) })
	}
}

// relay connects to the same address outside, and carries what comes.
func (f *far) relay(near net.Conn, address string) {
	defer near.Close()
	var d net.Dialer
	there, err := d.DialContext(context.Background(), "tcp4", address)
	if err != nil {
		return
	}
	defer there.Close()
	if !f.note(near, there) {
		return
	}
	defer f.forget(near, there)
	var both sync.WaitGroup
	both.Go(func() { f.carry(there, near) })
	both.Go(func() { f.carry(near, there) })
	both.Wait()
}

// carry copies one direction; what was read waits until its time has come, while more is read.
func (f *far) carry(to, from net.Conn) {
	type piece struct {
		data []byte
		due  time.Time
	}
	way := make(chan piece, 4096)
	var writer sync.WaitGroup
	writer.Go(func() {
		for p := range way {
			time.Sleep(time.Until(p.due))
			if _, err := to.Write(p.data); err != nil {
				from.Close()
			}
		}
		to.(*net.TCPConn).CloseWrite()
	})
	p := make([]byte, 256*kib)
	for {
		n, err := from.Read(p)
		if n > 0 {
			way <- piece{bytes.Clone(p[:n]), time.Now().Add(f.delay)}
		}
		if err != nil {
			break
		}
	}
	close(way)
	writer.Wait()
}

func (f *far) note(all ...net.Conn) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, c := range all {
		f.open[c] = struct{}{}
	}
	return !f.closed
}

func (f *far) forget(all ...net.Conn) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, c := range all {
		delete(f.open, c)
	}
}

// Close ends all connections and the namespace.
func (f *far) Close() error {
	for _, l := range f.listeners {
		l.Close()
	}
	f.mu.Lock()
	f.closed = true
	for c := range f.open {
		c.Close()
	}
	f.mu.Unlock()
	f.group.Wait()
	if f.file == nil {
		return nil
	}
	return f.file.Close()
}
