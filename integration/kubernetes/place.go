package kubernetes

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// place is namespaces without a name, held by a thread of this process that does nothing else: they are gone with the
// thread, however the process goes. Programs are started from that thread, so that they are in its namespaces and are
// killed when it ends (PR_SET_PDEATHSIG asks for the death of the parent's thread, see prctl(2)).
type place struct {
	jobs     chan func()
	ended    chan struct{}
	net, mnt *os.File // its namespaces, for other threads to enter; mnt is nil where it has no own mounts
}

// newNetwork is a place with a network of its own that has only the loopback device, and with the mounts of this process.
func newNetwork() (*place, error) {
	return newPlace(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("making a network namespace, which needs root: %w", err)
		}
		return loopbackUp()
	}, false)
}

// newMounts is a place in the same network whose mounts are its own: none that is made there is seen elsewhere, nor the
// other way round. setup runs in it.
func (p *place) newMounts(setup func() error) (*place, error) {
	return newPlace(func() error {
		if err := unix.Setns(int(p.net.Fd()), unix.CLONE_NEWNET); err != nil {
			return err
		}
		if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
			return fmt.Errorf("making a mount namespace, which needs root: %w", err)
		}
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			return err
		}
		return setup()
	}, true)
}

func newPlace(setup func() error, mounts bool) (*place, error) {
	p := &place{jobs: make(chan func()), ended: make(chan struct{})}
	ready := make(chan error)
	go func() {
		defer close(p.ended)
		runtime.LockOSThread() // never unlocked: the thread ends with this function
		err := setup()
		if err == nil {
			p.net, err = os.Open("/proc/thread-self/ns/net")
		}
		if err == nil && mounts {
			p.mnt, err = os.Open("/proc/thread-self/ns/mnt")
		}
		ready <- err
		for job := range p.jobs {
			job()
		}
	}()
	if err := <-ready; err != nil {
		p.close()
		return nil, err
	}
	return p, nil
}

// close ends the thread, which kills what was started in the place and not waited for. No call may be under way.
func (p *place) close() {
	close(p.jobs)
	<-p.ended
	for _, f := range []*os.File{p.net, p.mnt} {
		if f != nil {
			f.Close()
		}
	}
}

// start starts a program in the place.
func (p *place) start(cmd *exec.Cmd) error {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	done := make(chan error)
	p.jobs <- func() { done <- cmd.Start() }
	return <-done
}

// enter runs a function on a thread of its own in the place, and waits for it. The thread is thrown away.
func (p *place) enter(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		done <- func() error {
			if err := unix.Setns(int(p.net.Fd()), unix.CLONE_NEWNET); err != nil {
				return fmt.Errorf("entering the network of a cluster: %w", err)
			}
			if p.mnt != nil {
				// A mount namespace can be entered only by who shares its root and working directory with nobody: setns(2).
				if err := errors.Join(unix.Unshare(unix.CLONE_FS), unix.Setns(int(p.mnt.Fd()), unix.CLONE_NEWNS)); err != nil {
					return fmt.Errorf("entering the mounts of a node: %w", err)
				}
			}
			return f()
		}()
	}()
	return <-done
}

// dial connects to a server in the place. A socket belongs to the network that its thread is in when it is made, and can
// be used from every thread from then on.
func (p *place) dial(ctx context.Context, network, address string) (conn net.Conn, err error) {
	err = p.enter(func() error {
		var d net.Dialer
		conn, err = d.DialContext(ctx, network, address)
		return err
	})
	return conn, err
}

// listen opens a listening socket in the place.
func (p *place) listen(ctx context.Context, address string) (listener net.Listener, err error) {
	err = p.enter(func() error {
		var c net.ListenConfig
		listener, err = c.Listen(ctx, "tcp4", address)
		return err
	})
	return listener, err
}

// loopbackUp switches the loopback device of the thread's network on.
func loopbackUp() error {
	return interfaceRequest("lo", func(fd int, r *unix.Ifreq) error {
		r.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
		return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, r)
	})
}

// loopbackAddress gives the loopback device one more address, as its nth alias: netdevice(7).
func loopbackAddress(n int, ip net.IP) error {
	return interfaceRequest(fmt.Sprintf("lo:%d", n), func(fd int, r *unix.Ifreq) error {
		if err := r.SetInet4Addr(ip.To4()); err != nil {
			return err
		}
		return unix.IoctlIfreq(fd, unix.SIOCSIFADDR, r)
	})
}

func interfaceRequest(name string, do func(fd int, r *unix.Ifreq) error) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	r, err := unix.NewIfreq(name)
	if err != nil {
		return err
	}
	if err := do(fd, r); err != nil {
		return fmt.Errorf("configuring %s: %w", name, err)
	}
	return nil
}
