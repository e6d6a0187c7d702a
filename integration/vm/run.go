package vm

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/integration/lab"
	"stillpoint.io/stillpoint/integration/peer"
)

// Command is a program to run where there is device-mapper.
type Command struct {
	Path           string    // an absolute path
	Args           []string  // without the program's name
	Env            []string  // os.Environ if nil; PATH is completed, HOME and TMPDIR are the guest's own
	Dir            string    // the working directory if empty
	Stdout, Stderr io.Writer // live; nil discards. If they are the same, what is written keeps its order (they must be comparable)

	limit time.Duration // the guest gives up after it, if not 0
}

// Run runs a program in a new guest, or in place, and returns its exit code (128 and the signal's number if a signal
// killed it). The calling program must call [Init] first of all: it is the guest's init too. An error means that there
// is no exit code: no guest could be made, or it died, in which case the error has the last of its kernel's messages; or
// ctx ended, which kills the guest.
func Run(ctx context.Context, c Config, cmd Command) (int, error) {
	kind, err := chosen()
	if err != nil {
		return 0, err
	}
	if kind == here {
		return runHere(ctx, c, cmd)
	}
	m, err := newMachine(ctx, kind, c)
	if err != nil {
		return 0, err
	}
	code, err := m.run(ctx, cmd)
	return code, errors.Join(err, m.close())
}

// machine is a guest before, while and after it runs, and what it shares with us.
type machine struct {
	kind   kind
	config Config
	folder folder
	memory string // a folder of its own in /dev/shm
	guard  *peer.Guard
	kernel kernel
	self   string   // this binary, as the guest can run it
	disks  []string // files; the last is the scratch filesystem
}

// folder is where a guest's files are on our side. What is in share is in the guest's guestShare too, writable.
type folder string

func (f folder) share(elements ...string) string {
	return filepath.Join(append([]string{string(f), "share"}, elements...)...)
}

const guestShare = "/run/share"

const defaultMemory, defaultScratch = 1 << 30, 16 << 30

// newMachine makes the files of a guest. Whatever happens to us, a guard removes them.
func newMachine(ctx context.Context, kind kind, c Config) (m *machine, err error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("a guest needs root: it gets a PID namespace, so that all of it can be killed at once")
	}
	if c.Memory == 0 {
		c.Memory = defaultMemory
	}
	if c.Scratch == 0 {
		c.Scratch = defaultScratch
	}
	k, err := findKernel(ctx, kind)
	if err != nil {
		return nil, err
	}
	name := "stillpoint-vm-" + strings.ToLower(rand.Text()[:10])
	m = &machine{kind: kind, config: c, kernel: k, folder: folder(filepath.Join(os.TempDir(), name)), memory: filepath.Join("/dev/shm", name)}
	if strings.ContainsAny(string(m.folder), " \"") {
		return nil, fmt.Errorf("%q has a character that a kernel's command line cannot pass: set TMPDIR to another folder", m.folder)
	}
	if err := roomFor(c.Memory); err != nil {
		return nil, err
	}
	m.guard, err = newGuard(string(m.folder), m.memory)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, m.close())
		}
	}()
	for _, dir := range []string{m.memory, m.folder.share("bin"), lab.Base} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, err
		}
	}
	if m.self, err = os.Executable(); err != nil {
		return nil, err
	}
	if withRaceDetector && kind != qemu {
		if m.self, err = withoutRaceDetector(ctx, m.folder.share("guest.test")); err != nil {
			return nil, err
		}
	}
	if err := os.Symlink(m.self, m.folder.share("init")); err != nil {
		return nil, err
	}
	if err := c.build(ctx, m.folder.share("bin")); err != nil {
		return nil, err
	}
	for i, size := range append(c.Disks, c.Scratch) {
		path := filepath.Join(string(m.folder), fmt.Sprintf("disk%d", i))
		if err := lab.Sparse(path, size); err != nil {
			return nil, err
		}
		m.disks = append(m.disks, path)
	}
	return m, lab.Mkfs(ctx, "xfs", m.disks[len(c.Disks)])
}

// newGuard is a shell that removes folders once it is closed or we are dead. What is killed at that moment may still be
// writing: it tries more than once.
func newGuard(folders ...string) (*peer.Guard, error) {
	return peer.NewGuard(`read -r _; for try in {1..50}; do rm -rf -- "$@" && exit; sleep 0.1; done; exit 1`, folders...)
}

func (m *machine) close() error { return m.guard.Close() }

