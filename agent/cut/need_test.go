package cut

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/mounts"
	"stillpoint.io/stillpoint/fault"
)

// self is a volume whose backend freezes it and fails under our freeze, as LVM does on older kernels.
func self(name string, on mounts.Device) adapters.Volume {
	v := volume(name, on)
	v.Freeze = adapters.FreezeSelf
	return v
}

// tree is a folder in a pool.
func tree(name string, pool mounts.Device) adapters.Volume {
	return adapters.Volume{ID: adapters.VolumeID{Backend: "b", ID: name}, Form: adapters.TreeForm, Freeze: adapters.FreezeSelf, WritesTo: adapters.Device(pool), Path: "/pool/" + name}
}

// over adds a device that stands on another one, as an encrypted one does.
func (m *machine) over(n uint32, below mounts.Device) mounts.Device {
	d := m.disk(n)
	m.devices[len(m.devices)-1].Below = []mounts.Device{below}
	return d
}

// Exactly one such volume is in a cut that is one instant: it is not frozen by us, everything else is, and its snapshot
// is with the last step.
func TestPlanLetsOneVolumeFreezeItself(t *testing.T) {
	for _, c := range []struct {
		name, want, itself string
		volumes            func(*machine) []adapters.Volume
	}{
		{"alone", "freeze; snapshot 0", "/a", func(m *machine) []adapters.Volume {
			a := m.disk(1)
			m.fs("xfs", "/a", a)
			return []adapters.Volume{self("a", a)}
		}},
		{"among others", "freeze /b; snapshot 0 1", "/a", func(m *machine) []adapters.Volume {
			a, b := m.disk(1), m.disk(2)
			m.fs("f2fs", "/a", a)
			m.fs("ext4", "/b", b)
			return []adapters.Volume{self("a", a), volume("b", b)}
		}},
		{"btrfs is not frozen by device-mapper", "freeze /b; snapshot 0 1", "/a", func(m *machine) []adapters.Volume {
			a, b := m.disk(1), m.disk(2)
			m.fs("ext4", "/a", a)
			m.fs("btrfs", "/b", b)
			return []adapters.Volume{self("a", a), self("b", b)}
		}},
		{"nor is what is encrypted on it", "freeze /b; snapshot 0 1", "/a", func(m *machine) []adapters.Volume {
			a, b := m.disk(1), m.disk(2)
			m.fs("ext4", "/a", a)
			m.fs("ext4", "/b", m.over(3, b))
			return []adapters.Volume{self("a", a), self("b", b)}
		}},
		{"or in a file on it", "freeze /upper; snapshot 0", "/a", func(m *machine) []adapters.Volume {
			a := m.disk(1)
			m.fs("ext4", "/upper", m.loop(2, m.fs("xfs", "/a", a)))
			return []adapters.Volume{self("a", a)}
		}},
		{"a clone into the pool that is on it comes first", "freeze /upper; snapshot 1 | freeze; snapshot 0", "/pool", func(m *machine) []adapters.Volume {
			a := m.disk(1)
			pool := m.fs("xfs", "/pool", a)
			file := m.loop(2, pool)
			m.fs("ext4", "/upper", file)
			upper := volume("upper", file)
			upper.WritesTo = adapters.Device(pool)
			return []adapters.Volume{self("a", a), upper}
		}},
		{"what is read-only needs nobody", "freeze; snapshot 0 1", "/b", func(m *machine) []adapters.Volume {
			a, b := m.disk(1), m.disk(2)
			m.fs("xfs", "/a", a)
			m.filesystems[len(m.filesystems)-1].ReadOnly = true
			m.fs("xfs", "/b", b)
			return []adapters.Volume{self("a", a), self("b", b)}
		}},
		{"a folder", "freeze /b; snapshot 0 1", "", func(m *machine) []adapters.Volume {
			pool, b := m.fs("btrfs", "/pool", m.disk(1)), m.disk(2)
			m.fs("ext4", "/b", b)
			return []adapters.Volume{tree("tree", pool), volume("b", b)}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := newMachine()
			p := planned(t, m.with(c.volumes), false, m.volumes...)
			if got := shape(p); got != c.want {
				t.Errorf("plan %q, want %q", got, c.want)
			}
			var itself []string
			for _, mb := range p.Members {
				if mb.Consistency != adapters.FilesystemConsistent || len(mb.Why) > 0 {
					t.Errorf("%+v", mb)
				}
				for _, f := range mb.Itself {
					itself = append(itself, f.Filesystem)
				}
			}
			if got := strings.Join(itself, " "); got != c.itself {
				t.Errorf("freezing themselves: %q, want %q", got, c.itself)
			}
			if n := len(p.flushed()) - len(p.frozen()); n != len(itself) {
				t.Errorf("%d of those that freeze themselves are flushed before, want %d", n, len(itself))
			}
		})
	}
}

// with lets a case furnish the machine.
func (m *machine) with(make func(*machine) []adapters.Volume) facts {
	m.volumes = make(m)
	return m.facts()
}

