package cut

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/adapters/reflink"
	"stillpoint.io/stillpoint/agent/freezer"
	"stillpoint.io/stillpoint/fault"
	"stillpoint.io/stillpoint/integration/lab"
)

// These tests cut real filesystems through the real freezer.

var freezerProgram string

func TestMain(m *testing.M) {
	if os.Getenv(envVictim) != "" {
		victim()
		return
	}
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "cut-test-")
		if err != nil {
			panic(err)
		}
		defer os.RemoveAll(dir)
		freezerProgram = filepath.Join(dir, "stillpoint-freezer")
		build := exec.Command("go", "build", "-o", freezerProgram, "stillpoint.io/stillpoint/cmd/stillpoint-freezer")
		if out, err := build.CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "building the freezer: %v\n%s", err, out)
			return 1
		}
		return m.Run()
	}())
}

// site is a pool with an ext4 and an XFS volume in it, mounted, and what a cut needs.
type site struct {
	*lab.Lab
	pool    *lab.Filesystem
	volumes []*lab.Filesystem
	adapter adapters.Adapter
	node    Node
}

func newSite(t *testing.T) *site {
	t.Helper()
	s := &site{Lab: lab.Test(t)}
	var err error
	if s.pool, err = s.Pool(t.Context(), "pool", "xfs", 4<<30); err != nil {
		t.Fatal(err)
	}
	for _, fstype := range []string{"ext4", "xfs"} {
		v, err := s.Volume(t.Context(), s.pool.Mount, fstype, fstype, 512<<20)
		if err != nil {
			t.Fatal(err)
		}
		s.volumes = append(s.volumes, v)
	}
	s.adapter = openReflink(t)
	s.node = nodeIn(s.Dir, freezerProgram)
	return s
}

func openReflink(t testing.TB) adapters.Adapter {
	a, err := reflink.Kind().Open(t.Context(), adapters.Config{Name: "reflink"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close() })
	return a
}

func nodeIn(dir, program string) Node {
	return Node{
		Freezer: func(ctx context.Context) (*freezer.Client, error) {
			return freezer.Spawn(ctx, freezer.SpawnOptions{Program: program, Records: filepath.Join(dir, "records")})
		},
		SyncCommand: []string{program, "sync"},
		Lock:        filepath.Join(dir, "cut.lock"),
	}
}

// request asks for a cut of all the site's volumes through an adapter, which may be decorated.
func (s *site) request(name string, through adapters.Adapter) Request {
	r := Request{Name: name, MaxFreeze: 10 * time.Second}
	for _, v := range s.volumes {
		r.Volumes = append(r.Volumes, Volume{adapters.VolumeID{Backend: "reflink", ID: v.File}, through})
	}
	return r
}

// snapshots lists what there is, verified or not.
func (s *site) snapshots(t *testing.T) (all []adapters.Snapshot) {
	t.Helper()
	for snap, err := range s.adapter.Snapshots(t.Context(), adapters.Filter{Cutting: true}) {
		if err != nil {
			t.Fatal(err)
		}
		if strings.HasPrefix(snap.ID.Volume.ID, s.uuid(t)) {
			all = append(all, snap)
		}
	}
	return all
}

// uuid is the pool's, which begins the ids of its volumes.
func (s *site) uuid(t *testing.T) string {
	t.Helper()
	v, err := s.adapter.Volume(t.Context(), adapters.VolumeID{Backend: "reflink", ID: s.volumes[0].File})
	if err != nil {
		t.Fatal(err)
	}
	uuid, _, _ := strings.Cut(v.ID.ID, "/")
	return uuid
}

// thawed fails unless the volumes can be written to within the limit.
func (s *site) thawed(t *testing.T, within time.Duration) {
	t.Helper()
	for _, v := range s.volumes {
		done := make(chan error, 1)
		go func() { done <- os.WriteFile(filepath.Join(v.Mount, "alive"), []byte("x"), 0o600) }()
		select {
		case err := <-done:
			if err != nil {
				t.Fatal(err)
			}
		case <-time.After(within):
			t.Fatalf("%s is still frozen after %v", v.Mount, within)
		}
	}
}

