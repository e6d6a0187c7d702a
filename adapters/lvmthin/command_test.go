package lvmthin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

// records lists the records of programs under way, or of dead ones.
func records(t testing.TB, a *Adapter) []string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(a.state.folder, recordPrefix+"*"))
	must(t, err)
	return names
}

// volumeUUID is device-mapper's UUID of a volume.
func volumeUUID(t testing.TB, a *Adapter, v live) string {
	t.Helper()
	p, err := a.locate(t.Context(), v.ID())
	must(t, err)
	l, err := p.volume()
	must(t, err)
	return mapperUUID(p.group.id, l.id, "")
}

func suspended(t testing.TB, a *Adapter, uuid string) bool {
	t.Helper()
	d, err := a.mapper.find(uuid)
	must(t, err)
	return d != nil && d.suspended
}

// A program that does not end is neither killed nor waited for beyond the deadline; when it goes on, all is well.
func TestGuestStoppedProgram(t *testing.T) {
	guest(t)
	a, v := newAdapter(t), borrowLive(t, vgOne, 1<<20)
	id := canonicalID(t, a, v)
	_, err := a.Gate(t.Context(), []adapters.VolumeID{id})
	must(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()
	stopped := make(chan int, 1)
	go func() {
		for ; ctx.Err() == nil; time.Sleep(100 * time.Microsecond) {
			if pid := programOf(a, "lvcreate"); pid != 0 {
				syscall.Kill(pid, syscall.SIGSTOP)
				stopped <- pid
				return
			}
		}
		stopped <- 0
	}()
	start := time.Now()
	_, err = a.CreateSnapshot(ctx, id, "stopped")
	want(t, "a stopped lvcreate", err, fault.Unavailable)
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("not the deadline: %v", err)
	}
	if took := time.Since(start); took > 10*time.Second {
		t.Errorf("it took %v", took)
	}
	pid := <-stopped
	if pid == 0 {
		t.Fatal("no lvcreate was seen")
	}
	want(t, "closing meanwhile", a.lvm.close(50*time.Millisecond), fault.Busy)
	if err := syscall.Kill(pid, 0); err != nil {
		t.Errorf("the program is gone: %v", err)
	}
	other, cancelOther := context.WithTimeout(t.Context(), time.Second)
	defer cancelOther()
	_, err = a.CreateSnapshot(other, id, "behind")
	want(t, "another snapshot behind it", err, fault.Unavailable)

	must(t, syscall.Kill(pid, syscall.SIGCONT))
	must(t, a.lvm.close(time.Minute))
	waitUntil(t, "its record is gone", func() bool { return len(records(t, a)) == 0 })
	s, err := a.CreateSnapshot(t.Context(), id, "stopped")
	must(t, err)
	if s.Mark != adapters.Cutting {
		t.Errorf("%+v", s)
	}
	must(t, a.DeleteSnapshot(t.Context(), s.ID))
	if _, err := a.Snapshot(t.Context(), adapters.SnapshotID{Volume: id, Name: "behind"}); fault.KindOf(err) != fault.NotFound {
		t.Errorf("a snapshot whose call had ended before it was begun: %v", err)
	}
}

func canonicalID(t testing.TB, a *Adapter, v live) adapters.VolumeID {
	t.Helper()
	vol, err := a.Volume(t.Context(), v.ID())
	must(t, err)
	return vol.ID
}

