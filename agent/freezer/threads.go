package freezer

import (
	"runtime"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// threads are locked operating system threads for calls that nothing can interrupt. They are started before
// anything is frozen: in between, not even a thread is made.
type threads struct {
	jobs chan func()
	free atomic.Int64
}

func newThreads() *threads { return &threads{jobs: make(chan func())} }

// ensure starts threads until n are free.
func (t *threads) ensure(n int) {
	for t.free.Load() < int64(n) {
		started := make(chan struct{})
		go func() {
			runtime.LockOSThread()
			t.free.Add(1)
			close(started)
			for job := range t.jobs {
				job()
				t.free.Add(1)
			}
		}()
		<-started
	}
}

// run runs a job on a free thread, or, should more hang than anybody foresaw, on a new one.
func (t *threads) run(job func()) {
	if t.free.Add(-1) < 0 {
		t.free.Add(1)
		t.ensure(1)
		t.free.Add(-1)
	}
	t.jobs <- job
}

const (
	fifreeze = 0xC0045877 // linux/fs.h
	fithaw   = 0xC0045878
)

// ioctl calls without the runtime's retry on EINTR, and without an argument.
func ioctl(fd int, request uintptr) error {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// thaw calls FITHAW for an entry that the caller has claimed, until the outcome is known, and settles it. A thaw that
// fails on the way (a device that gives errors) leaves the filesystem frozen; only trying again can help.
func thaw(e *entry, fd int) {
	for {
		switch err := ioctl(fd, fithaw); err {
		case nil:
			e.ThawedAt.Store(boottime())
			e.State.Store(uint32(thawed))
			return
		case unix.EINVAL:
			e.ThawedAt.Store(boottime())
			e.State.Store(uint32(gone))
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// freeze calls FIFREEZE on an entry, whose state is freezing, and returns once it is settled or ours. It is run on a
// thread of its own, and nobody waits for it without a deadline.
func freeze(e *entry, fd int) error {
	e.Thread.Store(int32(unix.Gettid()))
	if err := ioctl(fd, fifreeze); err != nil {
		e.State.Store(uint32(unfrozen))
		return err
	}
	e.FrozenAt.Store(boottime())
	if !e.swap(freezing, frozen) && e.claim(doomed, thawingHolder, boottime()) {
		thaw(e, fd) // it landed after its time
	}
	return nil
}
