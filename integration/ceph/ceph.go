// Package ceph starts a real Ceph cluster for tests: a monitor, a manager, an OSD on BlueStore in a sparse file, and if
// wanted CephFS's metadata server and the S3 gateway, all on the loopback device and below one folder. It takes 3 to 5
// seconds. Debian 12 has Ceph 16.2.15 (pacific); it runs as root.
package ceph

import (
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/integration/peer"
)

//go:embed ceph-up.sh
var script []byte

// Options says what runs.
type Options struct {
	Files bool   // CephFS
	S3    bool   // the S3 gateway
	Bare  bool   // no manager, which images do not need: the start takes half as long
	Size  string // of the OSD's sparse file, as numfmt reads it; 32G if empty
	// Lease is for how many seconds the OSD may answer reads on its own (osd_pool_default_read_lease_ratio), 7 if zero. It
	// renews its lease at half that time. One that was paused for longer finds its lease expired, and what it is asked
	// before it has renewed it, it never answers, because its pools have one replica and nobody acknowledges the renewal
	// (its placement groups stay laggy; seen with 16.2.15). And one that was killed does not answer anew before so long.
	Lease int
	// Watch is after how many seconds a client that died or is away is taken for dead (osd_client_watch_timeout), 30 if
	// zero. Clients tell every 5 that they live, or every objecter_tick_interval.
	Watch int
}

// NeverKilled is a lease for a cluster whose OSD is not killed: it may be paused for half a minute.
const NeverKilled = 60

// Cluster is a running Ceph. Close it.
type Cluster struct {
	Conf string // the path of ceph.conf; the administrator's key is named in it

	S3Endpoint           string // if there is the gateway
	AccessKey, SecretKey string

	Ports [2]int // the first and the last of 127.0.0.1 that the daemons listen at

	dir   string
	env   []string
	guard *peer.Guard
}

// ports is how many ports a cluster has for its daemons.
const ports = 50

// Start makes a cluster from nothing, until it says HEALTH_OK.
func Start(ctx context.Context, o Options) (*Cluster, error) {
	for _, program := range []string{"ceph-mon", "ceph-mgr", "ceph-osd", "ceph"} {
		if _, err := exec.LookPath(program); err != nil {
			return nil, fmt.Errorf("a program of Ceph is missing: %w; `make test` installs it", err)
		}
	}
	parent, err := os.MkdirTemp("", "ceph-")
	if err != nil {
		return nil, err
	}
	if len(parent) > 50 {
		os.RemoveAll(parent)
		return nil, fmt.Errorf("%s is too long a path for Ceph's sockets: set TMPDIR to a shorter one", parent)
	}
	c := &Cluster{dir: filepath.Join(parent, "c"), AccessKey: "TESTACCESSKEY0000001", SecretKey: "testsecretkey0000000000000000000000000001"}
	c.Conf = filepath.Join(c.dir, "ceph.conf")
	if err := os.WriteFile(c.script(), script, 0o700); err != nil {
		return nil, err
	}
	c.guard, err = peer.NewGuard(`read -r _; bash "$1/ceph-up.sh" purge "$1/c" >/dev/null 2>&1; rm -rf -- "$1"`, parent)
	if err != nil {
		return nil, err
	}
	for range 3 { // somebody may take a port that was free a moment ago
		var port int
		if port, err = peer.Ports(ports); err != nil {
			break
		}
		c.Ports = [2]int{port, port + ports - 1}
		c.env = append(os.Environ(), fmt.Sprintf("PORT=%d", port), "MGR="+bit(!o.Bare), "MDS="+bit(o.Files), "RGW="+bit(o.S3),
			"S3_KEY="+c.AccessKey, "S3_SECRET="+c.SecretKey)
		if o.Size != "" {
			c.env = append(c.env, "OSD_SIZE="+o.Size)
		}
		if o.Lease != 0 {
			c.env = append(c.env, "LEASE="+strconv.Itoa(o.Lease))
		}
		if o.Watch != 0 {
			c.env = append(c.env, "WATCH="+strconv.Itoa(o.Watch))
		}
		if o.S3 {
			c.S3Endpoint = fmt.Sprintf("http://127.0.0.1:%d", port+40)
		}
		if err = c.Up(ctx); err == nil {
			return c, nil
		}
		if e := c.run(ctx, "purge"); e != nil {
			err = errors.Join(err, e)
			break
		}
	}
	return nil, errors.Join(err, c.Close())
}

func bit(b bool) string {
	if b {
		return "1"
	}
	return "0"
}

// Up starts the daemons again after Down.
func (c *Cluster) Up(ctx context.Context) error { return c.run(ctx, "start") }