// lvcreate is killed by somebody else between suspend and resume: the volume is resumed, by us if we live.
func TestGuestKilledProgram(t *testing.T) {
	guest(t)
	a, v := newAdapter(t), borrowLive(t, vgOne, 1<<20)
	id := canonicalID(t, a, v)
	uuid := volumeUUID(t, a, v)
	for n := range 20 {
		name := fmt.Sprintf("killed-%d", n)
		result := make(chan error, 1)
		done := make(chan struct{})
		go func() {
			_, err := a.CreateSnapshot(t.Context(), id, name)
			result <- err
			close(done)
		}()
		pid := 0
		waitUntil(t, "lvcreate runs", func() bool { pid = programOf(a, "lvcreate"); return pid != 0 || over(done)() })
		if !stopIn(t, a, pid, uuid, over(done)) {
			must(t, <-result)
			must(t, a.DeleteSnapshot(t.Context(), adapters.SnapshotID{Volume: id, Name: name}))
			continue
		}
		must(t, syscall.Kill(pid, syscall.SIGKILL))
		want(t, "a killed lvcreate", <-result, fault.Unavailable)
		if suspended(t, a, uuid) {
			t.Error("the volume is still suspended")
		}
		if afterKill(t, a, v, id, name) {
			return
		}
	}
	t.Error("no lvcreate could be stopped between suspend and resume, with its snapshot half-made")
}

func over(done <-chan struct{}) func() bool {
	return func() bool {
		select {
		case <-done:
			return true
		default:
			return false
		}
	}
}

// afterKill checks that the volume works, and that what was half-made can be deleted and made anew.
// It reports whether the snapshot was half-made.
func afterKill(t *testing.T, a *Adapter, v live, id adapters.VolumeID, name string) (jammed bool) {
	t.Helper()
	if left := records(t, a); len(left) > 0 {
		t.Errorf("records are left: %v", left)
	}
	if _, err := v.WriteAt([]byte("alive"), 0); err != nil {
		t.Error(err)
	}
	snapshot := adapters.SnapshotID{Volume: id, Name: name}
	jammed = jam(t, a, v, name)
	if s, err := a.Snapshot(t.Context(), snapshot); err == nil && s.Mark != adapters.Cutting {
		t.Errorf("what was half-made is %+v", s)
	}
	must(t, a.DeleteSnapshot(t.Context(), snapshot))
	s, err := a.CreateSnapshot(t.Context(), id, name)
	must(t, err)
	must(t, a.Publish(t.Context(), s.ID, adapters.Notes{Cut: name}))
	if got := readAll(t, a, s.ID); string(got[:5]) != "alive" {
		t.Errorf("the snapshot holds %q", got[:5])
	}
	must(t, a.DeleteSnapshot(t.Context(), s.ID))
	return jammed
}

// jam brings the pool into the state in which a program is killed after it had the pool make the snapshot's thin device
// and before it counted up the transaction, if it was killed before that: LVM's next change of the pool fails then. It
// reports false if the program was killed when it had done both.
func jam(t testing.TB, a *Adapter, v live, name string) bool {
	t.Helper()
	g := fullReport(t, a, v.group)
	half, origin := g.logical[snapshotVolume(v.name, name)], g.logical[v.name]
	status, err := a.mapper.poolStatus(poolNamed(t, a, v.group))
	must(t, err)
	if half == nil || halfMade(g, g.logical["pool"], status) != half {
		return false
	}
	err = a.mapper.message(poolNamed(t, a, v.group).uuid, fmt.Sprintf("create_snap %d %d", half.thin, origin.thin))
	if err != nil && !errors.Is(err, unix.EEXIST) {
		t.Fatal(err)
	}
	if out, err := exec.Command("lvcreate", "-y", "-s", "-n", "jammed", v.path()).CombinedOutput(); err == nil || !strings.Contains(string(out), stuck) {
		t.Errorf("the pool is not jammed, and the test shows nothing: %v: %s", err, out)
	}
	return true
}

