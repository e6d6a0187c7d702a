package thin

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/cut"
	"stillpoint.io/stillpoint/fault"
	"stillpoint.io/stillpoint/integration/lab"
)

// underAWriter makes cuts of legs while a process writes to one because of what it wrote to the one before.
func underAWriter(t *testing.T, s *site, prepare func(*cut.Request), legs ...leg) (cuts []cut.Result) {
	t.Helper()
	var folders []string
	for _, l := range legs {
		folders = append(folders, l.Mount)
	}
	writer, err := lab.StartWriter(folders, 16<<20, 20<<20)
	must(t, err)
	for i := range 3 {
		time.Sleep(200 * time.Millisecond) // something for the writer to do, not something to wait for
		r := request(fmt.Sprintf("cut-%d", i), legs...)
		prepare(&r)
		res, err := s.make(t, r)
		if err != nil {
			t.Error(err)
			break
		}
		t.Logf("frozen: %+v; not verifiable: %q", res.Frozen, res.Unverified)
		cuts = append(cuts, res)
	}
	must(t, writer.Stop())
	return cuts
}

func asItIs(*cut.Request) {}

// ends are where the writer had come to on each leg in a cut, whose filesystems must be sound; err says that it is no
// instant.
func ends(t *testing.T, s *site, res cut.Result, legs ...leg) (last []uint64, err error) {
	t.Helper()
	var folders []string
	for i, l := range legs {
		file := s.image(t, l, res.Snapshots[i])
		if err := s.Sound(t.Context(), l.Type, file); err != nil {
			t.Error(err)
		}
		fs, err := s.MountCopy(t.Context(), l.Type, file)
		must(t, err)
		defer fs.Down()
		folders = append(folders, fs.Mount)
	}
	return lab.Instant(folders)
}

func oneInstant(t *testing.T, s *site, cuts []cut.Result, legs ...leg) {
	t.Helper()
	for _, res := range cuts {
		last, err := ends(t, s, res, legs...)
		if err != nil {
			t.Error(err)
		}
		if len(last) == 0 || last[0] == 0 {
			t.Error("the writer had written nothing: the test proves nothing")
		}
		t.Logf("%s: the writer was at %v", res.Name, last)
	}
}

// A cut over two thin volumes is one instant where a snapshot works under our freeze. Elsewhere it is an error that says
// so, and what to do; allowed, each volume is sound at an instant of its own, which its snapshot says.
func TestTwoThinVolumes(t *testing.T) {
	for _, fstype := range []string{"ext4", "xfs"} {
		t.Run(fstype, func(t *testing.T) {
			s := newSite(t)
			a, b := s.volume(t, "a", fstype), s.volume(t, "b", fstype)
			if s.nests {
				oneInstant(t, s, underAWriter(t, s, asItIs, a, b), a, b)
				return
			}
			_, err := s.make(t, request("both", a, b))
			if !errors.Is(err, fault.Unsupported) {
				t.Fatalf("error %v, want Unsupported", err)
			}
			for _, says := range []string{a.id.String(), b.id.String(), "EBUSY", "one at a time", "--allow-separate-instants"} {
				if !strings.Contains(err.Error(), says) {
					t.Errorf("it does not say %q: %v", says, err)
				}
			}
			if left := snapshots(t, a, b); len(left) > 0 {
				t.Errorf("left behind: %v", left)
			}
			cuts := underAWriter(t, s, func(r *cut.Request) { r.AllowSeparateInstants = true }, a, b)
			for _, res := range cuts {
				if _, err := ends(t, s, res, a, b); err != nil {
					t.Logf("%s: %v, as allowed", res.Name, err)
				}
				if len(res.Separate) != 1 || res.Separate[0] != res.Snapshots[1] {
					t.Errorf("at an instant of their own: %v of %v, want the second", res.Separate, res.Snapshots)
				}
			}
			for _, snap := range snapshots(t, b) {
				if snap.Notes.Consistency != adapters.VolumeConsistent {
					t.Errorf("%s is recorded as %+v", snap.ID, snap.Notes)
				}
			}
		})
	}
}

// mistaken is an adapter that says of every volume that a snapshot works under our freeze.
type mistaken struct{ adapters.Adapter }

func (m mistaken) Volume(ctx context.Context, id adapters.VolumeID) (adapters.Volume, error) {
	v, err := m.Adapter.Volume(ctx, id)
	v.Freeze = adapters.FreezeNests
	return v, err
}

