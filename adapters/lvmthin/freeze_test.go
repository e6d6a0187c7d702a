package lvmthin

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

func TestJudgeFreeze(t *testing.T) {
	for _, c := range []struct {
		failure string
		mode    adapters.FreezeMode
		doubt   bool
	}{
		{"", adapters.FreezeNests, false},
		{"lvcreate: device-mapper: suspend ioctl on  (253:4) failed: Device or resource busy; Failed to suspend logical volume", adapters.FreezeSelf, false},
		{"lvcreate: Device or resource busy", 0, true},
		{"lvcreate: No space left on device", 0, true},
	} {
		var failure error
		if c.failure != "" {
			failure = errors.New(c.failure)
		}
		if mode, err := judgeFreeze(failure); mode != c.mode || (err != nil) != c.doubt {
			t.Errorf("%q: %v, %v", c.failure, mode, err)
		}
	}
}

// forgetFreeze makes the next look at a volume a trial.
func forgetFreeze(t testing.TB, a *Adapter) {
	t.Helper()
	if err := os.Remove(filepath.Join(a.state.folder, freezePrefix+bootID())); err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
}

// scratches lists what a trial left.
func scratches(t testing.TB, a *Adapter) (left []string) {
	t.Helper()
	g := fullReport(t, a, vgOne)
	for l := range volumesOf(g) {
		if strings.HasPrefix(l.name, scratchPrefix) {
			left = append(left, l.name)
		}
	}
	return left
}

func fullReport(t testing.TB, a *Adapter, group string) *group {
	t.Helper()
	p, err := a.locate(t.Context(), typed(group+"/any"))
	must(t, err)
	return p.group
}

// The adapter's answer is what happens to a mounted filesystem of the user's.
func TestGuestFreezeMode(t *testing.T) {
	guest(t)
	a := newAdapter(t)
	forgetFreeze(t, a)
	v := newLive(t, vgOne, fresh("frozen"), 32<<20)
	start := time.Now()
	vol, err := a.Volume(t.Context(), v.ID())
	must(t, err)
	t.Logf("the answer is %v, after %v; %s", vol.Freeze, time.Since(start), a.Capabilities().Quiesce)
	if left := scratches(t, a); len(left) > 0 {
		t.Errorf("left: %v", left)
	}

	run(t, "mkfs.ext4", "-q", "-F", v.device())
	dir := t.TempDir()
	must(t, unix.Mount(v.device(), dir, "ext4", 0, ""))
	t.Cleanup(func() { must(t, unix.Unmount(dir, 0)) })
	must(t, os.WriteFile(dir+"/file", []byte("content"), 0o600))
	run(t, "fsfreeze", "-f", dir)
	_, err = a.CreateSnapshot(t.Context(), v.ID(), "frozen")
	run(t, "fsfreeze", "-u", dir)
	switch vol.Freeze {
	case adapters.FreezeNests:
		must(t, err)
	case adapters.FreezeSelf:
		want(t, "under our own freeze", err, fault.Busy)
		_, err = a.CreateSnapshot(t.Context(), v.ID(), "frozen")
		must(t, err)
	default:
		t.Fatalf("the answer is %v", vol.Freeze)
	}
	must(t, a.DeleteSnapshot(t.Context(), adapters.SnapshotID{Volume: vol.ID, Name: "frozen"}))

	again := newAdapter(t)
	vol, err = again.Volume(t.Context(), v.ID())
	must(t, err)
	if mode, found := again.state.readFreeze(); !found || mode != vol.Freeze {
		t.Errorf("kept is %v, %v", mode, found)
	}
}

// A trial that is killed while its filesystem is frozen leaves a volume that is in use and cannot be removed; the next
// who opens the backend thaws and removes it.
func TestGuestFreezeTrialKilled(t *testing.T) {
	guest(t)
	a := newAdapter(t)
	v := newLive(t, vgOne, fresh("killed"), chunk)
	installed, err := a.lvm.installed(t.Context())
	must(t, err)
	for range 5 {
		forgetFreeze(t, a)
		h := startHelper(t, "volume", v.path())
		var lock *os.File
		waitUntil(t, "the scratch filesystem is mounted", func() bool { return len(scratchMounts(t)) > 0 || h.over() })
		if !h.over() {
			lock, err = lockGroup(t.Context(), intent{Group: vgOne, Locks: installed.locks}) // so that lvcreate waits, with the filesystem frozen
			must(t, err)
			time.Sleep(300 * time.Millisecond)
		}
		frozen := false
		for _, at := range scratchMounts(t) {
			frozen = frozen || isFrozen(t, at)
		}
		h.kill(t)
		if lock != nil {
			unlock(lock)
		}
		if !frozen {
			t.Log("too late: the trial was over")
			newAdapter(t).tidy(t.Context(), fullReport(t, a, vgOne))
			continue
		}
		if left := scratches(t, a); len(left) == 0 { // two, if lvcreate was quicker than we with the lock
			t.Fatal("the killed trial left nothing: the test shows nothing")
		}
		_, err := newAdapter(t).Gate(t.Context(), []adapters.VolumeID{v.ID()})
		must(t, err)
		if left := scratches(t, a); len(left) != 0 {
			t.Errorf("still there: %v", left)
		}
		return
	}
	t.Error("no trial could be killed while its filesystem was frozen")
}

// scratchMounts are the devices of scratch volumes that carry a mounted ext4, which shows in /proc/fs/ext4.
func scratchMounts(t testing.TB) (devices []string) {
	t.Helper()
	paths, err := filepath.Glob("/dev/mapper/*-sp--scratch--*")
	must(t, err)
	mounted, _ := os.ReadDir("/proc/fs/ext4")
	for _, p := range paths {
		var st unix.Stat_t
		if unix.Stat(p, &st) != nil {
			continue
		}
		at, err := node(adapters.Device(st.Rdev))
		if err == nil && slices.ContainsFunc(mounted, func(e os.DirEntry) bool { return e.Name() == filepath.Base(at) }) {
			devices = append(devices, at)
		}
	}
	return devices
}

// isFrozen reports whether a mounted filesystem is frozen: a second freeze is EBUSY then.
func isFrozen(t testing.TB, device string) bool {
	t.Helper()
	fs, err := mountDetached("ext4", device)
	if err != nil {
		return false
	}
	defer fs.Close()
	switch err := freeze(fs, fiFreeze); err {
	case nil:
		must(t, freeze(fs, fiThaw))
		return false
	case unix.EBUSY:
		return true
	default:
		t.Fatal(err)
		return false
	}
}

// Without mkfs nothing can be tried: the answer is the careful one, and Capabilities say why.
func TestGuestFreezeDoubt(t *testing.T) {
	guest(t)
	a := newAdapter(t)
	forgetFreeze(t, a)
	v := newLive(t, vgOne, fresh("doubt"), chunk)
	c := exec.Command("unshare", "-m", "sh", "-c", "for f in /usr/sbin/mkfs.ext4 /usr/sbin/mkfs.xfs; do mount --bind /dev/null $f || exit 1; done; exec "+os.Args[0]+" "+v.path())
	c.Env = append(os.Environ(), helperEnv+"=describe")
	out, err := c.CombinedOutput()
	if !strings.Contains(string(out), "freeze self") || !strings.Contains(string(out), "e2fsprogs") {
		t.Errorf("%v: %s", err, out)
	}
	if _, found := a.state.readFreeze(); found {
		t.Error("the careful answer is kept as if it had been found")
	}
}
