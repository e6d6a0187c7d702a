package freezer

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The plain course: frozen, held, thawed, unmountable at once, and nothing left behind.
func TestFreezeAndThaw(t *testing.T) {
	t.Parallel()
	for _, fstype := range []string{"ext4", "xfs", "btrfs"} {
		t.Run(fstype, func(t *testing.T) {
			t.Parallel()
			r := newRig(t)
			fs := r.volume("v", fstype)
			c := r.connect()
			l := r.freeze(c, r.request(30*time.Second, fs))
			w := writer(t, fs)
			before := diskUse(t, r.holder()) + diskUse(t, r.guard())
			blocked(t, w)
			if after := diskUse(t, r.holder()) + diskUse(t, r.guard()); after != before {
				t.Errorf("the freezer used a disk while frozen: before %s, after %s", before, after)
			}
			asked := time.Now()
			rep, err := l.Thaw(t.Context())
			if err != nil || !rep.Held() {
				t.Fatal(rep, err)
			}
			r.thawedAfter(asked, "Thaw", w)
			if d := rep[0].Duration; d < 50*time.Millisecond || d > long {
				t.Errorf("frozen for %v", d)
			}
			if err := unix.Unmount(fs.Mount, 0); err != nil {
				t.Errorf("after the thaw something is still open: %v", err)
			}
			s, err := c.Status(t.Context())
			if err != nil || s.Lease != nil || !s.Guard || len(s.Filesystems) != 1 || s.Filesystems[0].Freezes != 1 || s.Filesystems[0].Last != rep[0].Duration {
				t.Errorf("status: %+v, %v", s, err)
			}
			r.signal(r.holder(), unix.SIGTERM)
			<-r.exited
			if r.err != nil || len(r.ledgers()) != 0 {
				t.Errorf("after SIGTERM: %v, records %v, said %s", r.err, r.ledgers(), r.said.String())
			}
		})
	}
}

// open-vm-tools#6: a loop stack is frozen upper before lower and thawed in reverse; the other order hangs, so it is
// refused.
func TestLoopStackOnlyInTheRightOrder(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	pool, upper := r.stack()
	dirty(t, upper)
	c := r.connect()
	_, err := c.Freeze(t.Context(), r.request(5*time.Second, pool, upper))
	wantReason(t, err, Invalid)
	l := r.freeze(c, r.request(5*time.Second, upper, pool))
	rep, err := l.Thaw(t.Context())
	if err != nil || !rep.Held() || len(rep) != 2 {
		t.Fatal(rep, err)
	}
	t.Logf("upper frozen for %v, lower for %v", rep[0].Duration, rep[1].Duration)
}

