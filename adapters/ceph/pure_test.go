package ceph

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

func TestParseImageName(t *testing.T) {
	for _, c := range []struct {
		id, pool string
		want     imageName
	}{
		{"rbd/vm", "", imageName{"rbd", "", "vm"}},
		{"rbd/tenant/vm", "", imageName{"rbd", "tenant", "vm"}},
		{"vm", "rbd", imageName{"rbd", "", "vm"}},
		{"rbd/vm", "rbd", imageName{"rbd", "", "vm"}},
		{"rbd/a b~%ü", "", imageName{"rbd", "", "a b~%ü"}},
	} {
		n, err := parseImageName(c.id, c.pool)
		if err != nil || n != c.want {
			t.Errorf("%q in %q: %+v, %v", c.id, c.pool, n, err)
		}
		if again, err := parseImageName(n.String(), c.pool); err != nil || again != n {
			t.Errorf("%q is not canonical: %+v, %v", n, again, err)
		}
		if id := n.id("b"); id.Backend != "b" || id.ID != n.String() {
			t.Error(id)
		}
	}
	for _, c := range [][2]string{{"vm", ""}, {"other/vm", "rbd"}, {"", "rbd"}, {"rbd/" + targetPrefix + "x", ""}, {"a/b/c/d", ""}} {
		if n, err := parseImageName(c[0], c[1]); !errors.Is(err, fault.Invalid) {
			t.Errorf("%q in %q: %+v, %v", c[0], c[1], n, err)
		}
	}
}

func TestHiddenNames(t *testing.T) {
	n := imageName{"rbd", "tenant", "vm"}
	one, two := n.target("a"), n.target("b")
	if one == two || one != n.target("a") || one.pool != "rbd" || one.namespace != "tenant" || !strings.HasPrefix(one.image, targetPrefix) {
		t.Errorf("%v and %v", one, two)
	}
	if a, b := draftName("x"), draftName("x"); a == b || !isDraft(a) || isDraft("x") || isDraft(adapters.Name("snapshot-0b3ad2dc-2c15-4c1b-9a9c-7f2d3c1ad6f4")) {
		t.Errorf("%q and %q", a, b)
	}
}

func TestRecord(t *testing.T) {
	r := record{Image: "10b7", Wanted: "ü\n", Mark: adapters.Verified, Notes: adapters.Notes{Cut: "c", Unverified: []string{"x"}}}
	text, err := r.encode()
	if err != nil {
		t.Fatal(err)
	}
	again, ok := decodeRecord(text, "10b7")
	if r.Version = recordVersion; !ok || !reflect.DeepEqual(again, r) {
		t.Errorf("%+v, %v", again, ok)
	}
	for name, c := range map[string][2]string{
		"of the parent of a clone": {text, "10b8"},
		"of another version":       {strings.Replace(text, `"version":1`, `"version":2`, 1), "10b7"},
		"without a mark":           {strings.Replace(text, "verified", "other", 1), "10b7"},
		"without a name":           {`{"version":1,"image":"10b7","mark":"cutting"}`, "10b7"},
		"not JSON":                 {"verified", "10b7"},
		"empty":                    {"", ""},
	} {
		if r, ok := decodeRecord(c[0], c[1]); ok {
			t.Errorf("a record %s was read as %+v", name, r)
		}
	}
	r.Notes.Unverified = []string{strings.Repeat("x", recordMax)}
	if _, err := r.encode(); !errors.Is(err, fault.Invalid) {
		t.Errorf("a record that is too long: %v", err)
	}
	if recordKey(0x1f) != recordPrefix+"000000000000001f" {
		t.Error(recordKey(0x1f))
	}
}

func TestFound(t *testing.T) {
	now := time.Unix(1, 0)
	f := found{number: 7, name: "n", size: 512, created: now, mine: true, record: record{Wanted: "w", Mark: adapters.Cutting}}
	id := adapters.VolumeID{Backend: "b", ID: "p/i"}
	want := adapters.Snapshot{ID: adapters.SnapshotID{Volume: id, Name: "n"}, Wanted: "w", Size: 512, Created: now, State: adapters.Ready, Mark: adapters.Cutting}
	if s := f.snapshot(id); !reflect.DeepEqual(s, want) {
		t.Errorf("%+v", s)
	}
	verified, draft, foreign := f, f, f
	verified.record.Mark, draft.name, foreign.mine = adapters.Verified, draftName("n"), false
	for _, c := range []struct {
		f             found
		plain, asking bool
	}{{f, false, true}, {verified, true, true}, {draft, false, false}, {foreign, false, false}} {
		if c.f.passes(adapters.Filter{}) != c.plain || c.f.passes(adapters.Filter{Cutting: true}) != c.asking {
			t.Errorf("%+v", c.f)
		}
	}
}

func TestRestoring(t *testing.T) {
	r := restoring{Version: recordVersion, Volume: "p/i", Size: 1 << 40}
	if again, ok := decodeRestoring(r.encode()); !ok || again != r {
		t.Errorf("%+v, %v", again, ok)
	}
	if _, ok := decodeRestoring(""); ok {
		t.Error("nothing was read as a restore")
	}
}

