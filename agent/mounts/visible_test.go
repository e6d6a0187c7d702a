package mounts

import (
	"errors"
	"testing"

	"stillpoint.io/stillpoint/fault"
)

// stacked makes a table with one filesystem a mount, of the type given, numbered 1, 2, …; the ID of a mount is its
// filesystem's minor number.
func stacked(mounts ...struct {
	fstype string
	parent int
	point  string
}) Table {
	var filesystems []Filesystem
	for i, m := range mounts {
		filesystems = append(filesystems, Filesystem{
			ID: MakeDevice(8, uint32(i+1)), Type: m.fstype,
			Mounts: []Mount{{ID: i + 1, Parent: m.parent, Root: "/", Point: m.point}},
		})
	}
	return New(filesystems, nil)
}

type at = struct {
	fstype string
	parent int
	point  string
}

func TestAtFindsTheVisibleMount(t *testing.T) {
	n := stacked(
		at{"ext4", 0, "/"},     // 1
		at{"ext4", 1, "/a"},    // 2
		at{"xfs", 2, "/a/b"},   // 3
		at{"xfs", 1, "/c/d"},   // 4: covered by 5
		at{"tmpfs", 1, "/c"},   // 5
		at{"xfs", 2, "/a"},     // 6: covers 2, and 3 with it
		at{"xfs", 6, "/a/e"},   // 7
		at{"xfs", 1, "/a b"},   // 8
		at{"xfs", 7, "/a/e"},   // 9: covers 7
		at{"xfs", 10, "/loop"}, // 10: its own parent, as the first mount of a namespace may be
	)
	for path, want := range map[string]int{
		"/": 1, "": 1, "/x/y": 1, "/a": 6, "/a/": 6, "/a/b": 6, "/a/b/c": 6, "/c": 5, "/c/d/e": 5, "/a/e": 9, "/a/e/f": 9,
		"/a b": 8, "/a b/c": 8, "/ab": 1, "/a/../c/./d": 5, "/loop": 1,
	} {
		if m, ok := n.At(path); !ok || m.ID != want {
			t.Errorf("at %q: mount %d, want %d", path, m.ID, want)
		}
	}
	if _, ok := (Table{}).At("/"); ok {
		t.Error("an empty table has a mount")
	}
	for id, want := range map[uint32]error{1: nil, 2: fault.Unsupported, 3: fault.Unsupported, 4: fault.Unsupported, 5: nil,
		6: nil, 7: fault.Unsupported, 9: nil, 99: fault.NotFound} {
		if _, err := n.OpenAt(MakeDevice(8, id)); !errors.Is(err, want) {
			t.Errorf("opening %d: %v, want %v", id, err, want)
		}
	}
}

func TestTheRootItselfCanBeCovered(t *testing.T) {
	n := stacked(at{"rootfs", 0, "/"}, at{"ext4", 1, "/"}, at{"xfs", 2, "/a"}, at{"xfs", 1, "/b"})
	for path, want := range map[string]int{"/": 2, "/a": 3, "/b": 2} {
		if m, _ := n.At(path); m.ID != want {
			t.Errorf("at %q: mount %d, want %d", path, m.ID, want)
		}
	}
	if root, _ := n.Root(); root.ID != MakeDevice(8, 2) {
		t.Errorf("root: %v", root)
	}
}

func TestNothingRemoteIsCrossed(t *testing.T) {
	for _, fstype := range []string{"nfs", "nfs4", "cifs", "smb3", "ceph", "9p", "virtiofs", "fuse", "fuseblk", "fuse.sshfs", "autofs", "glusterfs", "something-new"} {
		n := stacked(at{"ext4", 0, "/"}, at{fstype, 1, "/r"}, at{"ext4", 2, "/r/vol"}, at{"xfs", 3, "/r/vol/in"})
		for id := range 3 {
			if _, err := n.OpenAt(MakeDevice(8, uint32(id+2))); !errors.Is(err, fault.Unsupported) {
				t.Errorf("%s: mount %d: %v", fstype, id+2, err)
			}
		}
		if n.touchable("/r") || n.touchable("/r/x") || n.touchable("/r/vol/x") || !n.touchable("/rr") {
			t.Errorf("%s: touchable", fstype)
		}
	}
	// A node that lives on NFS still opens what is mounted on it, though not the root itself.
	n := stacked(at{"nfs4", 0, "/"}, at{"ext4", 1, "/vol"})
	if _, err := n.OpenAt(MakeDevice(8, 2)); err != nil {
		t.Error(err)
	}
	if n.touchable("/etc") || !n.touchable("/vol/x") {
		t.Error("root on NFS: touchable")
	}
}

func TestOpenAtPrefersTheWholeFilesystem(t *testing.T) {
	n := node1()
	m, err := n.OpenAt(upperExt4)
	if err != nil || m.Point != "/vol" {
		t.Errorf("got %+v, %v", m, err)
	}
	if m, err = n.OpenAt(btrfsSub); err != nil || m.Point != "/sub" {
		t.Errorf("only a subvolume is mounted: %+v, %v", m, err)
	}
}

func TestAnOverlayOnSomethingRemoteIsRemote(t *testing.T) {
	n := New([]Filesystem{
		{ID: vda1, Type: "ext4", Mounts: []Mount{{ID: 1, Point: "/"}}},
		{ID: MakeDevice(0, 2), Type: "overlay", Mounts: []Mount{{ID: 4, Parent: 1, Point: "/o2"}}, Layers: []Layer{{Role: Lower, Path: "/o1/x"}}},
		{ID: MakeDevice(0, 1), Type: "overlay", Mounts: []Mount{{ID: 3, Parent: 1, Point: "/o1"}}, Layers: []Layer{{Role: Lower, Path: "/nfs/x"}}},
		{ID: MakeDevice(0, 3), Type: "overlay", Mounts: []Mount{{ID: 5, Parent: 1, Point: "/o3"}}, Layers: []Layer{{Role: Upper, Path: "/o3/x"}, {Role: Lower, Path: "rel"}}},
		{ID: nfs, Type: "nfs", Mounts: []Mount{{ID: 2, Parent: 1, Point: "/nfs"}}},
	}, nil)
	for minor, want := range map[uint32]bool{1: true, 2: true, 3: false} {
		if f, _ := n.Filesystem(MakeDevice(0, minor)); f.Remote != want {
			t.Errorf("overlay %d: remote %v", minor, f.Remote)
		}
	}
	if f, _ := n.Filesystem(MakeDevice(0, 3)); f.Layers[0].Filesystem != 0 || f.Layers[1].Filesystem != 0 {
		t.Errorf("an overlay on itself, or on a relative path: %+v", f.Layers)
	}
}

func TestNested(t *testing.T) {
	n := node1()
	nested := n.Nested(upperExt4)
	if len(nested) != 1 || nested[0].Point != "/vol/inner" {
		t.Errorf("got %+v", nested)
	}
	if all := n.Nested(vda1); len(all) != 7 || all[0].ID != 11 || all[6].ID != 17 {
		t.Errorf("on the root: %+v", all)
	}
	if none := n.Nested(loop3); none != nil {
		t.Errorf("got %+v", none)
	}
}
