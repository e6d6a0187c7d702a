package freezer

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/integration/lab"
	"stillpoint.io/stillpoint/integration/vm"
)

// long is how long a test waits for what should happen soon. It says nothing about the promise, which is measured and
// logged; it is short of MaxFreeze, so that a deadline cannot be what made a test pass.
const long = 20 * time.Second

// raceFlags are set under the race detector: the program is tested with it, too.
var raceFlags []string

// builtIn is the folder that program made.
var builtIn string

// envThinPool names a thin pool in which to make the filesystems, instead of in files: package integration/thin runs
// these tests so.
const envThinPool = "STILLPOINT_TEST_THIN_POOL"

// program builds the real program once a run, where it was not built beforehand.
var program = sync.OnceValues(func() (string, error) {
	if vm.Inside() {
		return vm.Program("stillpoint-freezer"), nil
	}
	dir, err := os.MkdirTemp("", "stillpoint-freezer-")
	if err != nil {
		return "", err
	}
	builtIn = dir
	path := filepath.Join(dir, "stillpoint-freezer")
	args := append(append([]string{"build"}, raceFlags...), "-o", path, "stillpoint.io/stillpoint/cmd/stillpoint-freezer")
	cmd := exec.Command("go", args...)
	if raceFlags == nil { // as it is released
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w: %s", err, out)
	}
	return path, nil
})

func TestMain(m *testing.M) {
	if os.Getenv(clientSocket) != "" {
		clientProcess()
	}
	code := m.Run()
	if builtIn != "" {
		os.RemoveAll(builtIn)
	}
	os.Exit(code)
}

// rig is a running freezer with a lab of its own.
type rig struct {
	t       testing.TB
	lab     *lab.Lab
	program string
	records string
	socket  string
	cmd     *exec.Cmd
	exited  chan struct{}
	err     error // of Wait
	said    capped
	stderr  *os.File // instead of said
}

func newRig(t testing.TB) *rig {
	t.Helper()
	l := lab.Test(t)
	built, err := program()
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{t: t, lab: l, program: built, records: filepath.Join(l.Dir, "records"), socket: filepath.Join(l.Dir, "run", "socket")}
	r.start()
	return r
}