// materialise restores a snapshot into a file beside the volume, to be checked and mounted.
func (s *site) materialise(t *testing.T, handle string) string {
	t.Helper()
	h, err := adapters.ParseHandle(handle)
	if err != nil {
		t.Fatal(err)
	}
	id, err := adapters.Resolve(t.Context(), s.adapter, h)
	if err != nil {
		t.Fatal(err)
	}
	opener, _ := adapters.As[adapters.Opener](s.adapter)
	image, err := opener.Open(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	defer image.Close()
	f, err := os.CreateTemp(s.pool.Mount, "copy-*.img")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(image.Size()); err != nil {
		t.Fatal(err)
	}
	differ, _ := adapters.As[adapters.Differ](s.adapter)
	delta, err := differ.Allocated(t.Context(), id, 0)
	if err != nil {
		t.Fatal(err)
	}
	for e, err := range delta.Extents {
		if err != nil {
			t.Fatal(err)
		}
		if e.Zero {
			continue
		}
		buf := make([]byte, e.Length)
		if _, err := image.ReadAt(t.Context(), buf, e.Offset); err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt(buf, e.Offset); err != nil {
			t.Fatal(err)
		}
	}
	return f.Name()
}

// A cut over two filesystems, under a process that writes to one because of what it wrote to the other, is one
// instant, and both filesystems in it are sound.
func TestACutIsOneInstant(t *testing.T) {
	s := newSite(t)
	folders := []string{s.volumes[0].Mount, s.volumes[1].Mount}
	writer, err := lab.StartWriter(folders, 16<<20, 20<<20)
	if err != nil {
		t.Fatal(err)
	}
	var cuts []Result
	for i := range 5 {
		time.Sleep(100 * time.Millisecond) // something for the writer to do, not something to wait for
		res, err := Make(t.Context(), s.request(fmt.Sprintf("cut-%d", i), s.adapter), s.node)
		if err != nil {
			t.Error(err)
			break
		}
		cuts = append(cuts, res)
		t.Logf("frozen: %+v", res.Frozen)
		if len(res.Frozen) != 2 || len(res.Unverified) != 0 || len(res.Crash) != 0 {
			t.Errorf("%+v", res)
		}
	}
	if err := writer.Stop(); err != nil {
		t.Fatal(err)
	}
	for _, res := range cuts {
		var mounts []string
		for i, h := range res.Snapshots {
			file := s.materialise(t, h)
			if err := s.Sound(t.Context(), s.volumes[i].Type, file); err != nil {
				t.Error(err)
			}
			fs, err := s.MountCopy(t.Context(), s.volumes[i].Type, file)
			if err != nil {
				t.Fatal(err)
			}
			defer fs.Down()
			mounts = append(mounts, fs.Mount)
		}
		last, err := lab.Instant(mounts)
		if err != nil {
			t.Error(err)
		}
		t.Logf("%s: the writer was at %v", res.Name, last)
	}
}

// Repeating a cut by its name gives the same snapshots; other volumes under that name are refused.
func TestRepeatingACut(t *testing.T) {
	s := newSite(t)
	first, err := Make(t.Context(), s.request("daily", s.adapter), s.node)
	if err != nil {
		t.Fatal(err)
	}
	again, err := Make(t.Context(), s.request("daily", s.adapter), s.node)
	if err != nil {
		t.Fatal(err)
	}
	if !again.Adopted || !slices.Equal(first.Snapshots, again.Snapshots) {
		t.Errorf("first %+v, then %+v", first, again)
	}
	third, err := s.Volume(t.Context(), s.pool.Mount, "third", "ext4", 64<<20)
	if err != nil {
		t.Fatal(err)
	}
	s.volumes = append(s.volumes, third)
	if _, err := Make(t.Context(), s.request("daily", s.adapter), s.node); !errors.Is(err, fault.Busy) {
		t.Errorf("the name with one more volume: %v, want Busy", err)
	}
	if n := len(s.snapshots(t)); n != 2 {
		t.Errorf("%d snapshots, want the first two only", n)
	}
}

// A snapshot call outlives the process that made it, and ends when the next cut of that name has looked for leftovers
// already. What it made is of another instant: it is not taken for the new cut's.
func TestASnapshotThatComesLate(t *testing.T) {
	s := newSite(t)
	r := s.request("late", s.adapter)
	var late adapters.Snapshot
	connect := s.node.Freezer
	s.node.Freezer = func(ctx context.Context) (*freezer.Client, error) {
		var err error
		if late, err = s.adapter.CreateSnapshot(ctx, r.Volumes[0].ID, r.Name); err != nil {
			t.Error(err)
		}
		return connect(ctx)
	}
	res, err := Make(t.Context(), r, s.node)
	if err != nil || res.Adopted {
		t.Fatal(res, err)
	}
	for _, snap := range s.snapshots(t) {
		if snap.ID == late.ID && !snap.Created.After(late.Created) {
			t.Errorf("%s of %v was taken for one of the cut", snap.ID, snap.Created)
		}
	}
}

// A volume named twice, by two names, is cut once.
func TestAVolumeNamedTwice(t *testing.T) {
	s := newSite(t)
	r := s.request("twice", s.adapter)
	link := filepath.Join(s.Dir, "link")
	if err := os.Symlink(s.volumes[0].File, link); err != nil {
		t.Fatal(err)
	}
	r.Volumes = append(r.Volumes, r.Volumes[0], Volume{adapters.VolumeID{Backend: "reflink", ID: link}, s.adapter})
	res, err := Make(t.Context(), r, s.node)
	if err != nil {
		t.Fatal(err)
	}
	if len(res.Snapshots) != 2 || len(res.Frozen) != 2 {
		t.Errorf("%+v", res)
	}
}

// meddler is the real adapter with something that happens inside a snapshot call, while the filesystems are frozen.
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

func freezeIoctl(t *testing.T, path string, freeze bool) error {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	request := uint(0xC0045878) // FITHAW
	if freeze {
		request = 0xC0045877 // FIFREEZE
	}
	return unix.IoctlSetInt(int(f.Fd()), request, 0)
}

// A void cut is discarded: nothing of it is left, verified or not, and everything is thawed.
func (s *site) mustBeVoid(t *testing.T, kind fault.Kind, says string, during func(context.Context, adapters.VolumeID) error) {
	t.Helper()
	r := s.request("void", meddler{s.adapter, during})
	r.MaxFreeze = 3 * time.Second
	_, err := Make(t.Context(), r, s.node)
	if fault.KindOf(err) != kind || !strings.Contains(fmt.Sprint(err), says) {
		t.Errorf("error %q (%v), want %v and %q", err, fault.KindOf(err), kind, says)
	}
	if left := s.snapshots(t); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
	s.thawed(t, 20*time.Second)
}

// qemu-ga, VMware: a thaw that finds "not frozen" voids the cut.
func TestAStrangerThawsEarly(t *testing.T) {
	s := newSite(t)
	s.mustBeVoid(t, fault.Void, "lost", func(context.Context, adapters.VolumeID) error {
		freezeIoctl(t, s.volumes[0].Mount, false)
		return nil
	})
}

// A stranger thaws, something writes, and the stranger freezes again: FITHAW cannot tell, the write counters can.
func TestAStrangerThawsWritesAndFreezesAgain(t *testing.T) {
	s := newSite(t)
	s.mustBeVoid(t, fault.Void, "wrote below a frozen filesystem", func(_ context.Context, id adapters.VolumeID) error {
		v := s.volumes[0]
		if !strings.HasSuffix(id.ID, filepath.Base(v.File)) {
			return nil
		}
		if err := freezeIoctl(t, v.Mount, false); err != nil {
			return err
		}
		f, err := os.Create(filepath.Join(v.Mount, "intruder"))
		if err != nil {
			return err
		}
		if err := errors.Join(f.Sync(), f.Close()); err != nil {
			return err
		}
		return freezeIoctl(t, v.Mount, true)
	})
}

// miroir#280: one leg that fails to cut must not keep the others frozen.
func TestABackendThatFails(t *testing.T) {
	s := newSite(t)
	var calls atomic.Int32
	s.mustBeVoid(t, fault.Exhausted, "no space for a snapshot", func(context.Context, adapters.VolumeID) error {
		if calls.Add(1) == 1 {
			return fault.Errorf(fault.Exhausted, "no space for a snapshot")
		}
		return nil
	})
}

// miroir#280, #222: a backend call that hangs until its context ends.
func TestABackendThatHangs(t *testing.T) {
	s := newSite(t)
	s.mustBeVoid(t, fault.Unavailable, "deadline", func(ctx context.Context, _ adapters.VolumeID) error {
		<-ctx.Done()
		return ctx.Err()
	})
}

// A backend call that ignores its context: the thaw does not wait for it, and what it makes too late is deleted.
func TestABackendThatIgnoresTheDeadline(t *testing.T) {
	s := newSite(t)
	s.mustBeVoid(t, fault.Unavailable, "deadline", func(context.Context, adapters.VolumeID) error {
		for begin := time.Now(); time.Since(begin) < 6*time.Second; { // twice the deadline
			if os.WriteFile(filepath.Join(s.volumes[0].Mount, "thawed"), nil, 0o600) == nil {
				break // returns when the volume is thawed, which waits for nobody
			}
		}
		return nil
	})
}

// Ctrl-C in the middle of the freeze.
func TestACutCancelled(t *testing.T) {
	s := newSite(t)
	ctx, cancel := context.WithCancel(t.Context())
	r := s.request("cancelled", meddler{s.adapter, func(ctx context.Context, _ adapters.VolumeID) error {
		cancel()
		<-ctx.Done()
		return ctx.Err()
	}})
	if _, err := Make(ctx, r, s.node); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
	if left := s.snapshots(t); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
	s.thawed(t, 20*time.Second)
}

// Somebody covers a mount in the middle: the plan does not hold any more, though nothing was written.
func TestMountsThatChangeInTheMiddle(t *testing.T) {
	s := newSite(t)
	var once atomic.Bool
	s.mustBeVoid(t, fault.Void, "the same plan is not possible any more", func(context.Context, adapters.VolumeID) error {
		if once.Swap(true) {
			return nil
		}
		return unix.Mount("tmpfs", s.volumes[1].Mount, "tmpfs", 0, "size=1m")
	})
	if err := unix.Unmount(s.volumes[1].Mount, 0); err != nil {
		t.Error(err)
	}
}

// ec2-consistent-snapshot#29 and others: a filesystem that somebody else froze is not ours to thaw.
func TestAFilesystemFrozenBySomebodyElse(t *testing.T) {
	s := newSite(t)
	if err := freezeIoctl(t, s.volumes[1].Mount, true); err != nil {
		t.Fatal(err)
	}
	r := s.request("busy", s.adapter)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	_, err := Make(ctx, r, s.node)
	if err == nil {
		t.Error("a cut over a frozen filesystem succeeded")
	}
	if err := freezeIoctl(t, s.volumes[1].Mount, false); err != nil {
		t.Errorf("the stranger's freeze was thawed: %v", err)
	}
	t.Log(err)
	if left := s.snapshots(t); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
	s.thawed(t, 20*time.Second)
}

// What cannot be frozen fails the cut, or is allowed and recorded.
func TestCrashConsistency(t *testing.T) {
	s := newSite(t)
	raw := filepath.Join(s.pool.Mount, "raw.img")
	if err := lab.Sparse(raw, 16<<20); err != nil {
		t.Fatal(err)
	}
	_, f, err := lab.Loop(raw) // attached, not mounted
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	r := s.request("crash", s.adapter)
	r.Volumes = append(r.Volumes, Volume{adapters.VolumeID{Backend: "reflink", ID: raw}, s.adapter})
	if _, err := Make(t.Context(), r, s.node); !errors.Is(err, fault.Unsupported) {
		t.Errorf("error %v, want Unsupported", err)
	}
	r.AllowCrashConsistent = true
	res, err := Make(t.Context(), r, s.node)
	if err != nil {
		t.Fatal(err)
	}
	if len(res.Crash) != 1 || !strings.Contains(res.Crash[0], "raw.img") || len(res.Frozen) != 2 {
		t.Errorf("%+v", res)
	}
	for _, snap := range s.snapshots(t) {
		want := adapters.FilesystemConsistent
		if strings.Contains(snap.ID.Volume.ID, "raw.img") {
			want = adapters.CrashConsistent
		}
		if snap.Notes.Consistency != want || snap.Mark != adapters.Verified {
			t.Errorf("%s is recorded as %+v, %s", snap.ID, snap.Notes, snap.Mark)
		}
	}
}

// The plan can be printed, and printing it changes nothing.
func TestDryRun(t *testing.T) {
	s := newSite(t)
	p, err := DryRun(t.Context(), s.request("dry", s.adapter), s.node)
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range s.volumes {
		if !strings.Contains(p.String(), "freeze    "+v.Mount) {
			t.Errorf("the plan does not freeze %s:\n%s", v.Mount, p)
		}
	}
	if strings.Contains(p.String(), "freeze    "+s.pool.Mount+" ") {
		t.Errorf("the plan freezes the pool, which the snapshots write to:\n%s", p)
	}
	if left := s.snapshots(t); len(left) != 0 {
		t.Errorf("a dry run made %v", left)
	}
}

func TestRequestsThatMakeNoSense(t *testing.T) {
	v := []Volume{{adapters.VolumeID{Backend: "reflink", ID: "/x"}, nil}}
	for _, r := range []Request{
		{MaxFreeze: time.Second, Volumes: v},
		{Name: "n", MaxFreeze: time.Second},
		{Name: "n", Volumes: v},
		{Name: "n", Volumes: v, MaxFreeze: time.Minute + 1},
		{Name: "n", Volumes: v, MaxFreeze: -1},
		{Name: strings.Repeat("n", 254), Volumes: v, MaxFreeze: 1},
	} {
		if _, err := Make(t.Context(), r, Node{}); !errors.Is(err, fault.Invalid) {
			t.Errorf("%+v: %v, want Invalid", r, err)
		}
	}
}

// A pool's own device and a volume in the pool, in one cut: the upper filesystem is frozen and cloned before the pool is
// frozen and cloned in its turn.
func TestAVolumeAndThePoolUnderIt(t *testing.T) {
	l := lab.Test(t)
	outer, err := l.Pool(t.Context(), "outer", "xfs", 4<<30)
	if err != nil {
		t.Fatal(err)
	}
	inner, err := l.Volume(t.Context(), outer.Mount, "inner", "xfs", 1<<30)
	if err != nil {
		t.Fatal(err)
	}
	upper, err := l.Volume(t.Context(), inner.Mount, "upper", "ext4", 64<<20)
	if err != nil {
		t.Fatal(err)
	}
	a := openReflink(t)
	r := Request{Name: "stack", MaxFreeze: 10 * time.Second}
	for _, fs := range []*lab.Filesystem{inner, upper} {
		r.Volumes = append(r.Volumes, Volume{adapters.VolumeID{Backend: "reflink", ID: fs.File}, a})
	}
	res, err := Make(t.Context(), r, nodeIn(l.Dir, freezerProgram))
	if err != nil {
		t.Fatal(err)
	}
	var order []string
	for _, f := range res.Frozen {
		order = append(order, f.Filesystem)
	}
	if !slices.Equal(order, []string{upper.Mount, inner.Mount}) {
		t.Errorf("frozen in the order %v", order)
	}
}
