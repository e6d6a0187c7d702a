package cut

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/mounts"
	"stillpoint.io/stillpoint/fault"
)

// node is a made-up machine for plans: device numbers are written as "minor" of major 7 for loops and 8 for disks.
type machine struct {
	filesystems []mounts.Filesystem
	devices     []mounts.BlockDevice
	mountID     int
	volumes     []adapters.Volume // of the case at hand
}

func dev(n uint32) mounts.Device { return mounts.MakeDevice(8, n) }

// fs mounts a filesystem of a type on devices; the first device gives it its identity, as for all but btrfs.
func (m *machine) fs(fstype, point string, members ...mounts.Device) mounts.Device {
	m.mountID++
	parent := 1
	if m.mountID == 1 {
		parent = 0
	}
	m.filesystems = append(m.filesystems, mounts.Filesystem{
		ID: members[0], Type: fstype, Members: members,
		Mounts: []mounts.Mount{{ID: m.mountID, Parent: parent, Root: "/", Point: point}},
	})
	return members[0]
}

// disk adds a plain block device.
func (m *machine) disk(n uint32) mounts.Device {
	m.devices = append(m.devices, mounts.BlockDevice{ID: dev(n), Name: fmt.Sprintf("sd%d", n), Counted: true})
	return dev(n)
}

// loop adds a loop device whose file lies on a filesystem.
func (m *machine) loop(n uint32, on mounts.Device) mounts.Device {
	m.devices = append(m.devices, mounts.BlockDevice{ID: dev(n), Name: fmt.Sprintf("loop%d", n), Counted: true, Backing: &mounts.Backing{Path: "/pool/f", Filesystem: on}})
	return dev(n)
}

func (m *machine) facts() facts {
	f := facts{table: mounts.New(m.filesystems, m.devices), hidden: map[adapters.VolumeID][]mounts.Device{}, open: map[adapters.VolumeID]bool{}, refused: map[mounts.Device]string{}}
	if root, ok := f.table.Root(); ok {
		f.refused[root.ID] = "it is the root"
	}
	return f
}

func newMachine() *machine {
	m := &machine{}
	m.fs("ext4", "/", m.disk(0))
	return m
}

func volume(name string, on mounts.Device) adapters.Volume {
	return adapters.Volume{ID: adapters.VolumeID{Backend: "b", ID: name}, Size: 1 << 30, Device: adapters.Device(on), Path: "/dev/" + name}
}