// Down stops the daemons; the data stays.
func (c *Cluster) Down(ctx context.Context) error { return c.run(ctx, "stop") }

// PauseOSD stops the OSD where it is (SIGSTOP): requests to it hang. ResumeOSD lets it go on, which must be within half
// the lease (Options).
func (c *Cluster) PauseOSD() error { return c.signalOSD(syscall.SIGSTOP) }

// PauseMDS stops the metadata server where it is (SIGSTOP): calls to it hang. ResumeMDS lets it go on.
func (c *Cluster) PauseMDS() error { return c.signal("mds.a", syscall.SIGSTOP) }

// ResumeMDS lets a paused metadata server go on.
func (c *Cluster) ResumeMDS() error { return c.signal("mds.a", syscall.SIGCONT) }

// ResumeOSD lets a paused OSD go on.
func (c *Cluster) ResumeOSD() error { return c.signalOSD(syscall.SIGCONT) }

// KillOSD kills the OSD. Requests to it hang until StartOSD.
func (c *Cluster) KillOSD() error { return c.signalOSD(syscall.SIGKILL) }

// StartOSD starts the OSD anew after KillOSD.
func (c *Cluster) StartOSD(ctx context.Context) error { return c.run(ctx, "osd") }

func (c *Cluster) signalOSD(s syscall.Signal) error { return c.signal("osd.0", s) }

// signal sends a signal to a daemon. A stop and a kill are waited for: each thread has to come to them.
func (c *Cluster) signal(daemon string, s syscall.Signal) error {
	text, err := os.ReadFile(filepath.Join(c.dir, "run", daemon+".pid"))
	if err != nil {
		return err
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		return err
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	// The number may be another process's by now: what counts is whose the descriptor is.
	if line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)); err != nil || !strings.Contains(string(line), c.Conf) {
		return fmt.Errorf("process %d is not %s of %s", pid, daemon, c.dir)
	}
	if err := unix.PidfdSendSignal(fd, s, nil, 0); err != nil {
		return err
	}
	switch s {
	case syscall.SIGSTOP:
		return peer.Stopped(pid)
	case syscall.SIGCONT:
		return nil
	}
	_, err = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(10*time.Second/time.Millisecond))
	return err
}

// User makes a cephx user with the capabilities that Ceph's profile for RBD gives, and returns its key.
func (c *Cluster) User(ctx context.Context, name string) (key string, err error) {
	return c.UserWith(ctx, name, "mon", "profile rbd", "osd", "profile rbd", "mgr", "profile rbd")
}

// UserWith makes a cephx user with capabilities, pairs of a kind of daemon and what is allowed there, and returns its key.
func (c *Cluster) UserWith(ctx context.Context, name string, capabilities ...string) (key string, err error) {
	cmd := c.Command(ctx, "ceph", append([]string{"auth", "get-or-create-key", "client." + name}, capabilities...)...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("making the user %s: %w: %s", name, err, stderr.Bytes())
	}
	return strings.TrimSpace(string(out)), nil
}

// FilesUser makes a cephx user that may read, write and snapshot the filesystem, make and remove subvolumes, and keep records
// beside it in the namespace stillpoint, and returns its key.
func (c *Cluster) FilesUser(ctx context.Context, name string) (key string, err error) {
	return c.UserWith(ctx, name, "mon", "allow r fsname=cephfs", "mds", "allow rws fsname=cephfs", "mgr", "allow module volumes rw",
		"osd", "allow rw tag cephfs data=cephfs, allow rwx pool=cephfs_metadata namespace=stillpoint")
}

// Close kills the daemons and removes everything.
func (c *Cluster) Close() error { return c.guard.Close() }

// Command is one of Ceph's commands, for this cluster.
func (c *Cluster) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(c.env, "CEPH_CONF="+c.Conf)
	return cmd
}

func (c *Cluster) script() string { return filepath.Join(filepath.Dir(c.dir), "ceph-up.sh") }

// run runs the script. Its output goes to a file: the daemons keep it open.
func (c *Cluster) run(ctx context.Context, verb string) error {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	log, err := os.Create(filepath.Join(filepath.Dir(c.dir), verb+".log"))
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.CommandContext(ctx, "bash", c.script(), verb, c.dir)
	cmd.Env, cmd.Stdout, cmd.Stderr = c.env, log, log
	if err := cmd.Run(); err != nil {
		said, _ := os.ReadFile(log.Name())
		return fmt.Errorf("ceph-up.sh %s: %w\n%s", verb, err, strings.TrimSpace(string(said)))
	}
	return nil
}
