package freezer

import (
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/integration/vm"
)

// The agent is SIGKILLed while it has a lease: the connection closes, which thaws.
func TestClientKilledWhileFrozen(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	fs := r.volume("v", "ext4")
	pid := r.client(r.socket, fs)
	w := writer(t, fs)
	blocked(t, w)
	killed := time.Now()
	r.signal(pid, unix.SIGKILL)
	r.thawedAfter(killed, "the client was killed", w)
}

// The same with a freezer of its own, which thaws and goes, with its guard and its record.
func TestSpawningClientKilledWhileFrozen(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	fs := r.volume("v", "ext4")
	pid := r.client("spawn", fs)
	if len(r.ledgers()) != 2 {
		t.Fatalf("records: %v", r.ledgers())
	}
	w := writer(t, fs)
	blocked(t, w)
	killed := time.Now()
	r.signal(pid, unix.SIGKILL)
	r.thawedAfter(killed, "the client was killed", w)
	r.wait("the spawned freezer to go", func() bool { return len(r.ledgers()) == 1 })
}

// The agent is SIGSTOPped past the heartbeat.
func TestClientStopped(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	fs := r.volume("v", "ext4")
	pid := r.client(r.socket, fs)
	w := writer(t, fs)
	blocked(t, w)
	stopped := time.Now()
	r.signal(pid, unix.SIGSTOP)
	r.thawedAfter(stopped, "the client was stopped (heartbeat 400ms)", w)
}

// The beats keep a lease; without them it ends, and its Thaw says so.
func TestHeartbeat(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	fs := r.volume("v", "ext4")
	q := r.request(50*time.Second, fs)
	q.Heartbeat = 400 * time.Millisecond
	c := r.connect()
	l := r.freeze(c, q)
	time.Sleep(3 * q.Heartbeat) // the beats keep it
	if err := l.Err(); err != nil {
		t.Fatalf("lost under a living client: %v", err)
	}
	w := writer(t, fs)
	blocked(t, w)
	stopped := time.Now()
	l.quiet() // no more beats
	r.thawedAfter(stopped, "the last heartbeat", w)
	r.void(l)
}

// The freezer's first process is killed: the guard thaws, at once.
func TestHolderKilled(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	pool, upper := r.stack()
	dirty(t, upper)
	l := r.freeze(r.connect(), r.request(50*time.Second, upper, pool))
	w1, w2 := writer(t, upper), writer(t, pool)
	blocked(t, w1)
	killed := time.Now()
	r.signal(r.holder(), unix.SIGKILL)
	r.thawedAfter(killed, "the holder's end (lower)", w2)
	r.thawedAfter(killed, "the holder's end (upper)", w1)
	wantReason(t, r.lost(l), Lost)
}

// The first process is stopped: nobody renews the lease, and the guard thaws when it runs out. The client sees that
// it has no answers. Continued, the first process finds out what happened, and serves on.
func TestHolderStopped(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	fs := r.volume("v", "ext4")
	q := r.request(50*time.Second, fs)
	q.Heartbeat = 400 * time.Millisecond
	l := r.freeze(r.connect(), q)
	w := writer(t, fs)
	stopped := time.Now()
	r.signal(r.holder(), unix.SIGSTOP)
	r.thawedAfter(stopped.Add(q.Heartbeat), "the end of the heartbeat (at the latest)", w)
	wantReason(t, r.lost(l), Lost)
	if _, err := l.Thaw(t.Context()); err == nil {
		t.Error("a thaw that nobody answered is no error")
	}
	r.signal(r.holder(), unix.SIGCONT)
	c := r.connect()
	var thawed *Lease
	r.wait("the freezer to serve again", func() bool {
		r.rested()
		l, err := c.Freeze(t.Context(), r.request(5*time.Second, fs))
		thawed = l
		return err == nil
	})
	if rep, err := thawed.Thaw(t.Context()); err != nil || !rep.Held() {
		t.Fatal(rep, err)
	}
}

// The guard is killed: the first process thaws at once, voids the lease, and gets a new guard for the next one.
func TestGuardKilled(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	fs := r.volume("v", "ext4")
	c := r.connect()
	l := r.freeze(c, r.request(50*time.Second, fs))
	w := writer(t, fs)
	killed := time.Now()
	r.signal(r.guard(), unix.SIGKILL)
	r.thawedAfter(killed, "the guard's end", w)
	wantReason(t, r.lost(l), Lost)
	r.void(l)
	r.rested()
	l = r.freeze(c, r.request(5*time.Second, fs))
	if rep, err := l.Thaw(t.Context()); err != nil || !rep.Held() {
		t.Fatal(rep, err)
	}
}

