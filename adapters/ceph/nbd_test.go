package ceph

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/adapters"
)

func TestParseNBD(t *testing.T) {
	for line, want := range map[string]struct {
		name imageName
		live bool
	}{
		"rbd-nbd map rbd/vm":                                             {imageName{"rbd", "", "vm"}, true},
		"/usr/bin/rbd-nbd map vm":                                        {imageName{"rbd", "", "vm"}, true},
		"rbd-nbd map ssd/tenant/vm@s":                                    {imageName{"ssd", "tenant", "vm"}, false},
		"rbd-nbd map --snap-id 4 rbd/vm":                                 {imageName{"rbd", "", "vm"}, false},
		"rbd-nbd map --snap-id=4 rbd/vm":                                 {imageName{"rbd", "", "vm"}, false},
		"rbd-nbd --id csi -m 10.0.0.1,10.0.0.2 --keyfile=/k map p/i":     {imageName{"p", "", "i"}, true},
		"rbd-nbd map p/i --try-netlink --reattach-timeout 300 --quiesce": {imageName{"p", "", "i"}, true},
		"rbd-nbd attach --device /dev/nbd3 p/i":                          {imageName{"p", "", "i"}, true},
	} {
		name, live, ok := parseNBD(strings.Fields(line))
		if !ok || name != want.name || live != want.live {
			t.Errorf("%s: %v, %v, %v", line, name, live, ok)
		}
	}
	for _, line := range []string{"", "nbd-client map rbd/vm", "rbd-nbd list-mapped", "rbd-nbd map", "rbd-nbd map a b", "rbd-nbd unmap /dev/nbd0", "rbd-nbd map a/b/c/d", "rbd-nbd map --unheard-of value rbd/vm"} {
		if name, live, ok := parseNBD(strings.Fields(line)); ok {
			t.Errorf("%q: %v, %v", line, name, live)
		}
	}
}

func TestNBDMappings(t *testing.T) {
	root := t.TempDir()
	for path, content := range map[string]string{
		"block/nbd0/dev": "43:0\n", "block/nbd0/pid": "17\n", "proc/17/cmdline": "rbd-nbd\x00map\x00rbd/vm\x00",
		"block/nbd1/dev": "43:32\n", // not connected
		"block/nbd2/dev": "43:64\n", "block/nbd2/pid": "18\n", "proc/18/cmdline": "nbd-server\x00",
		"block/nbd3/dev": "43:96\n", "block/nbd3/pid": "19\n", // its process is gone
		"block/nbd4/pid": "17\n", // being removed
	} {
		at := filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(at), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(at, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	all, err := nbdMappings(filepath.Join(root, "block"), filepath.Join(root, "proc"))
	vm := imageName{"rbd", "", "vm"}
	if err != nil || len(all) != 1 || !all[0].shows("any", vm) || all[0].device != adapters.Device(unix.Mkdev(43, 0)) || all[0].path != "/dev/nbd0" {
		t.Errorf("%+v, %v", all, err)
	}
}
