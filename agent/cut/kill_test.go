package cut

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/adapters/reflink"
)

// The environment of a process that makes a cut and kills itself at the n-th step.
const (
	envVictim  = "STILLPOINT_TEST_VICTIM" // n
	envVolumes = "STILLPOINT_TEST_VOLUMES"
	envDir     = "STILLPOINT_TEST_DIR"
	envProgram = "STILLPOINT_TEST_PROGRAM"
)

// suicidal is the real adapter, killing the process before or after its n-th call.
type suicidal struct {
	adapters.Adapter
	left *atomic.Int32
}

func (s suicidal) step() {
	if s.left.Add(-1) == 0 {
		syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {}
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

func (s suicidal) Volume(ctx context.Context, id adapters.VolumeID) (adapters.Volume, error) {
	s.step()
	return s.Adapter.Volume(ctx, id)
}

func (s suicidal) Snapshot(ctx context.Context, id adapters.SnapshotID) (adapters.Snapshot, error) {
	s.step()
	return s.Adapter.Snapshot(ctx, id)
}

func victim() {
	n, _ := strconv.Atoi(os.Getenv(envVictim))
	var left atomic.Int32
	left.Store(int32(n))
	a, err := reflink.Kind().Open(context.Background(), adapters.Config{Name: "reflink"})
	if err != nil {
		panic(err)
	}
	r := Request{Name: "victim", MaxFreeze: 5 * time.Second}
	for _, v := range strings.Split(os.Getenv(envVolumes), "\n") {
		r.Volumes = append(r.Volumes, Volume{adapters.VolumeID{Backend: "reflink", ID: v}, suicidal{a, &left}})
	}
	if _, err := Make(context.Background(), r, nodeIn(os.Getenv(envDir), os.Getenv(envProgram))); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// Killed at every step and retried, a cut never hands out an unverified snapshot, leaves nothing frozen, and the retry
// succeeds.
func TestKilledAtEveryStep(t *testing.T) {
	s := newSite(t)
	var files []string
	for _, v := range s.volumes {
		files = append(files, v.File)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for n := 1; ; n++ {
		c := exec.Command(self)
		c.Env = append(os.Environ(), envVictim+"="+strconv.Itoa(n), envVolumes+"="+strings.Join(files, "\n"), envDir+"="+s.Dir, envProgram+"="+freezerProgram)
		out, err := c.CombinedOutput()
		killed := c.ProcessState.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL
		if !killed && err != nil {
			t.Fatalf("step %d: %v\n%s", n, err, out)
		}
		s.thawed(t, 20*time.Second)
		found := s.snapshots(t)
		verified := 0
		for _, snap := range found {
			if snap.Mark == adapters.Verified {
				verified++
				if snap.Notes.Cut != "victim" || snap.Notes.Instant == "" {
					t.Errorf("step %d: verified without proof: %+v", n, snap)
				}
			}
		}
		if verified > 0 && len(found) != len(s.volumes) {
			t.Errorf("step %d: %d of %d snapshots verified, though not all were taken", n, verified, len(found))
		}
		if !killed {
			if verified != len(s.volumes) {
				t.Errorf("a cut that succeeded verified %d snapshots", verified)
			}
			t.Logf("a cut has %d steps to die at", n-1)
			return
		}
		res, err := Make(t.Context(), s.request("victim", s.adapter), s.node)
		if err != nil {
			t.Fatalf("step %d: the retry: %v", n, err)
		}
		if verified > 0 != res.Adopted {
			t.Errorf("step %d: %d were verified, adopted: %v", n, verified, res.Adopted)
		}
		for _, snap := range s.snapshots(t) {
			if snap.Mark != adapters.Verified {
				t.Errorf("step %d: after the retry %s is %s", n, snap.ID, snap.Mark)
			}
			if err := s.adapter.DeleteSnapshot(t.Context(), snap.ID); err != nil {
				t.Fatal(err)
			}
		}
	}
}