// The guard is stopped, while frozen and before: a freezer without a second process does not hold a freeze.
func TestGuardStopped(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	fs := r.volume("v", "ext4")
	c := r.connect()
	l := r.freeze(c, r.request(50*time.Second, fs))
	w := writer(t, fs)
	stopped := time.Now()
	old := r.guard()
	r.signal(old, unix.SIGSTOP)
	r.thawedAfter(stopped, "the guard was stopped", w)
	wantReason(t, r.lost(l), Lost)
	r.void(l)
	r.rested()
	l = r.freeze(c, r.request(5*time.Second, fs))
	if r.guard() == old {
		t.Error("still the stopped guard")
	}
	if rep, err := l.Thaw(t.Context()); err != nil || !rep.Held() {
		t.Fatal(rep, err)
	}
	r.rested()
	r.signal(r.guard(), unix.SIGSTOP) // while nothing is frozen
	l = r.freeze(c, r.request(5*time.Second, fs))
	if rep, err := l.Thaw(t.Context()); err != nil || !rep.Held() {
		t.Fatal(rep, err)
	}
}

// miroir#280, across an agent rollout: both processes are killed, and the restart thaws.
func TestBothKilled(t *testing.T) {
	t.Parallel()
	for _, fstype := range []string{"ext4", "xfs", "btrfs"} {
		t.Run(fstype, func(t *testing.T) {
			t.Parallel()
			r := newRig(t)
			fs := r.volume("v", fstype)
			r.freeze(r.connect(), r.request(50*time.Second, fs))
			r.killBoth()
			s := r.stranger(fs)
			if !s.frozen() {
				t.Fatal("thawed by nobody: the test proves nothing")
			}
			w := writer(t, fs)
			blocked(t, w)
			restarted := time.Now()
			r.start()
			r.thawedAfter(restarted, "the restart", w)
			if len(r.ledgers()) != 1 {
				t.Errorf("records: %v", r.ledgers())
			}
		})
	}
}

// The same by hand: `stillpoint-freezer sweep`. A living freezer's freeze is left alone, stopped or not.
func TestSweepCommand(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	fs := r.volume("v", "ext4")
	r.freeze(r.connect(), r.request(50*time.Second, fs))
	s := r.stranger(fs)
	r.signal(r.guard(), unix.SIGSTOP)
	r.signal(r.holder(), unix.SIGSTOP)
	if out, err := r.command("sweep", "--records", r.records); err != nil || len(out) > 0 || !s.frozen() {
		t.Fatalf("a living freezer was swept: %s, %v", out, err)
	}
	r.killBoth()
	out, err := r.command("sweep", "--records", r.records)
	if err != nil || s.frozen() || len(r.ledgers()) != 0 {
		t.Fatalf("%s, %v", out, err)
	}
	t.Logf("%s", out)
}

// Both are killed inside FIFREEZE: the processes go when the freeze lands, and the freeze stays. The sweep watches
// them until they are really gone, and only then thaws.
func TestBothKilledInsideFIFREEZE(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	pool, upper := r.stack()
	dirty(t, upper)
	above, below := r.stranger(upper), r.stranger(pool)
	below.freeze()
	q := r.request(50*time.Second, upper)
	q.Heartbeat = time.Second
	out := behind(t.Context(), r.connect(), q)
	r.inside(q.Filesystems[0])
	guard := r.guard()
	unix.Kill(guard, unix.SIGKILL)
	unix.Kill(r.holder(), unix.SIGKILL)
	if err := <-out; err == nil {
		t.Fatal("frozen by a dead process")
	}
	swept, err := Sweep(t.Context(), r.records)
	if err != nil || len(swept) != 1 || !swept[0].Pending {
		t.Fatalf("swept while the freeze is under way: %v, %v", swept, err)
	}
	below.thaw()
	landed := time.Now()
	r.wait("the sweep to thaw it", func() bool {
		swept, err = Sweep(t.Context(), r.records)
		if err != nil {
			t.Fatal(err)
		}
		return len(swept) == 1 && !swept[0].Pending
	})
	t.Logf("thawed %v after it could land", time.Since(landed).Round(time.Millisecond))
	if !swept[0].Thawed || above.frozen() {
		t.Errorf("%v", swept)
	}
}

