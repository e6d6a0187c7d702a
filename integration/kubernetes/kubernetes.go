// Package kubernetes runs a real Kubernetes for tests: etcd, kube-apiserver, kube-controller-manager, the snapshot
// controller, kubelets and the sidecars of CSI drivers, as plain processes. It is built from source once (see [Build]) and
// started in a few seconds; a cluster takes some 500 MB of memory, and 100 more a node. What is not real: there is no
// scheduler, and kubelets have the container runtime that Kubernetes tests them with, so that a pod's volumes are mounted
// but no container ever runs.
//
//	var cluster kubernetes.Shared
//
//	func TestMain(m *testing.M) { code := m.Run(); … cluster.Close() … }
//
//	func TestX(t *testing.T) { c := cluster.Get(t); c.Admin.Core.CoreV1()… }
//
// A cluster lives in a network namespace of its own that has a loopback device and nothing else, so that its servers can
// have the ports they always have, as many clusters run at once as fit into memory, and nobody else can connect to them. The
// namespaces have no names: threads of the test program hold them, start the programs in them, and connect to them for the
// clients in this package; a program's own connections are made by [Cluster.Dial]. Each node has a mount namespace as well,
// in which its kubelet mounts volumes and in which [Node.Start] runs programs.
//
// Nothing outlives the test program: processes are killed with the threads, namespaces go with the last of both, mounts and
// loop devices with the namespaces, and a shell that waits for the program's end removes the files.
//
// It needs root.
package kubernetes

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"stillpoint.io/stillpoint/integration/peer"
)

// Options says what a cluster has besides its control plane.
type Options struct {
	Nodes int // their names are node-a, node-b, …; at most 26
}

// Cluster is a running Kubernetes. Close it. Methods may be called from any goroutine.
type Cluster struct {
	Admin *Client // may everything
	Nodes []*Node

	Server             *Process // kube-apiserver, at 127.0.0.1:6443 inside: to pause, kill and start again
	Store              *Process // etcd
	Controllers        *Process // kube-controller-manager: of volumes, service accounts and garbage
	SnapshotController *Process

	programs  string // the folder that Build gives
	dir, logs string // logs is in dir
	place     *place
	authority *authority
	guard     *peer.Guard

	mu        sync.Mutex
	processes []*Process
	closers   []io.Closer // of [Cluster.Bring]
	sidecars  int
}

// Start makes a cluster from nothing until its API answers, its custom resources are there and its nodes are ready. It
// builds the programs if that was not done yet.
func Start(ctx context.Context, o Options) (*Cluster, error) {
	programs, err := Build(ctx, os.Stderr)
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "kubernetes-")
	if err != nil {
		return nil, err
	}
	if len(dir) > 40 || strings.HasPrefix(dir, "/var/lib/") || strings.HasPrefix(dir, "/var/log/") {
		return nil, errors.Join(fmt.Errorf("%s is too long a path for sockets in it, or in /var/lib or /var/log, which nodes have their own of: set TMPDIR to another folder", dir), os.Remove(dir))
	}
	c := &Cluster{programs: programs, dir: dir, logs: filepath.Join(dir, "log")}
	// What is killed at that moment may still be writing: it tries more than once.
	c.guard, err = peer.NewGuard(`read -r _; for try in {1..50}; do rm -rf --one-file-system -- "$1" && exit; sleep 0.1; done; exit 1`, dir)
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	if err := c.up(ctx, o); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c, nil
}

func (c *Cluster) up(ctx context.Context, o Options) error {
	if o.Nodes < 0 || o.Nodes > 26 {
		return fmt.Errorf("%d nodes: there are 0 to 26", o.Nodes)
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute) // seconds, but for a busy machine
	defer cancel()
	var err error
	if c.place, err = newNetwork(); err != nil {
		return err
	}
	if err := c.controlPlane(ctx); err != nil {
		return err
	}
	for i := range o.Nodes {
		n, err := c.newNode(i)
		if err != nil {
			return err
		}
		c.Nodes = append(c.Nodes, n)
	}
	for _, n := range c.Nodes {
		if err := n.Ready(ctx); err != nil {
			return err
		}
	}
	return nil
}

// Close kills all processes of the cluster, waits until they are gone, and removes everything else.
func (c *Cluster) Close() error {
	c.mu.Lock()
	processes, closers := c.processes, c.closers
	c.mu.Unlock()
	var errs []error
	for _, l := range closers {
		errs = append(errs, l.Close())
	}
	var all sync.WaitGroup
	failed := make(chan error, len(processes))
	for _, p := range processes {
		all.Go(func() { failed <- p.Kill() })
	}
	all.Wait()
	close(failed)
	for err := range failed {
		errs = append(errs, err)
	}
	for _, n := range c.Nodes {
		n.place.close()
	}
	if c.place != nil {
		c.place.close()
	}
	return errors.Join(append(errs, c.guard.Close())...)
}

// Dial connects to a server in the cluster's network, such as "127.0.0.1:6443".
func (c *Cluster) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	return c.place.dial(ctx, network, address)
}

// Folder makes a folder for the test's own files, short enough a path for a socket in it. It is removed with the cluster.
func (c *Cluster) Folder() (string, error) { return os.MkdirTemp(c.dir, "t") }

// CA is the certificate of the authority that signed every certificate of the cluster, in PEM.
func (c *Cluster) CA() []byte { return c.authority.pem }

// Start starts one more program in the cluster's network, with the mounts of this process. It ends with the cluster, or
// before.
func (c *Cluster) Start(name string, env []string, command ...string) (*Process, error) {
	return c.start(c.place, name, false, env, command...)
}

func (c *Cluster) start(in *place, name string, again bool, env []string, command ...string) (*Process, error) {
	c.mu.Lock()
	p := &Process{Name: name, place: in, command: command, env: env, again: again,
		log: filepath.Join(c.logs, fmt.Sprintf("%02d-%s", len(c.processes), name))}
	c.processes = append(c.processes, p)
	c.mu.Unlock()
	return p, p.Start()
}

// Program is the path of a program of integration/tools, by the last element of its package.
func (c *Cluster) Program(name string) string { return filepath.Join(c.programs, name) }

// Await asks until the answer is no error. It ends early when one of the processes that are needed for it has ended.
func Await(ctx context.Context, what string, ready func(context.Context) error, needed ...*Process) error {
	for {
		err := ready(ctx)
		if err == nil {
			return nil
		}
		for _, p := range needed {
			select {
			case <-p.Ended():
				return fmt.Errorf("%s: %s has ended:\n%s", what, p.Name, tail(p.Log(), 4000))
			default:
			}
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			said := ""
			for _, p := range needed {
				said += fmt.Sprintf("\n--- %s\n%s", p.Name, tail(p.Log(), 4000))
			}
			return fmt.Errorf("%s: %w; the last answer was: %w%s", what, ctx.Err(), err, said)
		}
	}
}