func planned(t *testing.T, f facts, allow bool, volumes ...adapters.Volume) Plan {
	t.Helper()
	p, err := makePlan(Request{Name: "n", MaxFreeze: 10 * time.Second, AllowCrashConsistent: allow}, volumes, f)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// shape writes a plan's steps as "freeze a b; snapshot 0 1 | freeze c; snapshot 2".
func shape(p Plan) string {
	var steps []string
	for _, s := range p.Steps {
		line := "freeze"
		for _, f := range s.Freeze {
			line += " " + f.Filesystem
		}
		line += "; snapshot"
		for _, i := range s.Snapshot {
			line += fmt.Sprintf(" %d", i)
		}
		steps = append(steps, line)
	}
	return strings.Join(steps, " | ")
}

func TestPlanFreezesTheFilesystemsOnTheVolumesAndNotThePool(t *testing.T) {
	m := newMachine()
	pool := m.fs("xfs", "/pool", m.disk(1))
	a, b := m.loop(2, pool), m.loop(3, pool)
	m.fs("ext4", "/a", a)
	m.fs("xfs", "/b", b)
	va, vb := volume("a", a), volume("b", b)
	va.WritesTo, vb.WritesTo = adapters.Device(pool), adapters.Device(pool)
	p := planned(t, m.facts(), false, va, vb)
	if got, want := shape(p), "freeze /b /a; snapshot 0 1"; got != want && got != "freeze /a /b; snapshot 0 1" {
		t.Errorf("plan %q, want %q", got, want)
	}
	for _, mb := range p.Members {
		if mb.Consistency != adapters.FilesystemConsistent || len(mb.Why) > 0 {
			t.Errorf("%+v", mb)
		}
	}
}

// The pool's own device is in the cut too: freeze upper, clone, then freeze and snapshot the lower.
func TestPlanSnapshotsIntoAPoolBeforeFreezingIt(t *testing.T) {
	m := newMachine()
	disk := m.disk(1)
	pool := m.fs("xfs", "/pool", disk)
	a := m.loop(2, pool)
	m.fs("ext4", "/a", a)
	upper, lower := volume("a", a), volume("disk", disk)
	upper.WritesTo = adapters.Device(pool)
	if got, want := shape(planned(t, m.facts(), false, lower, upper)), "freeze /a; snapshot 1 | freeze /pool; snapshot 0"; got != want {
		t.Errorf("plan %q, want %q", got, want)
	}
}

// A filesystem on a file on a frozen filesystem freezes first, even when only the lower volume was asked for:
// the reverse order would deadlock, and its dirty pages would be missing below.
func TestPlanFreezesWhatIsStackedOnAVolumeFirst(t *testing.T) {
	m := newMachine()
	disk := m.disk(1)
	lower := m.fs("xfs", "/lower", disk)
	m.fs("ext4", "/upper", m.loop(2, lower))
	if got, want := shape(planned(t, m.facts(), false, volume("disk", disk))), "freeze /upper /lower; snapshot 0"; got != want {
		t.Errorf("plan %q, want %q", got, want)
	}
}

func TestPlanRefusesASnapshotThatWritesToItsOwnVolume(t *testing.T) {
	m := newMachine()
	disk := m.disk(1)
	fs := m.fs("xfs", "/x", disk)
	v := volume("disk", disk)
	v.WritesTo = adapters.Device(fs)
	_, err := makePlan(Request{Name: "n", MaxFreeze: time.Second}, []adapters.Volume{v}, m.facts())
	if fault.KindOf(err) != fault.Invalid {
		t.Errorf("error %v", err)
	}
}

// Each of these cannot be frozen: the cut fails and says why, or is allowed and the reason recorded.
func TestPlanNamesWhatCannotBeFrozen(t *testing.T) {
	raid := func(m *machine) mounts.Device {
		a, b := m.disk(1), m.disk(2)
		m.fs("btrfs", "/wide", a, b)
		return a
	}
	for _, c := range []struct {
		name string
		make func(*machine) (adapters.Volume, facts)
		says string
	}{
		{"root", func(m *machine) (adapters.Volume, facts) { return volume("v", dev(0)), m.facts() }, "it is the root"},
		{"vfat", func(m *machine) (adapters.Volume, facts) {
			d := m.disk(1)
			m.fs("vfat", "/v", d)
			return volume("v", d), m.facts()
		}, "of this type cannot be frozen"},
		{"member outside the cut", func(m *machine) (adapters.Volume, facts) { d := raid(m); return volume("v", d), m.facts() }, "also stands on /dev/sd2"},
		{"attached, not mounted", func(m *machine) (adapters.Volume, facts) { d := m.disk(1); return volume("v", d), m.facts() }, "attached but not mounted"},
		{"held unseen", func(m *machine) (adapters.Volume, facts) {
			d := m.disk(1)
			f := m.facts()
			v := volume("v", d)
			f.hidden[v.ID] = []mounts.Device{d}
			return v, f
		}, "something holds /dev/sd1"},
		{"file opened by a guest", func(m *machine) (adapters.Volume, facts) {
			f := m.facts()
			v := volume("v", 0)
			f.open[v.ID] = true
			return v, f
		}, "a process has it open"},
		{"attached elsewhere", func(m *machine) (adapters.Volume, facts) {
			v := volume("v", 0)
			v.Path = ""
			return v, m.facts()
		}, "not attached to this node"},
		{"guest", func(m *machine) (adapters.Volume, facts) {
			v := volume("v", m.disk(1))
			v.Freeze = adapters.FreezeNone
			return v, m.facts()
		}, "cannot be frozen from this node"},
		{"refused", func(m *machine) (adapters.Volume, facts) {
			d := m.disk(1)
			fs := m.fs("xfs", "/var/log", d)
			f := m.facts()
			f.refused[fs] = "/var/log lies on it"
			return volume("v", d), f
		}, "/var/log lies on it"},
		{"over-mounted", func(m *machine) (adapters.Volume, facts) {
			d := m.disk(1)
			m.fs("xfs", "/v", d)
			m.fs("ext4", "/v", m.disk(2))
			m.filesystems[len(m.filesystems)-1].Mounts[0].Parent = m.mountID - 1
			return volume("v", d), m.facts()
		}, "covered by another"},
	} {
		t.Run(c.name, func(t *testing.T) {
			v, f := c.make(newMachine())
			_, err := makePlan(Request{Name: "n", MaxFreeze: time.Second}, []adapters.Volume{v}, f)
			if fault.KindOf(err) != fault.Unsupported || !strings.Contains(fmt.Sprint(err), c.says) || !strings.Contains(fmt.Sprint(err), "--allow-crash-consistent") {
				t.Errorf("error %v, want one that says %q and the remedy", err, c.says)
			}
			p := planned(t, f, true, v)
			if m := p.Members[0]; m.Consistency != adapters.CrashConsistent || !strings.Contains(strings.Join(m.Why, ";"), c.says) {
				t.Errorf("allowed, it was recorded as %+v", m)
			}
			if len(p.frozen()) != 0 || !slices.Equal(p.Steps[0].Snapshot, []int{0}) {
				t.Errorf("allowed, the plan is %q", shape(p))
			}
		})
	}
}

func TestPlanTakesAMultiDeviceFilesystemWholeInTheCut(t *testing.T) {
	m := newMachine()
	a, b := m.disk(1), m.disk(2)
	m.fs("btrfs", "/wide", a, b)
	if got, want := shape(planned(t, m.facts(), false, volume("a", a), volume("b", b))), "freeze /wide; snapshot 0 1"; got != want {
		t.Errorf("plan %q, want %q: one superblock once", got, want)
	}
}

func TestPlanLeavesWhatIsAtRestOrReadOnly(t *testing.T) {
	m := newMachine()
	d := m.disk(1)
	m.fs("xfs", "/ro", d)
	m.filesystems[len(m.filesystems)-1].ReadOnly = true
	p := planned(t, m.facts(), false, volume("file", 0), volume("ro", d))
	if got, want := shape(p), "freeze; snapshot 0 1"; got != want {
		t.Errorf("plan %q, want %q", got, want)
	}
}

// The same request on the same facts is the same plan, whatever the order of the machine's tables: verify compares.
func TestPlanIsDeterministic(t *testing.T) {
	m := newMachine()
	var volumes []adapters.Volume
	for i := range uint32(12) {
		d := m.disk(i + 1)
		m.fs("xfs", fmt.Sprintf("/m%d", i), d)
		volumes = append(volumes, volume(fmt.Sprint(i), d))
	}
	want := planned(t, m.facts(), false, volumes...).String()
	for range 20 {
		slices.Reverse(m.devices)
		if got := planned(t, m.facts(), false, volumes...).String(); got != want {
			t.Fatalf("plans differ:\n%s\n%s", got, want)
		}
	}
}
