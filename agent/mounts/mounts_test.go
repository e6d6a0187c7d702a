package mounts

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"stillpoint.io/stillpoint/fault"
)

// The made-up node of these tests: a disk with two partitions, root on the first; on the second, with another disk, a
// striped volume that carries an XFS pool; in the pool two files behind loop devices with an ext4 and a btrfs of two
// devices; in the ext4 another file with an XFS; an overlay whose upper folder is on the ext4.
var (
	vda, vda1, vda2, vdb = MakeDevice(254, 0), MakeDevice(254, 1), MakeDevice(254, 2), MakeDevice(254, 16)
	dm0                  = MakeDevice(253, 0)
	loop0, loop1         = MakeDevice(7, 0), MakeDevice(7, 1)
	loop2, loop3         = MakeDevice(7, 2), MakeDevice(7, 3)
	btrfs, btrfsSub      = MakeDevice(0, 40), MakeDevice(0, 41)
	overlay, nfs         = MakeDevice(0, 50), MakeDevice(0, 60)
	pool, upperExt4      = dm0, loop0
)

func node1() Table {
	return New([]Filesystem{
		{ID: vda1, Type: "ext4", Mounts: []Mount{{ID: 10, Parent: 1, Root: "/", Point: "/"}}},
		{ID: pool, Type: "xfs", Mounts: []Mount{{ID: 11, Parent: 10, Root: "/", Point: "/pool"}}},
		{ID: upperExt4, Type: "ext4", Mounts: []Mount{
			{ID: 12, Parent: 10, Root: "/dir", Point: "/bind"},
			{ID: 13, Parent: 10, Root: "/", Point: "/vol"},
		}},
		{ID: btrfs, Type: "btrfs", Members: []Device{loop1, loop2}, Stats: []Device{btrfsSub}, Mounts: []Mount{
			{ID: 14, Parent: 10, Root: "/sub", Point: "/sub"},
		}},
		{ID: loop3, Type: "xfs", Mounts: []Mount{{ID: 15, Parent: 13, Root: "/", Point: "/vol/inner"}}},
		{ID: overlay, Type: "overlay", Mounts: []Mount{{ID: 16, Parent: 10, Root: "/", Point: "/merged"}}, Layers: []Layer{
			{Role: Upper, Path: "/vol/upper"}, {Role: Work, Path: "/vol/work"}, {Role: Lower, Path: "/usr"},
		}},
		{ID: nfs, Type: "nfs4", Mounts: []Mount{{ID: 17, Parent: 10, Root: "/", Point: "/nfs"}}},
	}, []BlockDevice{
		{ID: vda, Name: "vda"},
		{ID: vda1, Name: "vda1", Below: []Device{vda}, Partition: true},
		{ID: vda2, Name: "vda2", Below: []Device{vda}, Partition: true},
		{ID: vdb, Name: "vdb"},
		{ID: dm0, Name: "dm-0", Below: []Device{vda2, vdb}},
		{ID: loop0, Name: "loop0", Backing: &Backing{Path: "/pool/a", Filesystem: pool}},
		{ID: loop1, Name: "loop1", Backing: &Backing{Path: "/pool/b", Filesystem: pool}},
		{ID: loop2, Name: "loop2", Backing: &Backing{Path: "/pool/c", Filesystem: pool}},
		{ID: loop3, Name: "loop3", Backing: &Backing{Path: "/vol/d", Filesystem: upperExt4}},
	})
}

func ids(filesystems []Filesystem) (list []Device) {
	for _, f := range filesystems {
		list = append(list, f.ID)
	}
	return list
}

func same(t *testing.T, what string, got, want []Device) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Errorf("%s: got %v, want %v", what, got, want)
	}
}