// A lease may freeze in steps: between them, what is to be frozen later can still be written to (a clone in a pool).
func TestFreezeInSteps(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	pool, upper := r.stack()
	c := r.connect()
	q := r.request(5*time.Second, upper, pool)
	q.First = 1
	l := r.freeze(c, q)
	above, below := r.stranger(upper), r.stranger(pool)
	if !above.frozen() || below.frozen() {
		t.Error("after the first step the upper filesystem must be frozen, and only that")
	}
	wantReason(t, l.More(t.Context(), 2), Invalid) // there is only one left; asking for too much ends the lease
	if rep, err := l.Thaw(t.Context()); err != nil || rep.Held() {
		t.Errorf("a lease that failed: %v, %v", rep, err)
	}
	r.rested()
	l = r.freeze(c, q)
	if err := l.More(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	if !above.frozen() || !below.frozen() {
		t.Error("after the second step both must be frozen")
	}
	if rep, err := l.Thaw(t.Context()); err != nil || !rep.Held() {
		t.Errorf("%v, %v", rep, err)
	}
	r.rested()
	l = r.freeze(c, q) // thawed before the second step
	rep, err := l.Thaw(t.Context())
	if err != nil || !rep[0].Held || rep[1].Held || rep[1].Duration != 0 {
		t.Errorf("%v, %v", rep, err)
	}
}

func TestWave(t *testing.T) {
	fs := []Filesystem{{Device: 1}, {Device: 2}, {Device: 3}, {Device: 4}}
	below := [][]Device{{3}, {9}, {4}, nil} // the first stands on the third, the third on the fourth
	for _, row := range []struct{ from, limit, want int }{{0, 4, 2}, {2, 4, 3}, {3, 4, 4}, {0, 1, 1}, {1, 3, 3}} {
		if got := wave(fs, below, row.from, row.limit); got != row.want {
			t.Errorf("wave(%d, %d) = %d, want %d", row.from, row.limit, got, row.want)
		}
	}
}

// WALinuxAgent#525: one superblock under two mount points is one superblock.
func TestSameFilesystemUnderTwoMounts(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	fs := r.volume("v", "ext4")
	bind := filepath.Join(r.lab.Dir, "bind")
	if err := os.Mkdir(bind, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(fs.Mount, bind, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	c := r.connect()
	q := r.request(5*time.Second, fs)
	q.Filesystems = append(q.Filesystems, target(t, bind))
	_, err := c.Freeze(t.Context(), q)
	wantReason(t, err, Invalid)
	q.Filesystems = q.Filesystems[1:]
	l := r.freeze(c, q)
	if !r.stranger(fs).frozen() {
		t.Error("not frozen by way of the bind mount")
	}
	if rep, err := l.Thaw(t.Context()); err != nil || !rep.Held() {
		t.Fatal(rep, err)
	}
}

// A filesystem that somebody else froze is left alone, and everything that was frozen before it is thawed.
func TestFrozenBySomebodyElseIsLeftAlone(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	mine, theirs := r.volume("mine", "ext4"), r.volume("theirs", "ext4")
	s := r.stranger(theirs)
	s.freeze()
	_, err := r.connect().Freeze(t.Context(), r.request(5*time.Second, mine, theirs))
	if e := wantReason(t, err, Busy); e.Filesystem != theirs.Mount {
		t.Errorf("the error names %q", e.Filesystem)
	}
	if r.stranger(mine).frozen() {
		t.Error("what was frozen before the failure is still frozen when Freeze returns")
	}
	if !s.frozen() {
		t.Error("a stranger's freeze was undone")
	}
	s.thaw()
}

// VMware's FilesystemQuiesceFault: the thaw finds it not frozen, so the cut is void.
func TestSomebodyElseThawsEarly(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	a, b := r.volume("a", "ext4"), r.volume("b", "ext4")
	s := r.stranger(b)
	l := r.freeze(r.connect(), r.request(5*time.Second, a, b))
	s.thaw()
	rep := r.void(l)
	if !rep[0].Held || rep[1].Held || rep[1].Why == "" {
		t.Errorf("%+v", rep)
	}
}

// The documented limit: a stranger who thaws and freezes again is not seen by FITHAW. The cut's write counters are the
// second proof. What matters here: we send one FITHAW, and it ends in a thawed filesystem.
func TestSomebodyElseThawsAndFreezesAgain(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	fs := r.volume("v", "ext4")
	s := r.stranger(fs)
	l := r.freeze(r.connect(), r.request(5*time.Second, fs))
	s.thaw()
	s.freeze()
	if rep, err := l.Thaw(t.Context()); err != nil || !rep.Held() {
		t.Fatalf("if the kernel now tells freezes apart, say so in Frozen.Held: %+v, %v", rep, err)
	}
	if s.frozen() {
		t.Error("still frozen")
	}
}

// miroir#280, azure-linux-extensions#1868: no deadline. Here it holds while the client lives and beats.
func TestDeadlineThawsUnderALivingClient(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	fs := r.volume("v", "ext4")
	start := time.Now()
	l := r.freeze(r.connect(), r.request(500*time.Millisecond, fs))
	w := writer(t, fs)
	r.thawedAfter(start.Add(500*time.Millisecond), "the deadline", w)
	wantReason(t, r.lost(l), Lost)
	if rep := r.void(l); rep[0].Duration == 0 || rep[0].Why == "" {
		t.Errorf("%+v", rep)
	}
}

// The client gives up while a freeze hangs in the kernel: it is thawed as it lands.
func TestCancelledFreeze(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	pool, upper := r.stack()
	dirty(t, upper)
	above, below := r.stranger(upper), r.stranger(pool)
	below.freeze()
	c := r.connect()
	q := r.request(30*time.Second, upper)
	ctx, cancel := contextWithCancel(t)
	out := behind(ctx, c, q)
	r.inside(q.Filesystems[0])
	cancel()
	if err := <-out; err != ctx.Err() {
		t.Fatalf("got %v", err)
	}
	below.thaw()
	r.wait("the late freeze to be thawed", func() bool { return !above.frozen() })
}

// Longhorn#3125 froze the host's root. The root, our own records and socket, and what does not exist are refused.
func TestRefused(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	fs := r.volume("v", "ext4")
	c := r.connect()
	root := target(t, "/")
	for name, row := range map[string]struct {
		f    Filesystem
		want Reason
	}{
		"root":           {root, Refused},
		"records":        {target(t, r.records), Refused},
		"proc":           {target(t, "/proc"), Refused},
		"no mount point": {Filesystem{fs.Mount + "/x", target(t, fs.Mount).Device, "ext4"}, Invalid},
		"another device": {Filesystem{fs.Mount, root.Device, "ext4"}, Invalid},
		"another type":   {Filesystem{fs.Mount, target(t, fs.Mount).Device, "xfs"}, Invalid},
		"relative":       {Filesystem{"mnt", root.Device, "ext4"}, Invalid},
	} {
		if _, err := c.Freeze(t.Context(), Request{Filesystems: []Filesystem{row.f}, MaxFreeze: time.Second}); err == nil {
			t.Fatalf("%s was frozen", name)
		} else {
			wantReason(t, err, row.want)
		}
	}
	for _, max := range []time.Duration{0, -1, MaxFreeze + 1} {
		_, err := c.Freeze(t.Context(), r.request(max, fs))
		wantReason(t, err, Invalid)
	}
}

// azure-linux-extensions#1680, Alibaba fsfreeze.sh: a log on the frozen filesystem. The filesystem behind the
// freezer's own standard error is refused.
func TestFilesystemOfItsOwnOutputIsRefused(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	for _, fstype := range []string{"ext4", "btrfs"} {
		fs := r.volume(fstype, fstype)
		r.signal(r.holder(), unix.SIGTERM)
		<-r.exited
		log, err := os.Create(filepath.Join(fs.Mount, "log"))
		if err != nil {
			t.Fatal(err)
		}
		r.startWithStderr(log)
		_, err = r.connect().Freeze(t.Context(), r.request(time.Second, fs))
		wantReason(t, err, Refused)
		log.Close()
	}
	r.signal(r.holder(), unix.SIGTERM) // it keeps the log open
	<-r.exited
}

// A stale CIFS mount once blocked 10,789 threads. A FUSE server that never answers hangs whoever touches its
// filesystem: a freezer that answers at once has not touched it, nor gone through it.
func TestNetworkAndFUSEFilesystemsAreNeverOpened(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	at := filepath.Join(r.lab.Dir, "fuse")
	hang := mountDeadFUSE(t, at)
	defer hang()
	f := target(t, at)
	c := r.connect()
	_, err := c.Freeze(t.Context(), Request{Filesystems: []Filesystem{f}, MaxFreeze: time.Second})
	wantReason(t, err, Refused)
	_, err = c.Freeze(t.Context(), Request{Filesystems: []Filesystem{{at + "/below", f.Device, "ext4"}}, MaxFreeze: time.Second})
	wantReason(t, err, Invalid)
}

// Overlayfs has no freeze of its own; the error says what to do.
func TestOverlayIsRefused(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	fs := r.volume("v", "ext4")
	for _, d := range []string{"lower", "upper", "work"} {
		if err := os.Mkdir(filepath.Join(fs.Mount, d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	at := filepath.Join(r.lab.Dir, "overlay")
	if err := os.Mkdir(at, 0o700); err != nil {
		t.Fatal(err)
	}
	o := "lowerdir=" + fs.Mount + "/lower,upperdir=" + fs.Mount + "/upper,workdir=" + fs.Mount + "/work"
	if err := unix.Mount("overlay", at, "overlay", 0, o); err != nil {
		t.Fatal(err)
	}
	_, err := r.connect().Freeze(t.Context(), Request{Filesystems: []Filesystem{target(t, at)}, MaxFreeze: time.Second})
	wantReason(t, err, Refused)
	unix.Unmount(at, 0)
}

// miroir#248: frozen 60 s, free 30 s, in a loop for hours. A superblock rests five times as long as it was frozen,
// also when another freezer asks.
func TestFilesystemRestsBetweenFreezes(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	fs := r.volume("v", "ext4")
	c := r.connect()
	l := r.freeze(c, r.request(5*time.Second, fs))
	time.Sleep(300 * time.Millisecond)
	rep, err := l.Thaw(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err = c.Freeze(t.Context(), r.request(time.Second, fs)); err == nil {
		t.Fatal("frozen again at once")
	}
	if e := wantReason(t, err, Busy); e.Wait <= 0 || e.Wait > RestFactor*rep[0].Duration {
		t.Errorf("wait %v after %v", e.Wait, rep[0].Duration)
	}
	other := spawn(t, r)
	if _, err = other.Freeze(t.Context(), r.request(time.Second, fs)); err == nil {
		t.Fatal("frozen again by another freezer")
	}
	time.Sleep(wantReason(t, err, Busy).Wait)
	l = r.freeze(other, r.request(time.Second, fs))
	if rep, err := l.Thaw(t.Context()); err != nil || !rep.Held() {
		t.Fatal(rep, err)
	}
}

// One lease at a time: the second client is told how long to wait.
func TestSecondLeaseIsBusy(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	a, b := r.volume("a", "ext4"), r.volume("b", "ext4")
	l := r.freeze(r.connect(), r.request(5*time.Second, a))
	_, err := r.connect().Freeze(t.Context(), r.request(5*time.Second, b))
	if e := wantReason(t, err, Busy); e.Wait <= 0 {
		t.Error("no time to wait")
	}
	if _, err := l.Thaw(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// A second freezer on one socket is an error in words, and does not disturb the first.
func TestSecondInstance(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	out, err := r.command("serve", "--socket", r.socket, "--records", r.records)
	if err == nil {
		t.Fatal("two freezers serve one socket")
	}
	t.Logf("%s", out)
	if _, err := r.connect().Status(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// A folder that others may enter is no place for the socket.
func TestSocketFolderMustBePrivate(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	open := filepath.Join(r.lab.Dir, "open")
	if err := os.Mkdir(open, 0o755); err != nil {
		t.Fatal(err)
	}
	if out, err := r.command("serve", "--socket", open+"/s", "--records", r.records); err == nil {
		t.Fatalf("served in a folder with mode 0755: %s", out)
	}
}

// A spawned freezer ends with its client.
func TestSpawn(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	fs := r.volume("v", "ext4")
	c := spawn(t, r)
	l := r.freeze(c, r.request(5*time.Second, fs))
	w := writer(t, fs)
	blocked(t, w)
	closed := time.Now()
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	r.thawedAfter(closed, "Close", w)
	wantReason(t, l.Err(), Lost)
	if _, err := Spawn(t.Context(), SpawnOptions{Program: "/nonexistent"}); err == nil {
		t.Fatal("started nothing")
	}
	_, err := Spawn(t.Context(), SpawnOptions{Program: r.program, Records: "relative"})
	t.Log(wantReason(t, err, Unavailable))
}

// What a hardened freezer is: alone in an empty network, safe from the OOM killer, locked in memory.
func TestHardened(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	s, err := r.connect().Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for name, pid := range map[string]int{"holder": r.holder(), "guard": r.guard()} {
		checkHardened(t, name, pid, s.Weakness != "")
	}
}