// start starts the freezer, and returns when it serves.
func (r *rig) start() {
	r.t.Helper()
	cmd := exec.Command(r.program, "serve", "--socket", r.socket, "--records", r.records)
	cmd.Env = append(os.Environ(), "GORACE=halt_on_error=1") // so that a race in the program fails the test
	if cmd.Stderr = &r.said; r.stderr != nil {
		cmd.Stderr = r.stderr
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL} // with a killed test goes its freezer; the guard thaws
	exited := make(chan struct{})
	if err := cmd.Start(); err != nil {
		r.t.Fatal(err)
	}
	go func() {
		r.err = cmd.Wait()
		close(exited)
	}()
	r.cmd, r.exited = cmd, exited
	r.t.Cleanup(func() {
		cmd.Process.Signal(unix.SIGCONT)
		cmd.Process.Signal(unix.SIGTERM)
		select {
		case <-exited:
		case <-time.After(long):
			r.t.Errorf("the freezer has not exited: %s", r.said.String())
			cmd.Process.Kill()
		}
	})
	r.wait("the freezer to serve", func() bool {
		select {
		case <-exited:
			r.t.Fatalf("the freezer did not start: %s", r.said.String())
		default:
		}
		c, err := Connect(r.t.Context(), r.socket)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
}

// wait polls for a condition and returns how long it took.
func (r *rig) wait(what string, ok func() bool) time.Duration {
	r.t.Helper()
	start := time.Now()
	for !ok() {
		if time.Since(start) > long {
			r.t.Fatalf("waited %v for %s; the freezer said: %s", long, what, r.said.String())
		}
		time.Sleep(5 * time.Millisecond)
	}
	return time.Since(start)
}

func (r *rig) holder() int { return r.cmd.Process.Pid }

// guard is the pid of the second process.
func (r *rig) guard() int {
	r.t.Helper()
	files, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", r.holder()))
	for _, f := range files {
		b, _ := os.ReadFile(f)
		for _, s := range strings.Fields(string(b)) {
			pid, _ := strconv.Atoi(s)
			return pid
		}
	}
	r.t.Fatal("no guard")
	return 0
}

func (r *rig) signal(pid int, s unix.Signal) {
	r.t.Helper()
	if err := unix.Kill(pid, s); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) connect() *Client {
	r.t.Helper()
	c, err := Connect(r.t.Context(), r.socket)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { c.Close() })
	return c
}

// volume makes a small mounted filesystem, whose device is its own.
func (r *rig) volume(name, fstype string) *lab.Filesystem {
	r.t.Helper()
	size := int64(32 << 20)
	switch fstype {
	case "xfs":
		size = 320 << 20
	case "btrfs":
		size = 128 << 20
	}
	make := r.lab.Pool
	if pool := os.Getenv(envThinPool); pool != "" {
		make = lab.ThinPool(pool).In(r.lab)
	}
	fs, err := make(r.t.Context(), name, fstype, size)
	if err != nil {
		r.t.Fatal(err)
	}
	return fs
}

// stack makes an XFS pool and an ext4 in a file of it.
func (r *rig) stack() (pool, upper *lab.Filesystem) {
	r.t.Helper()
	pool = r.volume("pool", "xfs")
	upper, err := r.lab.Volume(r.t.Context(), pool.Mount, "upper", "ext4", 32<<20)
	if err != nil {
		r.t.Fatal(err)
	}
	return pool, upper
}

// target describes a mounted filesystem as a plan would.
func target(t testing.TB, at string) Filesystem {
	t.Helper()
	mounts, err := readMounts("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	passed := route(mounts, at)
	m := passed[len(passed)-1]
	if m.Point != at {
		t.Fatalf("nothing is mounted at %s", at)
	}
	return Filesystem{Mount: at, Device: m.Device, Type: m.Type}
}

func (r *rig) request(max time.Duration, fs ...*lab.Filesystem) Request {
	r.t.Helper()
	q := Request{MaxFreeze: max}
	for _, f := range fs {
		q.Filesystems = append(q.Filesystems, target(r.t, f.Mount))
	}
	return q
}

func (r *rig) freeze(c *Client, q Request) *Lease {
	r.t.Helper()
	l, err := c.Freeze(r.t.Context(), q)
	if err != nil {
		r.t.Fatalf("%v; the freezer said: %s", err, r.said.String())
	}
	return l
}

// stranger freezes and thaws as somebody else would. The descriptor is opened beforehand.
type stranger struct {
	t  testing.TB
	fd int
}

func (r *rig) stranger(fs *lab.Filesystem) *stranger {
	r.t.Helper()
	fd, err := unix.Open(fs.Mount, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		r.t.Fatal(err)
	}
	s := &stranger{r.t, fd}
	r.t.Cleanup(func() {
		ioctl(fd, fithaw)
		unix.Close(fd)
	})
	return s
}

func (s *stranger) freeze() {
	s.t.Helper()
	if err := ioctl(s.fd, fifreeze); err != nil {
		s.t.Fatal(err)
	}
}

func (s *stranger) thaw() {
	s.t.Helper()
	if err := ioctl(s.fd, fithaw); err != nil {
		s.t.Fatal(err)
	}
}

// close lets go of the filesystem, so that it can be unmounted.
func (s *stranger) close() {
	unix.Close(s.fd)
	s.fd = -1
}

// frozen asks the only way there is: by trying to freeze.
func (s *stranger) frozen() bool {
	s.t.Helper()
	switch err := ioctl(s.fd, fifreeze); err {
	case nil:
		s.thaw()
		return false
	case unix.EBUSY:
		return true
	default:
		s.t.Fatal(err)
		return false
	}
}

// writer writes to a filesystem at once; the channel gives the time when that was done.
func writer(t *testing.T, fs *lab.Filesystem) <-chan time.Time {
	t.Helper()
	done := make(chan time.Time, 1)
	go func() {
		err := os.WriteFile(filepath.Join(fs.Mount, "written"), []byte("x"), 0o600)
		if err == nil {
			done <- time.Now()
		}
	}()
	return done
}

// dirty leaves data that a freeze must write out.
func dirty(t *testing.T, fs *lab.Filesystem) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(fs.Mount, "dirty"), make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
}

// thawedAfter waits for a writer that was blocked, and logs how long after an event it could write.
func (r *rig) thawedAfter(since time.Time, what string, done <-chan time.Time) {
	r.t.Helper()
	select {
	case at := <-done:
		r.t.Logf("writable %v after %s", at.Sub(since).Round(100*time.Microsecond), what)
	case <-time.After(long):
		r.t.Fatalf("not writable %v after %s; the freezer said: %s", long, what, r.said.String())
	}
}

// blocked asserts that a writer is held.
func blocked(t *testing.T, done <-chan time.Time) {
	t.Helper()
	select {
	case <-done:
		t.Fatal("a writer got through")
	case <-time.After(50 * time.Millisecond):
	}
}

// lost waits until a lease is known to be lost.
func (r *rig) lost(l *Lease) error {
	r.t.Helper()
	select {
	case <-l.Lost():
		return l.Err()
	case <-time.After(long):
		r.t.Fatal("the lease was not lost")
		return nil
	}
}

// void thaws and asserts that nothing was held.
func (r *rig) void(l *Lease) Report {
	r.t.Helper()
	rep, err := l.Thaw(r.t.Context())
	if err != nil {
		r.t.Fatal(err)
	}
	if rep.Held() {
		r.t.Fatalf("a lost lease reports that it held: %+v", rep)
	}
	return rep
}

func wantReason(t *testing.T, err error, want Reason) *Error {
	t.Helper()
	e, ok := errors.AsType[*Error](err)
	if !ok || e.Reason != want {
		t.Fatalf("got %v, want an error of kind %q", err, want)
	}
	return e
}

// ledgers lists the records of a folder.
func (r *rig) ledgers() []string {
	names, _ := filepath.Glob(filepath.Join(r.records, "*"+ledgerExt))
	return names
}

// inside waits until a thread of a process is held in FIFREEZE.
func (r *rig) inside(f Filesystem) {
	r.t.Helper()
	r.wait("a thread inside FIFREEZE", func() bool {
		return slices.ContainsFunc(r.ledgers(), func(path string) bool {
			b, err := os.ReadFile(path)
			if err != nil || len(b) != ledgerSize {
				return false
			}
			l := &ledger{data: b}
			for i := range MaxFilesystems {
				e := l.entry(i)
				if e.state() == freezing && e.Device == uint64(f.Device) && e.Thread.Load() != 0 {
					s, _, _ := readStat(fmt.Sprintf("/proc/%d/task/%d/stat", l.header().Holder.PID.Load(), e.Thread.Load()))
					return s == 'D'
				}
			}
			return false
		})
	})
}

// behind runs a freeze that will hang, and gives its outcome.
func behind(ctx context.Context, c *Client, q Request) <-chan error {
	out := make(chan error, 1)
	go func() {
		_, err := c.Freeze(ctx, q)
		out <- err
	}()
	return out
}

func contextWithCancel(t *testing.T) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(cancel)
	return ctx, cancel
}