func TestFilesystemIsFoundByItsNumberAndBySubvolumes(t *testing.T) {
	n := node1()
	for _, id := range []Device{btrfs, btrfsSub} {
		if f, ok := n.Filesystem(id); !ok || f.ID != btrfs {
			t.Errorf("%s: got %v", id, f)
		}
	}
	if _, ok := n.Filesystem(MakeDevice(9, 9)); ok {
		t.Error("found a filesystem that is not there")
	}
	if root, ok := n.Root(); !ok || root.ID != vda1 {
		t.Errorf("root: %v", root)
	}
	if f, _ := n.Filesystem(pool); !slices.Equal(f.Members, []Device{dm0}) || f.Mounts[0].Filesystem != pool {
		t.Errorf("not completed: %+v", f)
	}
	if s := upperExt4.String(); s != "7:0" {
		t.Errorf("device in words: %s", s)
	}
	var none Table
	if _, ok := none.Root(); ok {
		t.Error("the zero table has a root")
	}
}

func TestOnFindsAllThatStandsOnADeviceUpperFirst(t *testing.T) {
	n := node1()
	for _, c := range []struct {
		device Device
		want   []Device
	}{
		{loop3, []Device{loop3}},
		{loop0, []Device{overlay, loop3, upperExt4}},
		{loop1, []Device{btrfs}},
		{dm0, []Device{btrfs, overlay, loop3, upperExt4, pool}},
		{vdb, []Device{btrfs, overlay, loop3, upperExt4, pool}},
		{vda1, []Device{overlay, vda1}}, // its lower folder
		{MakeDevice(9, 9), nil},
	} {
		got, err := n.On(c.device)
		if err != nil {
			t.Fatal(err)
		}
		slices.Sort(c.want)
		list := ids(got)
		slices.Sort(list)
		same(t, "on "+c.device.String(), list, c.want)
		upperFirst(t, n, got)
	}
	same(t, "devices on vda", n.DevicesOn(vda), []Device{dm0, vda, vda1, vda2})
}

// upperFirst checks an order against Under, which is checked by itself.
func upperFirst(t *testing.T, n Table, order []Filesystem) {
	t.Helper()
	for i, f := range order {
		u, err := n.Under(f.ID)
		if err != nil {
			t.Fatal(err)
		}
		for _, earlier := range order[:i] {
			if slices.Contains(u.Filesystems, earlier.ID) {
				t.Errorf("%s comes before %s, which stands on it", earlier, f)
			}
		}
	}
}

func TestUnder(t *testing.T) {
	n := node1()
	u, err := n.Under(loop3)
	if err != nil {
		t.Fatal(err)
	}
	same(t, "filesystems under", u.Filesystems, []Device{upperExt4, pool})
	same(t, "devices under", u.Devices, []Device{loop3, loop0, dm0, vdb, vda2, vda})
	if u.Unknown != nil {
		t.Errorf("unknown: %v", u.Unknown)
	}
	if u, _ = n.Under(btrfsSub); !slices.Equal(u.Filesystems, []Device{pool}) {
		t.Errorf("by a subvolume's number: %v", u)
	}
	if _, err := n.Under(MakeDevice(9, 9)); !errors.Is(err, fault.NotFound) {
		t.Errorf("not there: %v", err)
	}
}

func TestUnderSaysWhatIsNotKnown(t *testing.T) {
	n := New([]Filesystem{
		{ID: loop0, Type: "ext4", Unknown: "external journal"},
		{ID: btrfs, Type: "btrfs", Members: []Device{MakeDevice(8, 0)}},
	}, []BlockDevice{{ID: loop0, Name: "loop0", Backing: &Backing{Unknown: "nobody knows"}}})
	u, err := n.Under(loop0)
	if err != nil || len(u.Unknown) != 2 {
		t.Errorf("got %v, %v", u, err)
	}
	if u, _ = n.Under(btrfs); len(u.Unknown) != 1 {
		t.Errorf("a member that sysfs lacks: %v", u)
	}
	same(t, "uncovered, not knowing", n.Uncovered(loop0, MakeDevice(9, 9)), []Device{loop0})
}