// lvcreate and we are killed both: whoever opens the backend next resumes the volume, that one and no other.
func TestGuestKilledBoth(t *testing.T) {
	guest(t)
	a, v, other := newAdapter(t), borrowLive(t, vgOne, 1<<20), borrowLive(t, vgTwo, 1<<20)
	id := canonicalID(t, a, v)
	uuid := volumeUUID(t, a, v)
	for n := range 20 {
		name := fmt.Sprintf("both-%d", n)
		h := startHelper(t, "snapshot", v.path(), name)
		pid := h.pid(t)
		if !stopIn(t, a, pid, uuid, h.over) {
			<-h.done
			must(t, a.DeleteSnapshot(t.Context(), adapters.SnapshotID{Volume: id, Name: name}))
			continue
		}
		h.kill(t)
		if next := newAdapter(t); !suspended(t, next, uuid) {
			t.Error("resumed while lvcreate was still alive")
		}
		must(t, syscall.Kill(pid, syscall.SIGKILL))
		waitUntil(t, "lvcreate is gone", func() bool { return syscall.Kill(pid, 0) != nil })
		if !suspended(t, a, uuid) {
			t.Fatal("the killed lvcreate left nothing suspended: the test shows nothing")
		}
		run(t, "dmsetup", "suspend", other.device())
		next := newAdapter(t)
		must(t, next.sweepFailure())
		if suspended(t, next, uuid) {
			t.Error("the volume is still suspended")
		}
		if !suspended(t, next, volumeUUID(t, next, other)) {
			t.Error("a volume that somebody else suspended was resumed")
		}
		run(t, "dmsetup", "resume", other.device())
		if afterKill(t, next, v, id, name) {
			return
		}
	}
	t.Error("no lvcreate could be stopped between suspend and resume, with its snapshot half-made")
}

// A program outlives the process that started it, with its output, and its record lives as long as it.
func TestGuestOrphan(t *testing.T) {
	guest(t)
	a, v := newAdapter(t), borrowLive(t, vgOne, 1<<20)
	id := canonicalID(t, a, v)
	h := startHelper(t, "snapshot", v.path(), "orphan")
	pid := h.pid(t)
	must(t, syscall.Kill(pid, syscall.SIGSTOP))
	words, err := os.Open(fmt.Sprintf("/proc/%d/fd/2", pid))
	must(t, err)
	defer words.Close()
	h.kill(t)
	must(t, syscall.Kill(pid, syscall.SIGCONT))
	waitUntil(t, "lvcreate ends", func() bool { return syscall.Kill(pid, 0) != nil })
	s, err := a.Snapshot(t.Context(), adapters.SnapshotID{Volume: id, Name: "orphan"})
	if err != nil {
		b, _ := io.ReadAll(io.NewSectionReader(words, 0, 1<<20))
		t.Fatalf("%v: lvcreate said: %s", err, b)
	}
	must(t, a.Publish(t.Context(), s.ID, adapters.Notes{}))
	readAll(t, a, s.ID)
	must(t, a.DeleteSnapshot(t.Context(), s.ID))
	newAdapter(t)
	if left := records(t, a); len(left) > 0 {
		t.Errorf("records are left: %v", left)
	}
}

// A program of a process that is dead, or of a call that has ended, makes its snapshot late: Gate waits for it, so that
// who looks for leftovers afterwards finds it, and nobody takes it for a later call's.
func TestGuestGateWaitsForOrphans(t *testing.T) {
	guest(t)
	a, patient, hasty, v := newAdapter(t), newAdapter(t), newAdapter(t, "lock-wait", "300ms"), borrowLive(t, vgOne, 1<<20)
	id := canonicalID(t, a, v)
	orphaned := func(name string) int {
		h := startHelper(t, "stopped-snapshot", v.path(), name)
		pid := h.pid(t)
		h.kill(t)
		return pid
	}
	abandoned := func(name string) int {
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { _, err := a.CreateSnapshot(ctx, id, name); ended <- err }()
		pid := 0
		waitUntil(t, "lvcreate runs", func() bool { pid = programOf(a, "lvcreate"); return pid != 0 })
		must(t, syscall.Kill(pid, syscall.SIGSTOP))
		cancel()
		want(t, "a call that does not wait any longer", <-ended, fault.Unavailable)
		return pid
	}
	for name, start := range map[string]func(string) int{"orphaned": orphaned, "abandoned": abandoned} {
		pid := start(name)
		in, err := a.lvm.installed(t.Context())
		must(t, err)
		limited, cancel := context.WithTimeout(t.Context(), time.Second)
		lock, err := lockGroup(limited, intent{Group: v.group, Locks: in.locks})
		cancel()
		must(t, err) // a program that has LVM's own lock would be waited for in any case: then this test shows nothing
		unlock(lock)
		_, err = hasty.Gate(t.Context(), []adapters.VolumeID{id})
		want(t, name+": while it is stopped", err, fault.Busy)
		if err != nil && !strings.Contains(err.Error(), "may be making snapshots") {
			t.Errorf("%s: %v", name, err)
		}
		passed := make(chan error, 1)
		go func() { _, err := patient.Gate(t.Context(), []adapters.VolumeID{id}); passed <- err }()
		must(t, syscall.Kill(pid, syscall.SIGCONT))
		must(t, <-passed)
		// What is there now is all that there will be: the snapshot, or none, if Gate's own look at the group had its
		// lock when lvcreate wanted it.
		late := adapters.SnapshotID{Volume: id, Name: name}
		_, now := hasty.Snapshot(t.Context(), late)
		waitUntil(t, "lvcreate is over", func() bool { return syscall.Kill(pid, 0) != nil })
		s, later := hasty.Snapshot(t.Context(), late)
		if (now == nil) != (later == nil) {
			t.Errorf("%s: when Gate had returned: %v; when the program was over: %v", name, now, later)
		}
		if later == nil {
			must(t, a.DeleteSnapshot(t.Context(), s.ID))
		} else {
			want(t, name, later, fault.NotFound)
		}
	}
}

