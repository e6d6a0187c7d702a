package thin

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/adapters/lvmthin"
	"stillpoint.io/stillpoint/adapters/reflink"
	"stillpoint.io/stillpoint/agent/cut"
	"stillpoint.io/stillpoint/agent/freezer"
	"stillpoint.io/stillpoint/fault"
	"stillpoint.io/stillpoint/integration/lab"
	"stillpoint.io/stillpoint/integration/vm"
)

// site is a thin pool, and what a cut needs.
type site struct {
	*lab.Lab
	pool    lab.ThinPool
	nests   bool // a snapshot works under our freeze
	thin    adapters.Adapter
	reflink adapters.Adapter
	node    cut.Node
}

// leg is a mounted volume of a cut.
type leg struct {
	*lab.Filesystem
	id      adapters.VolumeID
	adapter adapters.Adapter
}

const volumeSize = 400 << 20

func needsDeviceMapper(t *testing.T) {
	t.Helper()
	if testing.Short() {
		t.Skip("needs device-mapper: left out by -short, `make test` runs it")
	}
}

func newSite(t *testing.T) *site {
	t.Helper()
	needsDeviceMapper(t)
	s := &site{pool: thinPool(t), Lab: lab.Test(t)} // the pool goes last
	s.thin = openThin(t)
	s.nests = s.probe(t)
	var err error
	if s.reflink, err = reflink.Kind().Open(t.Context(), adapters.Config{Name: "reflink"}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.reflink.Close() })
	s.node = nodeIn(s.Dir)
	return s
}

// openThin opens the adapter.
func openThin(t *testing.T) adapters.Adapter {
	t.Helper()
	a, err := lvmthin.Kind().Open(t.Context(), adapters.Config{Name: "lvm-thin"})
	must(t, err)
	t.Cleanup(func() {
		if err := a.Close(); err != nil {
			t.Errorf("closing the adapter: %v", err)
		}
	})
	return a
}

func nodeIn(dir string) cut.Node {
	program := vm.Program("stillpoint-freezer")
	return cut.Node{
		Freezer: func(ctx context.Context) (*freezer.Client, error) {
			return freezer.Spawn(ctx, freezer.SpawnOptions{Program: program, Records: filepath.Join(dir, "records")})
		},
		SyncCommand: []string{program, "sync"},
		Lock:        filepath.Join(dir, "cut.lock"),
	}
}

func (s *site) mode() adapters.FreezeMode {
	if s.nests {
		return adapters.FreezeNests
	}
	return adapters.FreezeSelf
}

func (s *site) volumeOf(t *testing.T, id adapters.VolumeID) adapters.Volume {
	t.Helper()
	v, err := s.thin.Volume(t.Context(), id)
	must(t, err)
	return v
}

// probe tries by hand whether a snapshot works under a freeze, which the adapter must find out too. Of the kernels that
// these tests are meant for the answer is known: they would prove nothing if both gave the same one.
func (s *site) probe(t *testing.T) bool {
	t.Helper()
	fs, err := s.pool.In(s.Lab)(t.Context(), "probe", "ext4", volumeSize)
	must(t, err)
	freeze(t, fs.Mount)
	_, err = plain{}.CreateSnapshot(t.Context(), plainID(fs.Thin), "probe")
	thaw(t, fs.Mount)
	if err != nil && !errors.Is(err, fault.Busy) {
		t.Fatal(err)
	}
	release, readErr := os.ReadFile("/proc/sys/kernel/osrelease")
	if readErr != nil {
		t.Fatal(readErr)
	}
	t.Logf("Linux %sa snapshot under a freeze: %v", release, err)
	for version, nests := range map[string]bool{"6.1.": false, "6.12.": true} {
		if strings.HasPrefix(string(release), version) && nests != (err == nil) {
			t.Errorf("on this kernel a snapshot under a freeze works: %v, want %v", err == nil, nests)
		}
	}
	if says := s.volumeOf(t, thinID(fs.Thin)).Freeze; (says == adapters.FreezeNests) != (err == nil) {
		t.Fatalf("the adapter says of how a snapshot and a freeze get along: %v", says)
	}
	return err == nil
}

func thinID(v lab.ThinVolume) adapters.VolumeID {
	return adapters.VolumeID{Backend: "lvm-thin", ID: string(v)}
}

// volume makes a mounted filesystem on a thin volume.
func (s *site) volume(t *testing.T, name, fstype string) leg {
	t.Helper()
	fs, err := s.pool.In(s.Lab)(t.Context(), name, fstype, volumeSize)
	must(t, err)
	return leg{fs, s.volumeOf(t, thinID(fs.Thin)).ID, s.thin}
}