func TestUncovered(t *testing.T) {
	n := node1()
	for _, c := range []struct {
		what    string
		fs      Device
		devices []Device
		want    []Device
	}{
		{"its own device", loop0, []Device{loop0}, nil},
		{"one of two", btrfs, []Device{loop1}, []Device{loop2}},
		{"both", btrfs, []Device{loop2, loop1}, nil},
		{"the disk of the partition", vda1, []Device{vda}, nil},
		{"one half of the stripes", pool, []Device{vdb}, []Device{dm0}},
		{"both halves, one as a whole disk", pool, []Device{vdb, vda}, nil},
		{"the device under the pool", loop3, []Device{dm0}, nil},
		{"half the device under the pool", loop3, []Device{vda}, []Device{loop3}},
		{"a partition beside", vda1, []Device{vda2}, []Device{vda1}},
		{"nothing", btrfs, nil, []Device{loop1, loop2}},
	} {
		same(t, c.what, n.Uncovered(c.fs, c.devices...), c.want)
	}
}

func TestOrderDependsOnTheSetOnly(t *testing.T) {
	n := node1()
	all := []Device{vda1, pool, upperExt4, btrfs, loop3, overlay}
	want, err := n.Order(all...)
	if err != nil {
		t.Fatal(err)
	}
	upperFirst(t, n, want)
	r := rand.New(rand.NewPCG(1, 2))
	for range 50 {
		r.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
		got, err := n.Order(append(all, all[0])...) // twice is once
		if err != nil {
			t.Fatal(err)
		}
		same(t, "shuffled", ids(got), ids(want))
	}
	if _, err := n.Order(pool, MakeDevice(9, 9)); !errors.Is(err, fault.NotFound) {
		t.Errorf("not there: %v", err)
	}
}

func TestOrderOfRandomStacks(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	for range 100 {
		var filesystems []Filesystem
		var devices []BlockDevice
		var all []Device
		for i := range 30 {
			id := MakeDevice(7, uint32(r.IntN(1000)*30+i))
			d := BlockDevice{ID: id, Name: fmt.Sprint("loop", i)}
			if i > 0 && r.IntN(4) > 0 {
				if r.IntN(2) == 0 {
					d.Backing = &Backing{Filesystem: all[r.IntN(i)]}
				} else {
					d.Below = []Device{all[r.IntN(i)], all[r.IntN(i)]}
				}
			}
			all = append(all, id)
			devices = append(devices, d)
			filesystems = append(filesystems, Filesystem{ID: id, Type: "xfs"})
		}
		n := New(filesystems, devices)
		some := slices.Clone(all)
		r.Shuffle(len(some), func(i, j int) { some[i], some[j] = some[j], some[i] })
		order, err := n.Order(some[:20]...)
		if err != nil {
			t.Fatal(err)
		}
		upperFirst(t, n, order)
	}
}

func TestACircleIsAnError(t *testing.T) {
	n := New([]Filesystem{
		{ID: loop0, Type: "ext4", Mounts: []Mount{{ID: 1, Point: "/"}}},
		{ID: loop1, Type: "xfs"},
	}, []BlockDevice{
		{ID: loop0, Name: "loop0", Backing: &Backing{Filesystem: loop1}},
		{ID: loop1, Name: "loop1", Backing: &Backing{Filesystem: loop0}},
	})
	_, err := n.Order(loop0)
	if !errors.Is(err, fault.Invalid) {
		t.Fatalf("got %v", err)
	}
	const want = "filesystems stand on themselves, so they have no order: ext4 / on loop0 on xfs 7:1 on loop1 on ext4 /"
	if err.Error() != want {
		t.Errorf("got %q", err)
	}
	if _, err := n.On(loop1); !errors.Is(err, fault.Invalid) {
		t.Errorf("On: %v", err)
	}
	if _, err := n.Under(loop1); !errors.Is(err, fault.Invalid) {
		t.Errorf("Under: %v", err)
	}
	same(t, "uncovered", n.Uncovered(loop0, vda), []Device{loop0})
}