// A group that another program has locked is waited for, and Busy in the end.
func TestGuestLocked(t *testing.T) {
	guest(t)
	a, v := newAdapter(t, "lock-wait", "400ms"), borrowLive(t, vgOne, 1<<20)
	id := canonicalID(t, a, v)
	in, err := a.lvm.installed(t.Context())
	must(t, err)
	lock, err := lockGroup(t.Context(), intent{Group: vgOne, Locks: in.locks})
	must(t, err)
	start := time.Now()
	_, err = a.CreateSnapshot(t.Context(), id, "locked")
	want(t, "a locked group", err, fault.Busy)
	t.Logf("after %v: %v", time.Since(start), err)
	_, err = newAdapter(t, "lock-wait", "400ms").Volume(t.Context(), v.ID())
	want(t, "a report of a locked group", err, fault.Busy)
	time.AfterFunc(200*time.Millisecond, func() { unlock(lock) })
	patient := newAdapter(t)
	s, err := patient.CreateSnapshot(t.Context(), v.ID(), "locked")
	must(t, err)
	must(t, a.DeleteSnapshot(t.Context(), s.ID))
}

func readAll(t testing.TB, a *Adapter, id adapters.SnapshotID) []byte {
	t.Helper()
	i, err := a.Open(t.Context(), id)
	must(t, err)
	defer func() { must(t, i.Close()) }()
	b := make([]byte, i.Size())
	n, err := i.ReadAt(t.Context(), b, 0)
	if n != len(b) {
		t.Fatalf("%d bytes of %d: %v", n, len(b), err)
	}
	return b
}

// A record whose program is alive is left alone; one without a program that suspended nothing is removed; one that
// others could have written is not believed.
func TestSweepRecords(t *testing.T) {
	s := &state{folder: t.TempDir()}
	must(t, os.Chmod(s.folder, 0o700))
	r := &command{}
	f, err := r.input(s, &intent{Owner: thisProcess(), Line: "lvcreate", Group: "g", Locks: s.folder}, "script\n")
	must(t, err)
	must(t, sweepRecords(t.Context(), s, mapper{}))
	b, err := os.ReadFile(r.record)
	must(t, err)
	if in, ok := readIntent(b); !ok || in.Group != "g" || in.Owner != thisProcess() || !in.Owner.alive() {
		t.Errorf("%s", b)
	}
	f.Close()
	must(t, os.Chmod(s.folder, 0o777))
	want(t, "a folder that anybody can write to", sweepRecords(t.Context(), s, mapper{}), fault.Invalid)
	must(t, os.Chmod(s.folder, 0o700))
	must(t, sweepRecords(t.Context(), s, mapper{}))
	if _, err := os.Stat(r.record); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the record is still there: %v", err)
	}
}
