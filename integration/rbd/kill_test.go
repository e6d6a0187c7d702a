//go:build ceph && cgo

package rbd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/adapters/ceph"
	"stillpoint.io/stillpoint/agent/cut"
)

// The environment of a process that makes a cut of an image, or a backup of a snapshot, and kills itself at the n-th step.
const (
	envVictim = "STILLPOINT_TEST_VICTIM" // n; 0: at none
	envImage  = "STILLPOINT_TEST_IMAGE"  // to cut
	envStop   = "STILLPOINT_TEST_STOP"   // stop before the snapshot, instead of killing itself
	envBackup = "STILLPOINT_TEST_BACKUP" // or the handle of a snapshot to back up
	envConf   = "STILLPOINT_TEST_CONF"   // of the cluster
	envDir    = "STILLPOINT_TEST_DIR"    // the lab's
	envImages = "STILLPOINT_TEST_IMAGES" // rbd-fuse's folder
	envFreeze = "STILLPOINT_TEST_FREEZE" // the freezer
	envS3     = "STILLPOINT_TEST_S3"     // the bucket's place, in JSON
)

// suicidal is an adapter that kills the process before or after its n-th call.
type suicidal struct {
	adapters.Adapter
	left *atomic.Int32
}

func die() {
	unix.Kill(os.Getpid(), unix.SIGKILL)
	select {}
}

func (s suicidal) step() {
	if s.left.Add(-1) == 0 {
		die()
	}
}

func (s suicidal) CreateSnapshot(ctx context.Context, id adapters.VolumeID, wanted string) (adapters.Snapshot, error) {
	s.step()
	defer s.step()
	return s.Adapter.CreateSnapshot(ctx, id, wanted)
}

func (s suicidal) Publish(ctx context.Context, id adapters.SnapshotID, notes adapters.Notes) error {
	s.step()
	defer s.step()
	return s.Adapter.Publish(ctx, id, notes)
}

const (
	saysFrozen  = "frozen\n"
	saysCalling = "calling\n"

	victimFreeze = 20 * time.Second // longer than it takes anywhere to notice that a process is dead
)

// stopping is an adapter that tells what it does, and waits for a word, before it makes a snapshot.
type stopping struct{ adapters.Adapter }

func (s stopping) CreateSnapshot(ctx context.Context, id adapters.VolumeID, wanted string) (adapters.Snapshot, error) {
	fmt.Print(saysFrozen)
	if _, err := os.Stdin.Read(make([]byte, 1)); err != nil {
		return adapters.Snapshot{}, err
	}
	fmt.Print(saysCalling)
	return s.Adapter.CreateSnapshot(ctx, id, wanted)
}

func victim() (err error) {
	ctx := context.Background()
	n, err := strconv.Atoi(os.Getenv(envVictim))
	if err != nil {
		return err
	}
	a, err := ceph.RBD().Open(ctx, adapters.Config{Name: "ceph-rbd", Parameters: rbdParameters(os.Getenv(envConf), os.Getenv(envImages), "")})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, a.Close()) }()
	if handle, ok := os.LookupEnv(envBackup); ok {
		return backUpAndDie(ctx, a, handle)
	}
	var left atomic.Int32
	left.Store(int32(n))
	var dying adapters.Adapter = suicidal{a, &left}
	if os.Getenv(envStop) != "" {
		dying = stopping{a}
	}
	r := cut.Request{Name: "victim", MaxFreeze: victimFreeze, Volumes: []cut.Volume{{ID: rbdID(os.Getenv(envImage)), Adapter: dying}}}
	_, err = cut.Make(ctx, r, nodeIn(os.Getenv(envDir), os.Getenv(envFreeze)))
	return err
}

// victim is such a process, not yet started.
func (s *site) victim(t *testing.T, n int, env ...string) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	must(t, err)
	c := exec.CommandContext(t.Context(), self)
	c.Env = append(append(os.Environ(), envVictim+"="+strconv.Itoa(n), envConf+"="+cluster.Conf, envDir+"="+s.Dir, envImages+"="+images.Folder, envFreeze+"="+freeze), env...)
	return c
}