func TestEncode(t *testing.T) {
	const zero = "\x00\x00\x00\x00"
	for _, c := range []struct {
		got  []byte
		want string
	}{
		{encodeMetadata("k", "vv"), "\x01\x00\x00\x00" + "\x01\x00\x00\x00k" + "\x02\x00\x00\x00vv"},
		{encodeLock("n", "co", 3*time.Second+5), "\x01\x01\x1d\x00\x00\x00" + "\x01\x00\x00\x00n" + "\x01" + "\x02\x00\x00\x00co" + zero + zero + "\x03\x00\x00\x00\x05\x00\x00\x00" + "\x00"},
		{encodeUnlock("n", "co"), "\x01\x01\x0b\x00\x00\x00" + "\x01\x00\x00\x00n" + "\x02\x00\x00\x00co"},
	} {
		if string(c.got) != c.want {
			t.Errorf("%q instead of %q", c.got, c.want)
		}
	}
}

// cephErrno is an error as Ceph's libraries give it.
type cephErrno int

func (e cephErrno) Error() string  { return fmt.Sprintf("ret=%d", int(e)) }
func (e cephErrno) ErrorCode() int { return int(e) }

func TestErrors(t *testing.T) {
	const limit = 10 * time.Second
	for _, c := range []struct {
		err  error
		took time.Duration
		want fault.Kind
	}{
		{cephErrno(-2), 0, fault.NotFound},
		{cephErrno(-16), 0, fault.Busy},
		{cephErrno(-30), 0, fault.Busy},
		{cephErrno(-110), 0, fault.Unavailable},
		{cephErrno(-108), 0, fault.Unavailable},
		{cephErrno(-28), 0, fault.Exhausted},
		{cephErrno(-122), 0, fault.Exhausted},
		{cephErrno(-1), 0, fault.Unsupported},
		{cephErrno(-95), 0, fault.Unsupported},
		{cephErrno(-22), 0, fault.Invalid},
		{cephErrno(-74), time.Second, fault.Corrupt},
		{cephErrno(-74), limit, fault.Unavailable}, // what a snapshot gives when the OSD does not answer
		{cephErrno(-5), time.Second, fault.Corrupt},
		{cephErrno(-12345), 0, fault.Internal},
		{errors.New("x"), 0, fault.Internal},
		{fault.Errorf(fault.Busy, "x: %w", cephErrno(-2)), 0, fault.Busy},
		{fmt.Errorf("x: %w", context.DeadlineExceeded), 0, fault.Unavailable},
	} {
		err := failed(c.err, c.took, limit, "volume %s", "v")
		if fault.KindOf(err) != c.want || !errors.Is(err, c.err) || !strings.HasPrefix(err.Error(), "volume v: ") {
			t.Errorf("%v after %v: %v (%v)", c.err, c.took, err, fault.KindOf(err))
		}
	}
	if errnoOf(fmt.Errorf("x: %w", cephErrno(-110))) != syscall.ETIMEDOUT || errnoOf(errors.New("x")) != 0 {
		t.Error("errnoOf")
	}
	if !isAbsent(cephErrno(-2)) || isAbsent(cephErrno(-1)) || isAbsent(nil) || !isForbidden(cephErrno(-13)) || !isForbidden(cephErrno(-1)) || isForbidden(nil) {
		t.Error("isAbsent or isForbidden")
	}
}

// TestMappings reads a folder in the form of the kernel's Documentation/ABI/testing/sysfs-bus-rbd: this needs no cluster.
func TestMappings(t *testing.T) {
	folder := t.TempDir()
	device := func(number string, values map[string]string) {
		if err := os.Mkdir(filepath.Join(folder, number), 0o755); err != nil {
			t.Fatal(err)
		}
		for file, value := range values {
			if err := os.WriteFile(filepath.Join(folder, number, file), []byte(value+"\n"), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	device("0", map[string]string{"cluster_fsid": clusterUUID, "pool": "rbd", "pool_ns": "", "name": "vm", "current_snap": "-", "major": "252", "minor": "0"})
	device("1", map[string]string{"cluster_fsid": clusterUUID, "pool": "rbd", "pool_ns": "n", "name": "vm", "current_snap": "s", "major": "252", "minor": "16"})
	device("2", map[string]string{"cluster_fsid": clusterUUID, "pool": "rbd"}) // being unmapped
	all, err := mappings(folder)
	if err != nil || len(all) != 2 {
		t.Fatalf("%+v, %v", all, err)
	}
	vm := imageName{"rbd", "", "vm"}
	if m := all[0]; !m.shows(clusterUUID, vm) || m.shows(imageUUID, vm) || m.shows(clusterUUID, imageName{"rbd", "n", "vm"}) || m.device != adapters.Device(unix.Mkdev(252, 0)) || m.path != "/dev/rbd0" {
		t.Errorf("%+v", m)
	}
	if m := all[1]; m.shows(clusterUUID, imageName{"rbd", "n", "vm"}) {
		t.Errorf("a snapshot was taken for the live image: %+v", m)
	}
	if all, err := mappings(filepath.Join(folder, "absent")); err != nil || len(all) != 0 {
		t.Errorf("without the module: %v, %v", all, err)
	}
	if all, err := mappings(sysRBD); err != nil {
		t.Errorf("this machine's: %v, %v", all, err)
	}
}