// file makes a mounted filesystem in a file of a reflink pool, which is on a disk of its own as far as LVM knows.
func (s *site) file(t *testing.T, name, fstype string) leg {
	t.Helper()
	pool, err := s.Pool(t.Context(), "pool", "xfs", 2<<30)
	if err != nil {
		t.Fatal(err)
	}
	fs, err := s.Volume(t.Context(), pool.Mount, name, fstype, volumeSize)
	if err != nil {
		t.Fatal(err)
	}
	return leg{fs, adapters.VolumeID{Backend: "reflink", ID: fs.File}, s.reflink}
}

func request(name string, legs ...leg) cut.Request {
	r := cut.Request{Name: name, MaxFreeze: 20 * time.Second}
	for _, l := range legs {
		r.Volumes = append(r.Volumes, cut.Volume{ID: l.id, Adapter: l.adapter})
	}
	return r
}

// make makes a cut, and makes it anew when the machine starved it.
func (s *site) make(t *testing.T, r cut.Request) (res cut.Result, err error) {
	t.Helper()
	for range 10 {
		res, err = cut.Make(t.Context(), r, s.node)
		if err == nil || !starved(err.Error()) {
			break
		}
		t.Logf("once more, because %v", err)
	}
	return res, err
}

// starved tells from its words that a cut is void only because the machine ran the freezer or its client for less than
// once in a heartbeat: a guest has one processor, and the host may have other things to do.
func starved(words string) bool {
	return strings.Contains(words, "the freezer has not answered for") || strings.Contains(words, "the client gave no sign of life for")
}

// snapshots lists what there is of the legs, verified or not.
func snapshots(t *testing.T, legs ...leg) (all []adapters.Snapshot) {
	t.Helper()
	for _, l := range legs {
		v, err := l.adapter.Volume(t.Context(), l.id)
		if err != nil {
			t.Fatal(err)
		}
		for snap, err := range l.adapter.Snapshots(t.Context(), adapters.Filter{Volume: v.ID, Cutting: true}) {
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, snap)
		}
	}
	return all
}

// thawed fails unless the legs can be written to soon.
func thawed(t *testing.T, legs ...leg) {
	t.Helper()
	for _, l := range legs {
		done := make(chan error, 1)
		go func() { done <- os.WriteFile(filepath.Join(l.Mount, "alive"), []byte("x"), 0o600) }()
		select {
		case err := <-done:
			if err != nil {
				t.Fatal(err)
			}
		case <-time.After(20 * time.Second):
			t.Fatalf("%s is still frozen", l.Mount)
		}
	}
}

// resolve finds the snapshot of a handle.
func (l leg) resolve(t *testing.T, handle string) adapters.SnapshotID {
	t.Helper()
	h, err := adapters.ParseHandle(handle)
	if err != nil {
		t.Fatal(err)
	}
	id, err := adapters.Resolve(t.Context(), l.adapter, h)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// activated is the device of a leg's snapshot, made active by hand. It goes with the pool.
func (l leg) activated(t *testing.T, id adapters.SnapshotID) string {
	t.Helper()
	_, origin, _ := strings.Cut(string(l.Thin), "/")
	out, err := run(exec.Command("lvs", "--noheadings", "-o", "lv_full_name", "--select", "origin="+origin+` && lv_name=~"[.]`+id.Name+`$"`, group))
	must(t, err)
	v := lab.ThinVolume(strings.TrimSpace(out))
	if _, err := run(exec.Command("lvchange", "-q", "-ay", "-K", string(v))); err != nil {
		t.Fatal(err)
	}
	return v.Device()
}

// image is a file or device with what a snapshot of a leg holds.
func (s *site) image(t *testing.T, l leg, handle string) string {
	t.Helper()
	id := l.resolve(t, handle)
	if l.Thin != "" {
		return l.activated(t, id)
	}
	opener, _ := adapters.As[adapters.Opener](l.adapter)
	from, err := opener.Open(t.Context(), id)
	must(t, err)
	defer from.Close()
	to, err := os.CreateTemp(s.Dir, "copy-*.img")
	must(t, err)
	defer to.Close()
	must(t, to.Truncate(volumeSize))
	buf, zero := make([]byte, 1<<20), make([]byte, 1<<20)
	for off := int64(0); off < volumeSize; off += int64(len(buf)) {
		_, err := from.ReadAt(t.Context(), buf, off)
		must(t, err)
		if !bytes.Equal(buf, zero) {
			_, err = to.WriteAt(buf, off)
			must(t, err)
		}
	}
	return to.Name()
}

const fifreeze, fithaw = 0xC0045877, 0xC0045878 // linux/fs.h

// freeze and thaw do what a stranger would.
func freeze(t *testing.T, path string) { t.Helper(); must(t, ioctl(path, fifreeze)) }
func thaw(t *testing.T, path string)   { t.Helper(); must(t, ioctl(path, fithaw)) }

func ioctl(path string, request uint) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.IoctlSetInt(int(f.Fd()), request, 0)
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
