package thin

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

// pair is what goes wrong in these tests: a btrfs, which we freeze on every kernel, and an ext4, which device-mapper
// freezes on some.
func (s *site) pair(t *testing.T) (ours, other leg) {
	t.Helper()
	return s.volume(t, "ours", "btrfs"), s.volume(t, "other", "ext4")
}

// meddler is an adapter with something that happens before a snapshot is taken, while all is frozen that will be.
type meddler struct {
	adapters.Adapter
	during func(ctx context.Context, id adapters.VolumeID) error
}

func (m meddler) CreateSnapshot(ctx context.Context, id adapters.VolumeID, wanted string) (adapters.Snapshot, error) {
	if err := m.during(ctx, id); err != nil {
		return adapters.Snapshot{}, err
	}
	return m.Adapter.CreateSnapshot(ctx, id, wanted)
}

// failing makes a cut that must fail in a certain way, and leave nothing behind. Its deadline is short where that is how
// it fails.
func (s *site) failing(t *testing.T, kind fault.Kind, says string, a adapters.Adapter, legs ...leg) {
	t.Helper()
	for i := range legs {
		legs[i].adapter = a
	}
	r := request("failing", legs...)
	if kind == fault.Unavailable {
		r.MaxFreeze = 3 * time.Second
	}
	_, err := s.make(t, r)
	if fault.KindOf(err) != kind || !strings.Contains(fmt.Sprint(err), says) {
		t.Errorf("error %q (%v), want %v and %q", err, fault.KindOf(err), kind, says)
	}
	if left := snapshots(t, legs...); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	thawed(t, legs...)
}

// only meddles with one leg.
func only(l leg, f func() error) func(context.Context, adapters.VolumeID) error {
	return func(_ context.Context, id adapters.VolumeID) error {
		if id != l.id {
			return nil
		}
		return f()
	}
}

func TestAStrangerThawsEarly(t *testing.T) {
	s := newSite(t)
	ours, other := s.pair(t)
	s.failing(t, fault.Void, "lost", meddler{s.thin, only(ours, func() error { return ioctl(ours.Mount, fithaw) })}, ours, other)
}

func TestAStrangerThawsWritesAndFreezesAgain(t *testing.T) {
	s := newSite(t)
	ours, other := s.pair(t)
	s.failing(t, fault.Void, "wrote below a frozen filesystem", meddler{s.thin, only(ours, func() error {
		if err := ioctl(ours.Mount, fithaw); err != nil {
			return err
		}
		f, err := os.Create(filepath.Join(ours.Mount, "intruder"))
		if err != nil {
			return err
		}
		if err := errors.Join(f.Sync(), f.Close()); err != nil {
			return err
		}
		return ioctl(ours.Mount, fifreeze)
	})}, ours, other)
}

func TestABackendThatFails(t *testing.T) {
	s := newSite(t)
	ours, other := s.pair(t)
	s.failing(t, fault.Exhausted, "no space", meddler{s.thin, only(other, func() error {
		return fault.Errorf(fault.Exhausted, "no space for a snapshot")
	})}, ours, other)
}

