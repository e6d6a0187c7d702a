package lvmthin

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/fault"
)

// Programs of LVM's, run so that nothing of ours can break one off.
//
// A program's output goes into memory files, not into pipes: when we die, a pipe would kill it at its next word. It is
// in a session of its own, where no terminal's signal reaches it, nor the SIGHUP for a stopped process whose parent
// dies. No context ends it. Each has a goroutine that waits for its end, keeps its record until then, and puts right
// what a violent end has left.
//
// Its standard input is its record: a file in the folder of records, locked (flock) by the very open file that the
// program inherits. So the kernel holds the lock exactly as long as the program lives, whatever becomes of us, and a
// record whose lock is free is that of a program that is over. LVM closes all other files that it inherits. The
// record's first line is a comment to LVM, and what follows may be a script for it.

// commands are the programs under way.
type commands struct {
	state  *state
	mapper mapper

	mu      sync.Mutex
	running map[*command]struct{}
	ended   chan struct{} // closed and made anew whenever one ends
}

// command is a program.
type command struct {
	line    string // for people
	cmd     *exec.Cmd
	out     *os.File // memory
	words   *os.File // memory, its stderr
	record  string   // path; empty if it suspends nothing
	release func()   // what is called at its end
	done    chan struct{}

	// Set when done is closed.
	stdout  []byte
	stderr  string
	code    int   // exit code, -1 if it was killed
	failure error // it could not be waited for
}

// intent is what a record says.
type intent struct {
	Owner   process  `json:"owner"`
	Line    string   `json:"line"`    // what is run
	Group   string   `json:"group"`   // the name of the volume group, whose lock the program holds while it suspends
	Locks   string   `json:"locks"`   // LVM's folder of locks
	Devices []string `json:"devices"` // UUIDs of device-mapper that the program may suspend, and that were not suspended before
}

const recordPrefix = "lvm-"

// start starts a program. An intent's script, if there is one, is its standard input. release is called at its
// end, and not on an error.
func (c *commands) start(name string, args, env []string, in *intent, script string, release func()) (*command, error) {
	r := &command{release: release, line: strings.Join(append([]string{filepath.Base(name)}, args...), " "), done: make(chan struct{})}
	stdin, err := r.input(c.state, in, script)
	if err != nil {
		return nil, err
	}
	defer stdin.Close() // ours: the program has its own by then
	defer func() {
		if err != nil {
			r.forget()
		}
	}()
	if r.out, err = memory("lvm-output"); err != nil {
		return nil, err
	}
	if r.words, err = memory("lvm-words"); err != nil {
		return nil, err
	}
	r.cmd = exec.Command(name, args...)
	r.cmd.Env, r.cmd.Dir = env, "/"
	r.cmd.Stdin, r.cmd.Stdout, r.cmd.Stderr = stdin, r.out, r.words
	r.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err = r.cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting %s: %w", name, err)
	}
	c.mu.Lock()
	if c.running == nil {
		c.running, c.ended = map[*command]struct{}{}, make(chan struct{})
	}
	c.running[r] = struct{}{}
	c.mu.Unlock()
	go c.own(r, in)
	return r, nil
}

// own waits for the program's end.
func (c *commands) own(r *command, in *intent) {
	err := r.cmd.Wait()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		r.code = exit.ExitCode()
	} else if err != nil {
		r.code, r.failure = -1, err
	}
	var e1, e2 error
	r.stdout, e1 = contents(r.out)
	words, e2 := contents(r.words)
	r.stderr = string(words)
	r.failure = errors.Join(r.failure, e1, e2)
	if in != nil {
		if r.code < 0 {
			r.failure = errors.Join(r.failure, c.mapper.recover(*in))
		}
		r.forget()
	}
	r.release()
	c.mu.Lock()
	delete(c.running, r)
	close(c.ended)
	c.ended = make(chan struct{})
	c.mu.Unlock()
	close(r.done)
}

// wait waits for the program, until the context ends: then it goes on without us, and the error says so.
func (r *command) wait(ctx context.Context) error {
	select {
	case <-r.done:
		return nil
	default:
	}
	select {
	case <-r.done:
		return nil
	case <-ctx.Done():
		return fault.Errorf(fault.Unavailable, "%s (process %d) is still running, and is left to finish, because LVM must not be killed: %w", r.line, r.cmd.Process.Pid, context.Cause(ctx))
	}
}

// close waits for the programs under way, but not for ever.
func (c *commands) close(patience time.Duration) error {
	timer := time.NewTimer(patience)
	defer timer.Stop()
	for {
		c.mu.Lock()
		n, ended, line := len(c.running), c.ended, ""
		for r := range c.running {
			line = fmt.Sprintf("%s (process %d)", r.line, r.cmd.Process.Pid)
		}
		c.mu.Unlock()
		if n == 0 {
			return nil
		}
		select {
		case <-ended:
		case <-timer.C:
			return fault.Errorf(fault.Busy, "%d programs of LVM are still running, such as %s; they are not killed", n, line)
		}
	}
}

// input makes the standard input: nothing, or a record that is locked before anybody can see it.
func (r *command) input(s *state, in *intent, script string) (*os.File, error) {
	if in == nil && script == "" {
		return os.Open(os.DevNull)
	}
	if in == nil {
		return nil, errors.New("a script without an intent")
	}
	if err := s.make(); err != nil {
		return nil, err
	}
	head, err := json.Marshal(in)
	if err != nil {
		return nil, err
	}
	fd, err := unix.Open(s.folder, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, s.unusable(err)
	}
	f := os.NewFile(uintptr(fd), s.folder+"/record")
	if _, err = tryFlock(f, unix.LOCK_EX); err == nil {
		_, err = f.WriteString("# " + string(head) + "\n" + script)
	}
	if err == nil {
		_, err = f.Seek(0, io.SeekStart)
	}
	if err == nil {
		r.record = filepath.Join(s.folder, recordPrefix+strings.ToLower(randomText()))
		err = unix.Linkat(fd, "", unix.AT_FDCWD, r.record, unix.AT_EMPTY_PATH)
	}
	if err != nil {
		r.record = ""
		f.Close()
		return nil, s.unusable(err)
	}
	return f, nil
}

// forget removes the record.
func (r *command) forget() {
	if r.record != "" {
		os.Remove(r.record)
	}
}

// readIntent reads a record.
func readIntent(b []byte) (intent, bool) {
	line, _, _ := bytes.Cut(b, []byte("\n"))
	var in intent
	rest, ok := bytes.CutPrefix(line, []byte("# "))
	return in, ok && json.Unmarshal(rest, &in) == nil
}

// memory is a file in memory.
func memory(name string) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("memfd_create: %w", err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

// outputMax is the most that a program's output may be, in bytes: the report of a group of 100,000 volumes.
const outputMax = 128 << 20

// contents is all that was written into a memory file, which is closed.
func contents(f *os.File) ([]byte, error) {
	defer f.Close()
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	b, err := io.ReadAll(io.LimitReader(f, outputMax+1))
	if len(b) > outputMax {
		err = fmt.Errorf("more than %d bytes of output", outputMax)
	}
	return b, err
}