// roomFor fails early: a guest that finds /dev/shm full dies of SIGBUS without a word.
func roomFor(memory int64) error {
	var s unix.Statfs_t
	if err := unix.Statfs("/dev/shm", &s); err != nil {
		return fmt.Errorf("/dev/shm, where a guest's memory is: %w", err)
	}
	if free := int64(s.Bavail) * s.Bsize; free < memory {
		return fmt.Errorf("/dev/shm has %d MiB free, the guest's memory is %d MiB: mount a larger one, or let less run at a time", free>>20, memory>>20)
	}
	return nil
}

// build builds the programs and tests that a guest shall have, in the module that the working directory is in.
func (c Config) build(ctx context.Context, into string) error {
	for _, b := range []struct {
		command, packages []string
	}{
		{[]string{"build"}, c.Programs},
		{[]string{"test", "-c", "-vet=off"}, c.Tests},
	} {
		if len(b.packages) == 0 {
			continue
		}
		args := slices.Concat(b.command, []string{"-o", into + "/"}, b.packages)
		if out, err := exec.CommandContext(ctx, "go", args...).CombinedOutput(); err != nil {
			return fmt.Errorf("go %s: %w\n%s", strings.Join(args, " "), err, out)
		}
	}
	return nil
}

// run boots the guest and waits until it is off.
func (m *machine) run(ctx context.Context, cmd Command) (int, error) {
	s, err := m.spec(cmd)
	if err != nil {
		return 0, err
	}
	b, err := json.Marshal(s)
	if err != nil {
		return 0, err
	}
	if err := os.WriteFile(m.folder.share(specFile), b, 0o600); err != nil {
		return 0, err
	}
	if cmd.limit > 0 {
		var cancel context.CancelFunc
		// The guest itself gives up after the limit; this is for one that cannot any more.
		ctx, cancel = context.WithTimeoutCause(ctx, cmd.limit+20*time.Second, errors.New("the guest hangs"))
		defer cancel()
	}
	// The death signal comes when the thread that forked ends: this one stays until the guest is off.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	boot, stop, err := m.boot(ctx)
	if err != nil {
		return 0, err
	}
	console := &tail{max: 64 << 10}
	boot.Stdout = console
	if os.Getenv(envConsole) != "" {
		boot.Stdout = io.MultiWriter(console, os.Stderr)
	}
	boot.Stderr = boot.Stdout
	var streams sync.WaitGroup
	var ours []*os.File
	for _, to := range []io.Writer{cmd.Stdout, cmd.Stderr} {
		r, w, err := os.Pipe()
		if err != nil {
			return 0, err
		}
		if to == nil {
			to = io.Discard
		}
		boot.ExtraFiles, ours = append(boot.ExtraFiles, w), append(ours, w)
		streams.Go(func() {
			defer r.Close()
			if _, err := io.Copy(to, r); err != nil { // nobody listens any more: the guest must not wait for them
				io.Copy(io.Discard, r)
			}
		})
	}
	err = boot.Start()
	for _, w := range ours {
		w.Close()
	}
	if err == nil {
		err = boot.Wait()
	}
	streams.Wait()
	err = errors.Join(err, stop())
	if cause := context.Cause(ctx); cause != nil {
		err = cause
	}
	return m.status(err, console)
}

// status is what the guest left as the last thing it did. Where it did, nothing else matters.
func (m *machine) status(ended error, console *tail) (int, error) {
	b, err := os.ReadFile(m.folder.share(statusFile))
	if err != nil {
		return 0, fmt.Errorf("the guest gave no exit code (%v); the last its kernel said:\n%s", ended, console)
	}
	var s status
	if err := json.Unmarshal(b, &s); err != nil {
		return 0, fmt.Errorf("the guest's status %q: %w", b, err)
	}
	if s.Error != "" {
		return 0, fmt.Errorf("in the guest: %s; the last its kernel said:\n%s", s.Error, console)
	}
	return s.Code, nil
}

// isolated makes a process the first of a PID namespace, killed when the thread that starts it ends, and with it all of
// the namespace. In a process group of its own: User-Mode Linux that panics sends SIGTERM to its whole group.
func isolated() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Cloneflags: syscall.CLONE_NEWPID, Pdeathsig: syscall.SIGKILL}
}

// tail keeps the last bytes written to it. One writer at a time.
type tail struct {
	max int
	buf bytes.Buffer
}

func (t *tail) Write(p []byte) (int, error) {
	t.buf.Write(p)
	if over := t.buf.Len() - t.max; over > 0 {
		t.buf.Next(over)
	}
	return len(p), nil
}

func (t *tail) String() string { return strings.ReplaceAll(t.buf.String(), "\r\n", "\n") }
