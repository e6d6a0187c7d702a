package thin

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
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/adapters/lvmthin"
	"stillpoint.io/stillpoint/agent/cut"
	"stillpoint.io/stillpoint/integration/lab"
)

// The environment of a process that makes a cut or a backup and kills itself at the n-th step.
const (
	envVictim  = "STILLPOINT_TEST_VICTIM"  // n
	envVolumes = "STILLPOINT_TEST_VOLUMES" // to cut
	envBackup  = "STILLPOINT_TEST_BACKUP"  // or a snapshot to back up
	envDir     = "STILLPOINT_TEST_DIR"
)

// suicidal is an adapter that kills the process before or after its n-th call.
type suicidal struct {
	adapters.Adapter
	left *atomic.Int32
}

func (s suicidal) step() {
	if s.left.Add(-1) == 0 {
		unix.Kill(os.Getpid(), unix.SIGKILL)
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

func victim() {
	if err := dieAt(os.Getenv(envVictim)); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func dieAt(step string) (err error) {
	n, err := strconv.Atoi(step)
	if err != nil {
		return err
	}
	a, err := lvmthin.Kind().Open(context.Background(), adapters.Config{Name: "lvm-thin"})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, a.Close()) }()
	if handle, ok := os.LookupEnv(envBackup); ok {
		return dying(a, handle, int32(n))
	}
	var left atomic.Int32
	left.Store(int32(n))
	r := cut.Request{Name: "victim", MaxFreeze: 20 * time.Second}
	for v := range strings.FieldsSeq(os.Getenv(envVolumes)) {
		r.Volumes = append(r.Volumes, cut.Volume{ID: thinID(lab.ThinVolume(v)), Adapter: suicidal{a, &left}})
	}
	_, err = cut.Make(context.Background(), r, nodeIn(os.Getenv(envDir)))
	return err
}

// Killed at every step and retried, a cut over thin volumes leaves nothing frozen, hands out nothing that was not
// verified, and the retry succeeds: also while commands of LVM's that the dead one left are still at work, whose snapshots
// are not taken for those of the retry.
func TestKilledAtEveryStep(t *testing.T) {
	s := newSite(t)
	ours, other := s.pair(t)
	self, err := os.Executable()
	must(t, err)
	for n := 1; ; n++ {
		c := exec.Command(self)
		c.Env = append(os.Environ(), envVictim+"="+strconv.Itoa(n), envVolumes+"="+string(ours.Thin)+" "+string(other.Thin),
			envDir+"="+s.Dir)
		out, err := c.CombinedOutput()
		killed := c.ProcessState.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL
		if !killed && err != nil {
			if starved(string(out)) {
				n--
				continue
			}
			t.Fatalf("step %d: %v\n%s", n, err, out)
		}
		thawed(t, ours, other)
		hasty := killed && n%2 == 0
		if !hasty {
			await(t, "the commands that it left behind", func() bool { return !underWay(t) })
		}
		found := snapshots(t, ours, other)
		verified := slices.DeleteFunc(slices.Clone(found), func(x adapters.Snapshot) bool { return x.Mark != adapters.Verified })
		if !hasty && len(verified) > 0 && len(found) != 2 {
			t.Errorf("step %d: verified %v of %v, though not all were taken", n, verified, found)
		}
		if !killed {
			if len(verified) != 2 {
				t.Errorf("a cut that succeeded verified %v", verified)
			}
			t.Logf("a cut has %d steps to die at", n-1)
			return
		}
		begin := time.Now()
		res, err := s.make(t, request("victim", ours, other))
		if err != nil {
			t.Fatalf("step %d: the retry: %v", n, err)
		}
		if !hasty && len(verified) > 0 != res.Adopted {
			t.Errorf("step %d: verified %v, adopted: %v", n, verified, res.Adopted)
		}
		for _, snap := range snapshots(t, ours, other) {
			if snap.Mark != adapters.Verified {
				t.Errorf("step %d: after the retry %s is %s", n, snap.ID, snap.Mark)
			}
			if !res.Adopted && snap.Created.Before(begin) {
				t.Errorf("step %d: the retry, begun at %v, took %s of %v for its own", n, begin, snap.ID, snap.Created)
			}
			must(t, s.thin.DeleteSnapshot(t.Context(), snap.ID))
		}
	}
}

// underWay tells whether a command of LVM runs: the adapter's are not killed with the process that started them.
func underWay(t *testing.T) bool {
	t.Helper()
	processes, err := filepath.Glob("/proc/[0-9]*/cmdline")
	must(t, err)
	return slices.ContainsFunc(processes, func(path string) bool {
		b, _ := os.ReadFile(path) // a process may be gone
		program, _, _ := strings.Cut(string(b), "\x00")
		return filepath.Base(program) == "lvm"
	})
}
