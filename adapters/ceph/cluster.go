//go:build ceph && cgo

package ceph

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/ceph/go-ceph/rados"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

// settings are how a backend reaches its cluster.
type settings struct {
	backend, conf, monitors, user, keyring string
	key                                    adapters.Secret
	keyed                                  bool
	timeout                                time.Duration
}

// readSettings reads the parameters of connectionKeys. Its error, Invalid, comes after those that p has of its own.
func readSettings(p *adapters.Params, backend string) (settings, error) {
	s := settings{
		backend:  backend,
		conf:     p.String("conf", ""),
		monitors: p.String("monitors", ""),
		user:     strings.TrimPrefix(p.String("user", "admin"), "client."),
		keyring:  p.String("keyring", ""),
		timeout:  p.Duration("timeout", 30*time.Second),
	}
	s.key, s.keyed = p.Secret("key")
	if s.timeout < time.Second {
		return s, fault.Errorf(fault.Invalid, "backend %s: timeout: %v is less than 1s", backend, s.timeout)
	}
	return s, nil
}

// requestsPerCall is how many requests, one after the other, a call may make that each take the whole time-out.
const requestsPerCall = 4

const defaultConf = "/etc/ceph/ceph.conf"

// cluster is a backend's way to its Ceph. It connects at the first call, and anew after one that timed out.
type cluster struct {
	settings
	*calls

	mu         sync.Mutex
	now        *connection
	connecting chan struct{} // holds one token: one connects at a time
	closed     bool
}

// connection is a client of Ceph. Whoever uses it holds it; the last one shuts it down after it was dropped.
type connection struct {
	cluster *cluster
	rados   *rados.Conn
	users   int // guarded by cluster.mu; the cluster itself is one while it is the current one
}

func newCluster(s settings) *cluster {
	return &cluster{settings: s, calls: newCalls(s.backend, requestsPerCall*s.timeout), connecting: make(chan struct{}, 1)}
}

// connection gives the call a connection until the call has ended.
func (c *cluster) connection(one *call) (*connection, error) {
	select {
	case c.connecting <- struct{}{}:
	case <-one.ctx.Done():
		return nil, one.ctx.Err()
	}
	defer func() { <-c.connecting }()
	if c.wasHung() {
		c.renew()
	}
	if n, err := c.current(); n != nil || err != nil {
		if n != nil {
			one.later(n.release)
		}
		return n, err
	}
	r, err := c.connect()
	if err != nil {
		return nil, err
	}
	n := &connection{cluster: c, rados: r, users: 1}
	one.later(n.release)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed { // the call was abandoned, and Close did not wait for it
		return n, nil
	}
	n.users++
	c.now = n
	return n, nil
}

// current is the connection that there is, held for the caller.
func (c *cluster) current() (*connection, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, fault.Errorf(fault.Invalid, "backend %s: called after it was closed", c.backend)
	}
	if c.now != nil {
		c.now.users++
	}
	return c.now, nil
}

// connect makes a client. No error of it is NotFound: a keyring that is missing does not mean that a volume is.
func (c *cluster) connect() (*rados.Conn, error) {
	began := time.Now()
	r, err := c.configure()
	if err == nil {
		if err = r.Connect(); err == nil {
			return r, nil
		}
		r.Shutdown()
	}
	switch errnoOf(err) {
	case syscall.ENOENT, syscall.EACCES, syscall.EPERM, syscall.EINVAL:
		err = fault.Errorf(fault.Invalid, "%w; the cluster refuses the cephx user %s, or there is no key for it: see the parameters user, keyring and key", err, c.user)
	case syscall.ETIMEDOUT:
		err = fault.Errorf(fault.Unavailable, "%w; no monitor answered within %v", err, c.timeout)
	}
	return nil, failed(err, time.Since(began), c.timeout, "backend %s: connecting to Ceph", c.backend)
}