// Unmounted lazily while frozen: it is thawed by descriptor, and can be mounted again at once.
func TestUnmountedWhileFrozen(t *testing.T) {
	s := newSite(t)
	ours, other := s.pair(t)
	r := request("unmounted", ours, other)
	for i := range r.Volumes {
		r.Volumes[i].Adapter = meddler{s.thin, only(ours, func() error { return unix.Unmount(ours.Mount, unix.MNT_DETACH) })}
	}
	if _, err := s.make(t, r); !errors.Is(err, fault.Void) {
		t.Errorf("error %v, want Void", err)
	}
	must(t, ours.Up())
	thawed(t, ours, other)
	if left := snapshots(t, ours, other); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// What somebody else froze is not ours to thaw, whether we would have frozen it or device-mapper.
func TestFrozenBySomebodyElse(t *testing.T) {
	s := newSite(t)
	ours, other := s.pair(t)
	for _, frozen := range []leg{ours, other} {
		freeze(t, frozen.Mount)
		if _, err := s.make(t, request("frozen", ours, other)); !errors.Is(err, fault.Busy) {
			t.Errorf("%s is frozen: error %v, want Busy", frozen.Mount, err)
		}
		if err := ioctl(frozen.Mount, fithaw); err != nil {
			t.Errorf("%s: the stranger's freeze is gone: %v", frozen.Mount, err)
		}
		if left := snapshots(t, ours, other); len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
		thawed(t, ours, other)
	}
}

// lvcreate stands still before it did anything. The thaw does not wait for it, and what it makes too late is deleted.
func TestLvcreateStopped(t *testing.T) {
	s := newSite(t)
	ours, other := s.pair(t)
	ours.id, other.id = plainID(ours.Thin), plainID(other.Thin)
	pidFile := filepath.Join(s.Dir, "pid")
	stopping := plain{freeze: s.mode(), lvm: func(args ...string) *exec.Cmd {
		if args[0] != "lvcreate" {
			return exec.Command(args[0], args[1:]...)
		}
		return exec.Command("sh", append([]string{"-c", `echo $$ >>"$0"; [ $(wc -l <"$0") -gt 2 ] || kill -STOP $$; exec "$@"`, pidFile}, args...)...)
	}}
	var resumed sync.WaitGroup
	resumed.Go(func() {
		await(t, "two stopped commands", func() bool { return len(pids(pidFile)) == 2 })
		if s.nests { // else one is not frozen by us, nor by device-mapper yet
			if err := ioctl(other.Mount, fifreeze); !errors.Is(err, unix.EBUSY) {
				t.Errorf("%s is not frozen: the test proves nothing", other.Mount)
			}
		}
		begin := time.Now()
		thawed(t, ours, other)
		t.Logf("writable after %v of a deadline of 3 s, lvcreate still stopped", time.Since(begin).Round(time.Millisecond))
		for _, pid := range pids(pidFile) {
			if err := unix.Kill(pid, unix.SIGCONT); err != nil {
				t.Error(err)
			}
		}
	})
	s.failing(t, fault.Unavailable, "deadline", stopping, ours, other)
	resumed.Wait()
}

func pids(file string) (all []int) {
	b, _ := os.ReadFile(file) // not there yet
	for f := range strings.FieldsSeq(string(b)) {
		if pid, err := strconv.Atoi(f); err == nil {
			all = append(all, pid)
		}
	}
	return all
}

func await(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Errorf("waited 20 s for %s", what)
			return
		}
	}
}

// A backend hangs while it has a volume suspended, as an lvcreate would that stands still in the middle. What it has not
// suspended is thawed by the deadline; what it has, as soon as it lets go: until then device-mapper keeps it frozen, or
// has the thaw of a btrfs wait.
func TestABackendThatHangsWithAVolumeSuspended(t *testing.T) {
	s := newSite(t)
	ours, other := s.pair(t)
	for _, legs := range [][]leg{{ours, other}, {other, ours}} {
		hanging, free := legs[0], legs[1]
		dmsetup := func(verb string) error {
			_, err := run(exec.Command("dmsetup", verb, hanging.Device))
			return err
		}
		var once sync.Once
		suspended, resumed := make(chan struct{}), make(chan struct{})
		var watch sync.WaitGroup
		watch.Go(func() {
			defer close(resumed)
			<-suspended
			thawed(t, free)
			if err := dmsetup("resume"); err != nil {
				t.Error(err)
			}
		})
		s.failing(t, fault.Unavailable, "deadline", meddler{s.thin, func(ctx context.Context, id adapters.VolumeID) error {
			if id == hanging.id {
				once.Do(func() {
					if err := dmsetup("suspend"); err != nil {
						t.Error(err)
					}
					close(suspended)
				})
				<-resumed // whatever ctx says
			}
			<-ctx.Done()
			return ctx.Err()
		}}, ours, other)
		watch.Wait()
		for _, l := range legs { // the kernel's count of freezes is right: a device with one left cannot be mounted
			must(t, l.Down())
			must(t, l.Up())
		}
	}
}
