package freezer

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

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
	if locked < resident/2 {
		t.Errorf("%s: %d KiB locked of %d resident", name, locked, resident)
	}
	if resident > 64<<10 {
		t.Errorf("%s: %d KiB resident", name, resident)
	}
}
