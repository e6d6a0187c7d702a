package kubernetes

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
)

// Bring makes a server of this machine, such as an S3 store, reachable in the cluster's network: it returns the address
// there, which leads to the given one until the cluster is closed.
func (c *Cluster) Bring(ctx context.Context, address string) (inside string, err error) {
	l, err := c.place.listen(ctx, "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	b := &bridge{listener: l, to: address, open: map[net.Conn]bool{}}
	b.owner.Go(b.accept)
	c.mu.Lock()
	c.closers = append(c.closers, b)
	c.mu.Unlock()
	return l.Addr().String(), nil
}

// bridge carries connections from one network to another.
type bridge struct {
	listener net.Listener
	to       string
	owner    sync.WaitGroup

	mu     sync.Mutex
	open   map[net.Conn]bool
	closed bool
}

func (b *bridge) accept() {
	for {
		from, err := b.listener.Accept()
		if err != nil {
			return // closed
		}
		b.owner.Go(func() { b.carry(from) })
	}
}

func (b *bridge) carry(from net.Conn) {
	defer b.forget(from)
	if !b.remember(from) {
		return
	}
	to, err := net.Dial("tcp", b.to)
	if err != nil {
		return // the client sees its connection closed, as it would see it refused
	}
	defer b.forget(to)
	if !b.remember(to) {
		return
	}
	var back sync.WaitGroup
	back.Go(func() { pump(from, to) })
	pump(to, from)
	back.Wait()
}

// pump carries one direction, and its end.
func pump(to, from net.Conn) {
	io.Copy(to, from) // an error ends it, as the end does
	if half, ok := to.(interface{ CloseWrite() error }); ok {
		half.CloseWrite()
	}
}

// remember keeps a connection for Close, if that was not yet.
func (b *bridge) remember(c net.Conn) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.open[c] = true
	return !b.closed
}

func (b *bridge) forget(c net.Conn) {
	b.mu.Lock()
	delete(b.open, c)
	b.mu.Unlock()
	c.Close()
}

// Close ends all connections and waits until nothing is under way.
func (b *bridge) Close() error {
	b.mu.Lock()
	b.closed = true
	errs := []error{b.listener.Close()}
	for c := range b.open {
		c.Close()
	}
	b.mu.Unlock()
	b.owner.Wait()
	return errors.Join(errs...)
}
