//go:build ceph && cgo

package ceph

import (
	"context"
	"fmt"
	"sync"
	"syscall"
	"time"

	"github.com/ceph/go-ceph/cephfs"
	fsadmin "github.com/ceph/go-ceph/cephfs/admin"
	"github.com/ceph/go-ceph/rados"

	"stillpoint.io/stillpoint/fault"
)

// mount is a filesystem, mounted at its root within this process. Whoever uses it holds it; the last one unmounts it after
// it was dropped. It holds its connection.
type mount struct {
	mounts     *mounts
	connection *connection
	lib        *cephfs.MountInfo
	raw        rawMount
	fs         string
	metadata   string // the metadata pool
	users      int    // guarded by mounts.mu; the table of mounts is one
	lost       bool   // guarded by mounts.mu: the metadata servers have shut it out
}

// mounts are a backend's, one for each filesystem.
type mounts struct {
	cluster *cluster

	mu       sync.Mutex
	now      map[string]*mount
	mounting chan struct{} // holds one token: one mounts at a time
	closed   bool
}

func newMounts(c *cluster) *mounts {
	return &mounts{cluster: c, now: map[string]*mount{}, mounting: make(chan struct{}, 1)}
}

// get gives the call a mount until it has ended.
func (s *mounts) get(one *call, fs string) (*mount, error) {
	n, err := s.cluster.connection(one)
	if err != nil {
		return nil, err
	}
	select {
	case s.mounting <- struct{}{}:
	case <-one.ctx.Done():
		return nil, one.ctx.Err()
	}
	defer func() { <-s.mounting }()
	m := s.current(n, fs)
	if m == nil {
		if m, err = s.mount(one, n, fs); err != nil {
			return nil, err
		}
	}
	one.later(m.release)
	return m, nil
}

// current is the mount that there is, held, if it is one of that connection. Another one is dropped.
func (s *mounts) current(n *connection, fs string) *mount {
	s.mu.Lock()
	m := s.now[fs]
	if m == nil {
		s.mu.Unlock()
		return nil
	}
	if m.connection == n && !m.lost {
		m.users++
		s.mu.Unlock()
		return m
	}
	delete(s.now, fs)
	s.mu.Unlock()
	m.release()
	return nil
}

// mount mounts a filesystem, and holds it for the caller.
func (s *mounts) mount(one *call, n *connection, fs string) (*mount, error) {
	pools, err := fsadmin.NewFromConn(n.rados).ListFileSystems()
	if err != nil {
		return nil, fmt.Errorf("listing filesystems: %w", err)
	}
	m := &mount{mounts: s, connection: n, fs: fs, users: 2}
	for _, p := range pools {
		if p.Name == fs {
			m.metadata = p.MetadataPool
		}
	}
	if m.metadata == "" {
		return nil, fault.Errorf(fault.NotFound, "the cluster has no filesystem %s that this user may see: see `ceph fs ls`", fs)
	}
	if err := one.wanted(); err != nil {
		return nil, err
	}
	if m.lib, err = cephfs.CreateFromRados(n.rados); err != nil {
		return nil, err
	}
	m.raw, err = rawOf(m.lib)
	if err == nil {
		err = m.lib.SelectFilesystem(fs)
	}
	root := cephfs.NewUserPerm(0, 0, nil)
	defer root.Destroy()
	if err == nil {
		if err = m.lib.Init(); err == nil {
			err = m.lib.SetMountPerms(root)
		}
	}
	if err == nil {
		err = m.lib.Mount()
	}
	if err != nil {
		m.lib.Release()
		switch errnoOf(err) {
		case syscall.EPERM, syscall.EACCES:
			err = fault.Errorf(fault.Unsupported, "mounting the filesystem %s: %w; the cephx user %s needs mds 'allow rwps fsname=%s'", fs, err, s.cluster.user, fs)
		case syscall.ENOENT, syscall.ETIMEDOUT:
			err = fault.Errorf(fault.Unavailable, "mounting the filesystem %s: %w; it may have no metadata server: see `ceph fs status`", fs, err)
		}
		return nil, err
	}
	n.hold()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed { // the call was abandoned, and Close did not wait for it
		m.users--
		return m, nil
	}
	s.now[fs] = m
	return m, nil
}

func (m *mount) hold() {
	m.mounts.mu.Lock()
	defer m.mounts.mu.Unlock()
	m.users++
}

func (m *mount) release() {
	m.mounts.mu.Lock()
	m.users--
	last := m.users == 0 && !m.lost
	m.mounts.mu.Unlock()
	if last {
		m.lib.Unmount() // nothing can be done about an error: the metadata server forgets the client by and by
		m.lib.Release()
		m.connection.release()
	}
}

// lose makes the next call mount anew, after the metadata servers have shut the client out. Such a mount stays as it is:
// libcephfs may end the process when it is unmounted (the assertion in Client::tear_down_cache of pacific).
func (m *mount) lose() {
	m.mounts.mu.Lock()
	defer m.mounts.mu.Unlock()
	m.lost = true
}

// unmountPatience is how long Close waits for the metadata servers: they confirm the end of a session when they next write
// their journal (mds_tick_interval, 5 s by default).
const unmountPatience = 10 * time.Second

// close ends all mounts.
func (s *mounts) close() {
	s.mu.Lock()
	s.closed = true
	all := s.now
	s.now = map[string]*mount{}
	s.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), unmountPatience)
	defer cancel()
	run(ctx, s.cluster.calls, func(*call) (none, error) {
		var group sync.WaitGroup
		for _, m := range all {
			group.Go(m.release)
		}
		group.Wait()
		return none{}, nil
	})
}

// records opens the place of our records.
func (m *mount) records() (*rados.IOContext, error) {
	return m.connection.pool(m.metadata, recordsNamespace)
}

const (
	recordsNamespace = "stillpoint"
	snapshotsObject  = "stillpoint.snapshots"
	restoresObject   = "stillpoint.restores"
)