// Whether a snapshot works under our freeze is the adapter's word. If it is wrong the cut fails, and all is thawed.
func TestAnAdapterThatIsWrongAboutTheKernel(t *testing.T) {
	s := newSite(t)
	if s.nests {
		return // it cannot be wrong that way
	}
	a := s.volume(t, "a", "ext4")
	a.adapter = mistaken{s.thin}
	if _, err := s.make(t, request("wrong", a)); !errors.Is(err, fault.Busy) {
		t.Errorf("error %v, want Busy", err)
	}
	if left := snapshots(t, a); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	thawed(t, a)
}

// One thin volume and one in a file are one instant on every kernel, whichever is written to first.
func TestAThinVolumeAndAFile(t *testing.T) {
	for fstype, thinFirst := range map[string]bool{"ext4": true, "xfs": false} {
		t.Run(fstype, func(t *testing.T) {
			s := newSite(t)
			legs := []leg{s.volume(t, "a", fstype), s.file(t, "b", "ext4")}
			if !thinFirst {
				legs[0], legs[1] = legs[1], legs[0]
			}
			cuts := underAWriter(t, s, asItIs, legs...)
			oneInstant(t, s, cuts, legs...)
			for _, res := range cuts {
				itself := 0
				for _, f := range res.Frozen {
					if f.Itself {
						itself++
					}
				}
				if len(res.Frozen) != 2 || len(res.Crash)+len(res.Separate) > 0 || (itself == 1) == s.nests || itself > 1 {
					t.Errorf("%+v", res)
				}
				if s.nests && len(res.Unverified) > 0 || !s.nests && !strings.Contains(strings.Join(res.Unverified, ";"), "its backend froze it") {
					t.Errorf("not verifiable: %q", res.Unverified)
				}
			}
		})
	}
}

// What was written just before is in the snapshot, though nobody synced it: of each type of filesystem, on every kernel,
// whoever freezes it, without the replay of a log.
func TestEachType(t *testing.T) {
	s := newSite(t)
	for fstype, options := range map[string]string{"ext4": "noload", "xfs": "norecovery", "f2fs": "norecovery", "btrfs": "rescue=nologreplay"} {
		l := s.volume(t, fstype, fstype)
		must(t, os.WriteFile(filepath.Join(l.Mount, "before"), []byte("written before"), 0o600))
		res, err := s.make(t, request("cut-"+fstype, l))
		if err != nil {
			t.Errorf("%s: %v", fstype, err)
			continue
		}
		if itself := fstype != "btrfs" && !s.nests; len(res.Frozen) != 1 || res.Frozen[0].Itself != itself {
			t.Errorf("%s: %+v, want frozen by its backend: %v", fstype, res, itself)
		}
		must(t, l.Down()) // two of one UUID cannot be mounted
		at := s.mounted(t, l, res.Snapshots[0], options)
		if text, err := os.ReadFile(filepath.Join(at, "before")); err != nil || string(text) != "written before" {
			t.Errorf("%s: in the snapshot: %q, %v", fstype, text, err)
		}
		must(t, unix.Unmount(at, 0))
		must(t, l.Up())
	}
}

// mounted is a thin snapshot, mounted read-only.
func (s *site) mounted(t *testing.T, l leg, handle, options string) string {
	t.Helper()
	at, err := os.MkdirTemp(s.Dir, "snapshot-")
	must(t, err)
	must(t, unix.Mount(l.activated(t, l.resolve(t, handle)), at, l.Type, unix.MS_RDONLY, options))
	return at
}

// btrfs is frozen by us on every kernel: with another thin volume, whoever freezes that, it is one instant.
func TestBtrfs(t *testing.T) {
	s := newSite(t)
	a, b := s.volume(t, "a", "btrfs"), s.volume(t, "b", "xfs")
	cuts := underAWriter(t, s, asItIs, a, b)
	must(t, a.Down()) // two of one UUID cannot be mounted
	for _, res := range cuts {
		if len(res.Unverified) > 1 || (len(res.Unverified) == 0) != s.nests { // what device-mapper freezes cannot be verified
			t.Errorf("not verifiable: %q", res.Unverified)
		}
		other, err := s.MountCopy(t.Context(), b.Type, s.image(t, b, res.Snapshots[1]))
		must(t, err)
		at := s.mounted(t, a, res.Snapshots[0], "rescue=nologreplay")
		last, err := lab.Instant([]string{at, other.Mount})
		if err != nil {
			t.Error(err)
		}
		t.Logf("%s: the writer was at %v", res.Name, last)
		must(t, errors.Join(unix.Unmount(at, 0), other.Down()))
	}
}