func (r *rig) startWithStderr(f *os.File) {
	r.t.Helper()
	r.stderr = f
	r.start()
}

// rested ends the rest of every superblock.
func (r *rig) rested() {
	r.t.Helper()
	notes, _ := filepath.Glob(filepath.Join(r.records, restPrefix+"*"))
	for _, n := range notes {
		os.Remove(n)
	}
}

// command runs the program to its end.
func (r *rig) command(args ...string) ([]byte, error) {
	return exec.Command(r.program, args...).CombinedOutput()
}

// killBoth kills both processes such that neither has time to thaw: each is stopped first.
func (r *rig) killBoth() {
	r.t.Helper()
	guard := r.guard()
	for _, pid := range []int{guard, r.holder()} {
		r.signal(pid, unix.SIGSTOP)
	}
	for _, pid := range []int{guard, r.holder()} {
		r.signal(pid, unix.SIGKILL)
	}
	<-r.exited
	r.wait("the guard to be gone", func() bool {
		s, _, err := processState(guard)
		return err != nil || s == 'Z'
	})
}

func spawn(t *testing.T, r *rig) *Client {
	t.Helper()
	c, err := Spawn(t.Context(), SpawnOptions{Program: r.program, Records: r.records})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// mountDeadFUSE mounts a FUSE filesystem whose server never answers; the function returned ends it.
func mountDeadFUSE(t *testing.T, at string) func() {
	t.Helper()
	if err := os.Mkdir(at, 0o700); err != nil {
		t.Fatal(err)
	}
	dev, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("dead", at, "fuse", 0, fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", dev)); err != nil {
		t.Fatal(err)
	}
	return func() {
		unix.Close(dev) // aborts whatever waits for an answer
		unix.Unmount(at, unix.MNT_DETACH)
	}
}

// diskUse is what a process has read from and written to disks so far, page faults included.
func diskUse(t *testing.T, pid int) string {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/io", pid))
	stat, err2 := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil || err2 != nil {
		t.Fatal(err, err2)
	}
	_, bytes, _ := strings.Cut(string(b), "read_bytes")
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')'):]))
	return "read_bytes" + bytes + "major faults: " + fields[10]
}

// deviceFree tells whether no superblock holds a block device.
func deviceFree(device string) bool {
	fd, err := unix.Open(device, unix.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC, 0)
	if err == nil {
		unix.Close(fd)
	}
	return err == nil || err == unix.ENXIO
}

func checkHardened(t *testing.T, name string, pid int, weak bool) {
	t.Helper()
	proc := fmt.Sprintf("/proc/%d/", pid)
	want := "-1000"
	if weak {
		want = "0"
	}
	if b, _ := os.ReadFile(proc + "oom_score_adj"); strings.TrimSpace(string(b)) != want {
		t.Errorf("%s: oom_score_adj %s, want %s", name, b, want)
	}
	ours, _ := os.Readlink("/proc/self/ns/net")
	tasks, _ := filepath.Glob(proc + "task/*")
	for _, task := range tasks {
		if theirs, _ := os.Readlink(task + "/ns/net"); theirs == ours {
			t.Errorf("%s: a thread is in our network", name)
		}
	}
	b, err := os.ReadFile(proc + "status")
	if err != nil {
		t.Fatal(err)
	}
	var locked, resident int
	for line := range strings.Lines(string(b)) {
		fmt.Sscanf(line, "VmLck: %d kB", &locked)
		fmt.Sscanf(line, "VmRSS: %d kB", &resident)
	}
	t.Logf("%s: %d threads, %d KiB resident", name, len(tasks), resident)
	if locked < resident {
		t.Errorf("%s: %d KiB locked of %d resident", name, locked, resident)
	}
	if resident > 24<<10 && raceFlags == nil {
		t.Errorf("%s: %d KiB resident", name, resident)
	}
}