// Killed at every step and retried, a cut leaves nothing frozen, hands out nothing that was not verified, and the retry
// succeeds.
func TestKilledAtEveryStep(t *testing.T) {
	s := newSite(t)
	l := s.image(t, "xfs")
	for n := 1; ; n++ {
		c := s.victim(t, n, envImage+"="+l.name())
		out, err := c.CombinedOutput()
		killed := c.ProcessState.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL
		if !killed && err != nil {
			t.Fatalf("step %d: %v\n%s", n, err, out)
		}
		l.thawed(t)
		verified := slices.ContainsFunc(snapshots(t, l), func(x adapters.Snapshot) bool { return x.Mark == adapters.Verified })
		if !killed {
			if !verified {
				t.Error("a cut that succeeded verified nothing")
			}
			t.Logf("a cut has %d steps to die at", n-1)
			return
		}
		s.again(t, l, verified, fmt.Sprintf("step %d", n))
	}
}

// again makes the victim's cut once more. It adopts the dead one's if that was verified.
func (s *site) again(t *testing.T, l leg, adopted bool, what string) {
	t.Helper()
	res, err := cut.Make(t.Context(), request("victim", l), s.node)
	if err != nil || res.Adopted != adopted {
		t.Fatalf("%s: the retry: %+v, %v; was verified: %v", what, res, err, adopted)
	}
	all := snapshots(t, l)
	if len(all) != 1 || all[0].Mark != adapters.Verified {
		t.Errorf("%s: after the retry there is %+v", what, all)
	}
	for _, snap := range all {
		must(t, s.rbd.DeleteSnapshot(t.Context(), snap.ID))
	}
}

// Killed in the middle of the snapshot, which hangs in Ceph's library: the filesystem is thawed at once, and the next cut
// succeeds when Ceph answers again.
func TestKilledInTheSnapshot(t *testing.T) {
	s := newSite(t)
	l := s.image(t, "xfs")
	c := s.victim(t, 0, envImage+"="+l.name(), envStop+"=1")
	release, err := c.StdinPipe()
	must(t, err)
	defer release.Close()
	says, err := c.StdoutPipe()
	must(t, err)
	must(t, c.Start())
	next := func(want string) {
		t.Helper()
		got := make([]byte, len(want))
		if _, err := io.ReadFull(says, got); err != nil || string(got) != want {
			t.Fatalf("the victim says %q, %v, not %q", got, err, want)
		}
	}
	next(saysFrozen)
	resume := stopOSD(t)
	_, err = release.Write([]byte("\n"))
	must(t, err)
	next(saysCalling)
	time.Sleep(100 * time.Millisecond) // to be in the middle of it, not to wait for something
	must(t, c.Process.Kill())
	if err := c.Wait(); err == nil || c.ProcessState.Exited() {
		t.Fatalf("it was not killed: %v", err)
	}
	at := time.Now()
	eventually(t, "the victim's freezer to end", func() bool { return !freezerRuns(t) })
	if took := time.Since(at); took > victimFreeze/2 {
		t.Errorf("the freezer ended %v after the kill, as if only the deadline had ended it", took)
	}
	// A writer would have to wait for the OSD.
	if err := fithaw(l.Mount); !errors.Is(err, unix.EINVAL) {
		t.Errorf("it was frozen still: thawing it by hand: %v", err)
	}
	resume()
	l.thawed(t)
	s.again(t, l, false, "killed in the snapshot")
	for name := range strings.Lines(run(t, "rbd", "snap", "list", l.id.ID)) {
		if !strings.HasPrefix(name, "SNAPID") && !strings.Contains(name, " .stillpoint.") { // a draft goes when it is old
			t.Errorf("left behind: %s", name)
		}
	}
}

// freezerRuns tells whether a freezer of these tests does.
func freezerRuns(t *testing.T) bool {
	t.Helper()
	all, err := filepath.Glob("/proc/[0-9]*/exe")
	must(t, err)
	return slices.ContainsFunc(all, func(path string) bool {
		at, _ := os.Readlink(path) // a process may be gone
		return at == freeze
	})
}

// fithaw thaws a filesystem: EINVAL if it is not frozen (ioctl_fsfreeze(2)).
func fithaw(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	const fithaw = 0xC0045878 // linux/fs.h
	return unix.IoctlSetInt(int(f.Fd()), fithaw, 0)
}
