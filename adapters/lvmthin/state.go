package lvmthin

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/fault"
)

// state is the folder of locks and records that all processes of ours on a node share. It is made when it is needed.
type state struct {
	folder string
	turns  turns
}

// pollStep is how often a lock is tried that somebody else holds.
const pollStep = 5 * time.Millisecond

// make makes the folder, root's alone.
func (s *state) make() error {
	if err := os.MkdirAll(s.folder, 0o700); err != nil {
		return s.unusable(err)
	}
	var st unix.Stat_t
	if err := unix.Lstat(s.folder, &st); err != nil {
		return s.unusable(err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR || int(st.Uid) != os.Geteuid() || st.Mode&0o022 != 0 {
		return fault.Errorf(fault.Invalid, "the folder %s for locks and records must be a folder of ours that nobody else can write to; it belongs to user %d with mode %04o", s.folder, st.Uid, st.Mode&0o7777)
	}
	return nil
}

func (s *state) unusable(err error) error {
	kind, _ := classify(errno(err))
	if kind == fault.Internal {
		kind = fault.Unavailable
	}
	return fault.Errorf(kind, "the folder %s for locks and records cannot be used: %w; it needs root, or another folder (parameter state)", s.folder, err)
}

// open opens a file of the folder, and makes it.
func (s *state) open(name string) (*os.File, error) {
	if err := s.make(); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(s.folder, name), os.O_RDWR|os.O_CREATE|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, s.unusable(err)
	}
	return f, nil
}

// lock opens a file and holds it alone: the kernel lets it go when the file is closed, also by the death of the
// process. While another holds it, it waits until the context ends.
func (s *state) lock(ctx context.Context, name string) (*os.File, error) {
	var f *os.File
	err := poll(ctx, pollStep, func() (ok bool, err error) {
		f, err = s.tryLock(name, unix.LOCK_EX)
		return f != nil, err
	})
	return f, err
}

// tryLock locks a file, in one of flock's ways; nil if others have it.
func (s *state) tryLock(name string, how int) (*os.File, error) {
	for {
		f, err := s.open(name)
		if err != nil {
			return nil, err
		}
		free, err := tryFlock(f, how)
		if err == nil && free && !there(f) {
			f.Close() // removed by who had it until now: a lock on it would be none
			continue
		}
		if err != nil || !free {
			f.Close()
			return nil, err
		}
		return f, nil
	}
}

// there reports whether an open file still has its name.
func there(f *os.File) bool {
	ours, e1 := f.Stat()
	named, e2 := os.Lstat(f.Name())
	return e1 == nil && e2 == nil && os.SameFile(ours, named)
}

// unlock lets a lock go before it closes the file: a child that is just being started may have a copy of the
// descriptor.
func unlock(f *os.File) {
	unix.Flock(int(f.Fd()), unix.LOCK_UN)
	f.Close()
}

// list lists the files whose names begin so.
func (s *state) list(prefix string) ([]string, error) {
	entries, err := os.ReadDir(s.folder)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, s.unusable(err)
	}
	var names []string
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), prefix) {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// tryFlock takes a lock if nobody has it.
func tryFlock(f *os.File, how int) (bool, error) {
	for {
		switch err := unix.Flock(int(f.Fd()), how|unix.LOCK_NB); err {
		case nil:
			return true, nil
		case unix.EWOULDBLOCK:
			return false, nil
		case unix.EINTR:
		default:
			return false, fmt.Errorf("locking %s: %w", f.Name(), err)
		}
	}
}

// poll asks again and again, until the answer is yes, an error, or the context's end.
func poll(ctx context.Context, step time.Duration, done func() (bool, error)) error {
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		if ok, err := done(); ok || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
		case <-time.After(step):
		}
	}
}

// turns are queues within a process, by name: who waits in one need not poll for a lock that others of the process
// want.
type turns struct {
	mu  sync.Mutex
	all map[string]chan struct{}
}

// take waits for its turn, or the context's end.
func (t *turns) take(ctx context.Context, name string) error {
	t.mu.Lock()
	if t.all == nil {
		t.all = map[string]chan struct{}{}
	}
	turn := t.all[name]
	if turn == nil {
		turn = make(chan struct{}, 1)
		t.all[name] = turn
	}
	t.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	select {
	case turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// give ends a turn.
func (t *turns) give(name string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	<-t.all[name]
}

// exclusive is the lock of a name, with a turn in this process first. It is given back by calling what it returns.
func (s *state) exclusive(ctx context.Context, name string) (release func(), err error) {
	if err := s.turns.take(ctx, name); err != nil {
		return nil, err
	}
	f, err := s.lock(ctx, name)
	if err != nil {
		s.turns.give(name)
		return nil, err
	}
	return func() {
		unlock(f)
		s.turns.give(name)
	}, nil
}

// process is who wrote a record: a process of one boot. Its start time tells it from a later one with its number.
type process struct {
	Boot  string `json:"boot"`
	PID   int    `json:"pid"`
	Start uint64 `json:"start"` // ticks since boot: field 22 of /proc/PID/stat
}

func thisProcess() process { return identify(os.Getpid()) }

func identify(pid int) process {
	start, _ := startOf(pid)
	return process{Boot: bootID(), PID: pid, Start: start}
}

// alive reports whether the process is still there.
func (p process) alive() bool {
	start, err := startOf(p.PID)
	return err == nil && start == p.Start && p.Boot == bootID()
}

func startOf(pid int) (uint64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	_, rest, ok := strings.Cut(string(b), ") ") // the name before it may hold anything, but not as its last
	if i := strings.LastIndex(string(b), ") "); ok && i >= 0 {
		rest = string(b)[i+2:]
	}
	fields := strings.Fields(rest)
	if len(fields) < 20 {
		return 0, fmt.Errorf("/proc/%d/stat is not what proc(5) says", pid)
	}
	return strconv.ParseUint(fields[19], 10, 64)
}

func bootID() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// errno is the system call's error in an error of package os, so that it can be classified.
func errno(err error) error {
	var e unix.Errno
	if errors.As(err, &e) {
		return e
	}
	return err
}