// Only the first process is killed inside FIFREEZE: the guard thaws what lands.
func TestHolderKilledInsideFIFREEZE(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	pool, upper := r.stack()
	first := r.volume("first", "ext4")
	dirty(t, upper)
	above, below := r.stranger(upper), r.stranger(pool)
	below.freeze()
	q := r.request(50*time.Second, first, upper)
	q.Heartbeat = time.Second
	out := behind(t.Context(), r.connect(), q)
	r.inside(q.Filesystems[1])
	w := writer(t, first)
	killed := time.Now()
	r.signal(r.holder(), unix.SIGKILL)
	if err := <-out; err == nil {
		t.Fatal("frozen by a dead process")
	}
	r.thawedAfter(killed, "the holder's end (one that had been frozen before)", w)
	below.thaw()
	landed := time.Now()
	w = writer(t, upper)
	r.thawedAfter(landed, "it could land", w)
	r.wait("the guard to thaw it", func() bool { return !above.frozen() })
}

// Only the first process is stopped inside FIFREEZE, past the deadline: the guard kills it, waits until it is gone,
// and thaws what landed.
func TestHolderStoppedInsideFIFREEZE(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	pool, upper := r.stack()
	dirty(t, upper)
	above, below := r.stranger(upper), r.stranger(pool)
	below.freeze()
	q := r.request(500*time.Millisecond, upper)
	out := behind(t.Context(), r.connect(), q)
	r.inside(q.Filesystems[0])
	r.signal(r.holder(), unix.SIGSTOP)
	time.Sleep(time.Second)
	below.thaw()
	landed := time.Now()
	r.wait("the guard to thaw it", func() bool { return !above.frozen() })
	t.Logf("thawed %v after it could land", time.Since(landed).Round(time.Millisecond))
	if err := <-out; err == nil {
		t.Error("frozen by a process that stood still past the deadline")
	}
}

// vdsm#160: FIFREEZE outlives its deadline, and no signal stops it. The client has its answer by the deadline, the
// others are thawed by then, and the late one as it lands.
func TestFreezeThatLandsAfterItsDeadline(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	pool, upper := r.stack()
	first, other := r.volume("first", "ext4"), r.volume("other", "ext4")
	dirty(t, upper)
	above, below := r.stranger(upper), r.stranger(pool)
	below.freeze()
	c := r.connect()
	q := r.request(500*time.Millisecond, first, upper)
	start := time.Now()
	_, err := c.Freeze(t.Context(), q)
	wantReason(t, err, Lost)
	t.Logf("answered %v after the deadline", (time.Since(start) - q.MaxFreeze).Round(time.Millisecond))
	if r.stranger(first).frozen() {
		t.Error("the first filesystem is still frozen")
	}
	// miroir#222: one wedged call does not block the others; but the wedged one is busy.
	r.wait("the freezer to take another request", func() bool {
		l, err := c.Freeze(t.Context(), r.request(5*time.Second, other))
		if err != nil {
			wantReason(t, err, Busy)
			return false
		}
		rep, err := l.Thaw(t.Context())
		return err == nil && rep.Held()
	})
	_, err = c.Freeze(t.Context(), r.request(time.Second, upper))
	wantReason(t, err, Busy)
	below.thaw()
	landed := time.Now()
	r.wait("the late freeze to be thawed", func() bool { return !above.frozen() })
	t.Logf("thawed %v after it could land", time.Since(landed).Round(time.Millisecond))
}

// miroir#311: unmounted lazily during the freeze. The thaw goes by descriptor, and the device is free afterwards.
func TestUnmountDuringTheFreeze(t *testing.T) {
	t.Parallel()
	for _, fstype := range []string{"ext4", "xfs", "btrfs"} {
		t.Run(fstype, func(t *testing.T) {
			t.Parallel()
			r := newRig(t)
			fs := r.volume("v", fstype)
			l := r.freeze(r.connect(), r.request(20*time.Second, fs))
			if err := unix.Unmount(fs.Mount, unix.MNT_DETACH); err != nil {
				t.Fatal(err)
			}
			if rep, err := l.Thaw(t.Context()); err != nil || !rep.Held() {
				t.Fatal(rep, err)
			}
			r.wait("the device to be free", func() bool { return deviceFree(fs.Device) })
		})
	}
}

// miroir#311, to the end: the owners are dead, and the filesystem was unmounted while frozen. The sweep mounts it
// nowhere, thaws it, and lets it go.
func TestUnmountedWhileFrozenByTheDead(t *testing.T) {
	t.Parallel()
	for _, fstype := range []string{"ext4", "xfs", "btrfs"} {
		t.Run(fstype, func(t *testing.T) {
			t.Parallel()
			r := newRig(t)
			fs := r.volume("v", fstype)
			r.freeze(r.connect(), r.request(50*time.Second, fs))
			r.killBoth()
			r.wait("the last descriptor of the killed", func() bool { return unix.Unmount(fs.Mount, 0) == nil })
			if deviceFree(fs.Device) {
				t.Fatal("the device is free: the test proves nothing")
			}
			swept, err := Sweep(t.Context(), r.records)
			if err != nil || len(swept) != 1 || !swept[0].Thawed {
				t.Fatal(swept, err)
			}
			t.Log(swept[0])
			r.wait("the device to be free", func() bool { return deviceFree(fs.Device) })
		})
	}
}

