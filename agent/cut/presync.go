package cut

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/fault"
)

const (
	// syncRounds is how often dirty pages are flushed before the freeze, at most.
	syncRounds = 3
	// syncEnough is a flush so short that the freeze, which flushes once more, will be short.
	syncEnough = 50 * time.Millisecond
)

// sync flushes the filesystems until a round is quick. The freeze is not started on one that takes more than a quarter
// of the deadline even then: it would not be over in time.
func (n Node) sync(ctx context.Context, r Request, list []Freezing) error {
	last := make([]time.Duration, len(list))
	for range syncRounds {
		err := each(len(list), func(i int) (err error) {
			last[i], err = n.syncOne(ctx, list[i])
			return err
		})
		if err != nil {
			return err
		}
		slow := false
		for _, t := range last {
			slow = slow || t > syncEnough
		}
		if !slow {
			break
		}
	}
	for i, t := range last {
		if t > r.MaxFreeze/4 {
			return fault.Errorf(fault.Unavailable, "%s: writing its dirty pages still took %v after %d rounds, more than a quarter of the freeze's deadline of %v: try when less is written, or raise --max-freeze (at most 60s)",
				list[i].Filesystem, t.Round(time.Millisecond), syncRounds, r.MaxFreeze)
		}
	}
	return nil
}

// syncOne flushes one filesystem with syncfs(2), never with sync(2), which would wait for every mount of the machine.
// It can hang in the kernel for ever, beyond the reach of any signal, so it runs in a process of its own, which is
// abandoned when ctx ends.
func (n Node) syncOne(ctx context.Context, f Freezing) (time.Duration, error) {
	begin := time.Now()
	argv := append(n.SyncCommand, n.Host.Path(f.Filesystem))
	path, err := exec.LookPath(argv[0])
	if err != nil {
		return 0, fault.Errorf(fault.Invalid, "flushing %s: %w", f.Filesystem, err)
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return 0, err
	}
	defer null.Close()
	pidfd := -1
	p, err := os.StartProcess(path, argv, &os.ProcAttr{Files: []*os.File{null, null, null}, Sys: &syscall.SysProcAttr{PidFD: &pidfd, Pdeathsig: syscall.SIGKILL}})
	if err != nil {
		return 0, fault.Errorf(fault.Unavailable, "flushing %s: %w", f.Filesystem, err)
	}
	if pidfd < 0 {
		p.Release()
		return 0, fault.Errorf(fault.Unsupported, "flushing %s: this kernel has no pidfd (Linux 5.4)", f.Filesystem)
	}
	defer unix.Close(pidfd)
	err = poll(ctx, func() (bool, error) {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, 0)
		return n > 0, err
	})
	if err != nil {
		p.Kill()
		p.Release()
		return 0, fmt.Errorf("flushing %s: %w", f.Filesystem, err)
	}
	state, err := p.Wait()
	if err == nil && !state.Success() {
		err = fault.Errorf(fault.Unavailable, "flushing %s: %s %s", f.Filesystem, path, state)
	}
	return time.Since(begin), err
}

// poll calls f until it says true, at growing intervals of at most 10 ms, or ctx ends.
func poll(ctx context.Context, f func() (bool, error)) error {
	wait := 500 * time.Microsecond
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
		case <-ctx.Done():
			return ctx.Err()
		}
		done, err := f()
		if errors.Is(err, unix.EINTR) {
			done, err = false, nil
		}
		if done || err != nil {
			return err
		}
		wait = min(wait*3/2, 10*time.Millisecond)
		timer.Reset(wait)
	}
}