// Two such volumes have two instants: the error names both and what to do; allowed, the second is marked.
func TestPlanRefusesTwoVolumesThatFreezeThemselves(t *testing.T) {
	lvs := func(m *machine) []adapters.Volume {
		a, b, c := m.disk(1), m.disk(2), m.disk(3)
		m.fs("xfs", "/a", a)
		m.fs("ext4", "/b", b)
		m.fs("ext4", "/c", c)
		return []adapters.Volume{volume("c", c), self("a", a), self("b", b)}
	}
	trees := func(m *machine) []adapters.Volume {
		pool, c := m.fs("btrfs", "/pool", m.disk(1)), m.disk(2)
		m.fs("ext4", "/c", c)
		return []adapters.Volume{volume("c", c), tree("a", pool), tree("b", pool)}
	}
	for name, c := range map[string]struct {
		make  func(*machine) []adapters.Volume
		shape string
		says  []string
	}{
		"thin volumes": {lvs, "freeze /c; snapshot 0 1 2", []string{"b:a", "b:b", "EBUSY", "6.1", "one at a time", "--allow-separate-instants"}},
		"folders":      {trees, "freeze /c; snapshot 0 1 2", []string{"b:a", "b:b", "an instant of its own", "--allow-separate-instants"}},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine()
			f := m.with(c.make)
			r := Request{Name: "n", MaxFreeze: time.Second, AllowCrashConsistent: true} // which is something else
			_, err := makePlan(r, m.volumes, f)
			if !errors.Is(err, fault.Unsupported) {
				t.Fatalf("error %v", err)
			}
			for _, s := range c.says {
				if !strings.Contains(err.Error(), s) {
					t.Errorf("it does not say %q: %v", s, err)
				}
			}
			r = Request{Name: "n", MaxFreeze: time.Second, AllowSeparateInstants: true}
			p, err := makePlan(r, m.volumes, f)
			if err != nil {
				t.Fatal(err)
			}
			if got := shape(p); got != c.shape {
				t.Errorf("plan %q, want %q", got, c.shape)
			}
			want := []adapters.Consistency{adapters.FilesystemConsistent, adapters.FilesystemConsistent, adapters.VolumeConsistent}
			for i, mb := range p.Members {
				if mb.Consistency != want[i] || (mb.Consistency == adapters.VolumeConsistent) != (len(mb.Why) > 0) {
					t.Errorf("%+v, want %s", mb, want[i])
				}
			}
		})
	}
}

// A filesystem that a backend must find unfrozen, and that must be frozen for another volume's snapshot.
func TestPlanRefusesContradictions(t *testing.T) {
	for name, make := range map[string]func(*machine) []adapters.Volume{
		"a journal on another volume": func(m *machine) []adapters.Volume {
			a, b := m.disk(1), m.disk(2)
			m.fs("ext4", "/a", a, b)
			return []adapters.Volume{self("a", a), self("b", b)}
		},
		"a volume in a file on another volume": func(m *machine) []adapters.Volume {
			lower := m.disk(1)
			upper := m.over(3, m.loop(2, m.fs("xfs", "/lower", lower)))
			m.fs("ext4", "/upper", upper)
			return []adapters.Volume{self("upper", upper), volume("lower", lower)}
		},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine()
			f := m.with(make)
			_, err := makePlan(Request{Name: "n", MaxFreeze: time.Second, AllowSeparateInstants: true}, m.volumes, f)
			if !errors.Is(err, fault.Unsupported) || !strings.Contains(fmt.Sprint(err), "must be frozen for the snapshot of") {
				t.Errorf("error %v", err)
			}
			p := planned(t, f, true, m.volumes...)
			for _, fz := range p.frozen() {
				for _, v := range m.volumes {
					if v.Freeze == adapters.FreezeSelf && fz.Device == mounts.Device(v.Device) {
						t.Errorf("allowed, the plan freezes %s, and the snapshot of %s would fail", fz.Filesystem, v.ID)
					}
				}
			}
		})
	}
}

// A folder's snapshot writes to its pool. With the pool's own volume in the cut that is frozen after it, and something
// can be written in between.
func TestPlanRefusesAFolderWithTheVolumeOfItsPool(t *testing.T) {
	m := newMachine()
	disk := m.disk(1)
	pool := m.fs("btrfs", "/pool", disk)
	_, err := makePlan(Request{Name: "n", MaxFreeze: time.Second}, []adapters.Volume{volume("disk", disk), tree("tree", pool)}, m.facts())
	if !errors.Is(err, fault.Invalid) || !strings.Contains(fmt.Sprint(err), "cut them apart") {
		t.Errorf("error %v", err)
	}
}

// What is never frozen is not left to a backend to freeze either.
func TestPlanRefusesToHaveTheRootFrozen(t *testing.T) {
	m := newMachine()
	_, err := makePlan(Request{Name: "n", MaxFreeze: time.Second}, []adapters.Volume{self("root", dev(0))}, m.facts())
	if !errors.Is(err, fault.Unsupported) || !strings.Contains(fmt.Sprint(err), "it is the root") {
		t.Errorf("error %v", err)
	}
}