// What the dead left frozen was thawed by somebody else, unmounted, and its device is gone: no FITHAW, no error.
func TestSweepOfWhatIsGone(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	fs := r.volume("v", "ext4")
	r.freeze(r.connect(), r.request(50*time.Second, fs))
	r.killBoth()
	s := r.stranger(fs)
	s.thaw()
	s.close()
	if err := fs.Down(); err != nil {
		t.Fatal(err)
	}
	swept, err := Sweep(t.Context(), r.records)
	if err != nil || len(swept) != 1 || swept[0].Thawed || swept[0].Pending || len(r.ledgers()) != 0 {
		t.Fatal(swept, err)
	}
}

// A process that writes to a frozen filesystem cannot be killed. Nothing on the way to the thaw waits for one.
func TestWriterBlockedOnTheFrozenFilesystem(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	fs := r.volume("v", "ext4")
	l := r.freeze(r.connect(), r.request(20*time.Second, fs))
	cmd := exec.Command("dd", "if=/dev/zero", "of="+filepath.Join(fs.Mount, "f"), "bs=4096", "count=1")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	r.wait("the writer to be held", func() bool {
		s, _, _ := processState(cmd.Process.Pid)
		return s == 'D' || s == 'S'
	})
	cmd.Process.Kill()
	if rep, err := l.Thaw(t.Context()); err != nil || !rep.Held() {
		t.Fatal(rep, err)
	}
	cmd.Wait()
}

// SIGTERM while frozen: thaw, then exit with 0. SIGHUP is nothing.
func TestTerminatedWhileFrozen(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	fs := r.volume("v", "ext4")
	l := r.freeze(r.connect(), r.request(50*time.Second, fs))
	r.signal(r.holder(), unix.SIGHUP)
	w := writer(t, fs)
	blocked(t, w)
	told := time.Now()
	r.signal(r.holder(), unix.SIGTERM)
	r.thawedAfter(told, "SIGTERM", w)
	<-r.exited
	if r.err != nil {
		t.Error(r.err)
	}
	wantReason(t, r.lost(l), Lost)
}

// A deadlock in the making: the deadline passes while the lower filesystem's FIFREEZE hangs, so the upper one's FITHAW
// hangs, too, which writes to the lower; then the first process is killed, and the lower one's freeze lands. The
// killed process cannot go, because its FITHAW waits for the lower filesystem, which it left frozen. So whoever is
// left must not wait for the process, only for the thread that was in FIFREEZE.
func TestHolderKilledBetweenTwoHangingCalls(t *testing.T) {
	t.Parallel()
	for name, finish := range map[string]func(*rig){
		"the guard thaws": func(*rig) {},
		"a sweep thaws": func(r *rig) {
			r.wait("a sweep", func() bool {
				_, err := Sweep(r.t.Context(), r.records)
				return err == nil && len(r.ledgers()) == 0
			})
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newRig(t)
			base, lower := r.stack()
			upper, err := r.lab.Volume(t.Context(), lower.Mount, "top", "ext4", 8<<20)
			if err != nil {
				t.Fatal(err)
			}
			above, middle := r.stranger(upper), r.stranger(lower)
			below := r.stranger(base) // the lowest last, so that a cleanup thaws it first
			guard := r.guard()
			deadline := 2 * time.Second // it must come after all the steps up to inside
			if vm.Inside() {
				deadline = 10 * time.Second
			}
			q := r.request(deadline, upper, lower)
			q.First = 1
			l := r.freeze(r.connect(), q) // the upper one is frozen
			dirty(t, lower)
			below.freeze()
			out := make(chan error, 1)
			go func() { out <- l.More(t.Context(), 0) }()
			r.inside(q.Filesystems[1])
			<-out // the deadline has passed
			time.Sleep(100 * time.Millisecond)
			if name == "a sweep thaws" {
				r.signal(guard, unix.SIGKILL)
			}
			r.signal(r.holder(), unix.SIGKILL)
			below.thaw()
			landed := time.Now()
			w := writer(t, upper)
			finish(r)
			r.thawedAfter(landed, "the lower one could land", w)
			r.wait("both to be thawed", func() bool { return !middle.frozen() && !above.frozen() })
		})
	}
}
