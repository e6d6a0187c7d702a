package ceph

import (
	"maps"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/adapters"
)

func TestParseFuse(t *testing.T) {
	for s, want := range map[string][]fuseFolder{
		"":                          nil,
		"rbd=/images":               {{"rbd", "/images"}},
		"rbd=/images/, ssd=/a/../b": {{"rbd", "/images"}, {"ssd", "/b"}},
		"rbd=/a=b":                  {{"rbd", "/a=b"}},
	} {
		if got, err := parseFuse(s); err != nil || !slices.Equal(got, want) {
			t.Errorf("%q: %v, %v", s, got, err)
		}
	}
	for _, s := range []string{"rbd", "rbd=", "=/images", "rbd=images", "rbd=/images,", "/images"} {
		if got, err := parseFuse(s); err == nil {
			t.Errorf("%q: %v", s, got)
		}
	}
}

func TestLoopsOn(t *testing.T) {
	sys := t.TempDir()
	for path, content := range map[string]string{
		"loop0/dev": "7:0\n", "loop0/loop/backing_file": "/images/vm\n",
		"loop1/dev": "7:1\n", // not attached
		"loop2/dev": "7:2\n", "loop2/loop/backing_file": "/images/other/vm\n",
		"loop3/dev": "7:3\n", "loop3/loop/backing_file": "/ssd/a b (deleted)\n", // a name like any other: files of rbd-fuse stay
		"loop4/loop/backing_file": "/images/gone\n", // being removed
		"sda/dev":                 "8:0\n",
	} {
		at := filepath.Join(sys, path)
		if err := os.MkdirAll(filepath.Dir(at), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(at, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	all, err := loopsOn(sys, map[string]imageName{"/images": {pool: "rbd"}, "/ssd": {pool: "ssd"}})
	want := map[adapters.Device]imageName{
		adapters.Device(unix.Mkdev(7, 0)): {pool: "rbd", image: "vm"},
		adapters.Device(unix.Mkdev(7, 3)): {pool: "ssd", image: "a b (deleted)"},
	}
	got := map[adapters.Device]imageName{}
	for _, m := range all {
		got[m.device] = m.name
		if !m.shows("any cluster", m.name) || m.path != "/dev/loop"+string('0'+rune(unix.Minor(uint64(m.device)))) {
			t.Errorf("%+v", m)
		}
	}
	if err != nil || !maps.Equal(got, want) {
		t.Errorf("%v, %v", got, err)
	}
	// What is not a mount of rbd-fuse is not believed.
	if all, err := fuseMappings(sys, []fuseFolder{{"rbd", "/"}, {"rbd", "/images"}}); err != nil || len(all) != 0 {
		t.Errorf("%v, %v", all, err)
	}
}