// configure makes a client that is not connected yet.
func (c *cluster) configure() (*rados.Conn, error) {
	r, err := rados.NewConnWithUser(c.user)
	if err != nil {
		return nil, err
	}
	conf := c.conf
	if conf == "" && c.monitors == "" {
		conf = defaultConf
	}
	if conf != "" {
		if _, err := os.Stat(conf); err != nil {
			return nil, fault.Errorf(fault.Invalid, "%w; name the cluster's configuration in the parameter conf, or its monitors in monitors", err)
		}
		if err := r.ReadConfigFile(conf); err != nil {
			return nil, fault.Errorf(fault.Invalid, "reading %s: %w", conf, err)
		}
	}
	seconds := func(d time.Duration) string { return strconv.FormatFloat(d.Seconds(), 'f', 3, 64) }
	limit := strconv.Itoa(int((c.timeout + time.Second - 1) / time.Second))
	for _, o := range [][2]string{
		// Without these a call waits for ever when nobody answers.
		{"rados_osd_op_timeout", limit}, {"rados_mon_op_timeout", limit}, {"client_mount_timeout", limit},
		// A client asks where an OSD is now when a request is older than this, 10 s by default. If requests fail before
		// that, it never asks, and goes on calling an OSD that was restarted elsewhere (Objecter::tick in src/osdc).
		{"objecter_timeout", seconds(min(c.timeout/4, 5*time.Second))}, {"objecter_tick_interval", seconds(min(c.timeout/8, 2500*time.Millisecond))},
		{"rbd_cache", "false"},                  // every byte is read once
		{"rbd_concurrent_management_ops", "64"}, // objects asked about at once in one DiffIterate
		{"client_oc", "false"},                  // the same of CephFS; and what is written is written
		{"client_acl_type", "posix_acl"},        // access control lists are attributes
		{"log_to_stderr", "false"}, {"err_to_stderr", "false"}, {"mon_host", c.monitors}, {"keyring", c.keyring},
	} {
		if o[1] == "" {
			continue
		}
		if err := r.SetConfigOption(o[0], o[1]); err != nil {
			return nil, fault.Errorf(fault.Invalid, "setting %s: %w", o[0], err)
		}
	}
	// An rbd-nbd that was told to quiesce its filesystem for each snapshot would freeze what the cut has frozen, fail, and then
	// thaw it. Releases before pacific know no such thing.
	if err := r.SetConfigOption("rbd_default_snapshot_quiesce_mode", "skip"); err != nil && errnoOf(err) != syscall.ENOENT {
		return nil, fault.Errorf(fault.Invalid, "setting rbd_default_snapshot_quiesce_mode: %w", err)
	}
	if c.keyed {
		if err := r.SetConfigOption("key", c.key.Reveal()); err != nil {
			return nil, fault.Errorf(fault.Invalid, "setting the key: %w", err)
		}
	}
	return r, nil
}

// renew makes the next call connect anew. Whoever uses the old connection goes on with it; it ends with the last.
//
// A client that something timed out for is not to be kept: librbd may have failed to take back a watch or an exclusive
// lock, and as long as the client lives every other one believes that the image is in use.
func (c *cluster) renew() {
	c.mu.Lock()
	old := c.now
	c.now = nil
	c.mu.Unlock()
	if old != nil {
		old.release()
	}
}

func (n *connection) hold() {
	n.cluster.mu.Lock()
	defer n.cluster.mu.Unlock()
	n.users++
}

func (n *connection) release() {
	n.cluster.mu.Lock()
	n.users--
	last := n.users == 0
	n.cluster.mu.Unlock()
	if last {
		n.rados.Shutdown()
	}
}

// close ends the connection, when nobody uses it any more. Calls that hang keep it, and Close does not wait for them
// longer than closePatience.
func (c *cluster) close() error {
	n := c.wait(closePatience)
	c.mu.Lock()
	c.closed = true
	now := c.now
	c.now = nil
	c.mu.Unlock()
	if now != nil {
		ctx, cancel := context.WithTimeout(context.Background(), closePatience)
		defer cancel()
		_, err := run(ctx, c.calls, func(*call) (struct{}, error) {
			now.release()
			return struct{}{}, nil
		})
		if err != nil {
			n++
		}
	}
	if n > 0 {
		return fault.Errorf(fault.Unavailable, "backend %s: closed, but %d calls still hang in Ceph's libraries; the last of them ends the connection", c.backend, n)
	}
	return nil
}

// closePatience is how long Close waits for calls that were abandoned.
const closePatience = 3 * time.Second

// pool opens a pool for a call.
func (n *connection) pool(pool, namespace string) (*rados.IOContext, error) {
	io, err := n.rados.OpenIOContext(pool)
	if err != nil {
		return nil, fmt.Errorf("pool %s: %w", pool, err)
	}
	io.SetNamespace(namespace)
	return io, nil
}
