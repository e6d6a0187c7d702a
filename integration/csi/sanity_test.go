package csi

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/adapters/mem"
	"stillpoint.io/stillpoint/adapters/reflink"
	"stillpoint.io/stillpoint/agent/csi"
	"stillpoint.io/stillpoint/agent/kube/class"
	"stillpoint.io/stillpoint/integration/lab"
)

// The whole of csi-sanity, with filesystems and raw, over volumes in memory and files on XFS and btrfs.
func TestSanity(t *testing.T) {
	l := lab.Test(t)
	program := freezerProgram(t)
	var sites []Site
	add := func(name string, size int64, block bool, b csi.Backend) {
		folder := filepath.Join(l.Dir, name)
		must(t, os.Mkdir(folder, 0o700))
		socket := Serve(t, folder, csi.Config{Backends: csi.Backends{"b": b}, Cut: Node(t, program)})
		// Volumes that nobody has staged are snapshotted too, and nobody can say that nothing writes to them.
		crash := map[string]string{class.CrashKey: "true"}
		sites = append(sites, Site{Name: name, Socket: socket, Folder: folder, Block: block, Size: size, Volumes: crash, Snapshots: crash})
	}
	for name, block := range map[string]bool{"mem": false, "mem-block": true} {
		store := new(mem.Store)
		a := store.Adapter("b")
		t.Cleanup(func() { must(t, a.Close()) })
		add(name, 32<<20, block, csi.Backend{Kind: adapters.Kind{Name: "mem"}, Adapter: a})
	}
	for _, fstype := range []string{"xfs", "btrfs"} {
		pool, err := l.Pool(t.Context(), fstype, fstype, 4<<30)
		must(t, err)
		a, err := reflink.Kind().Open(t.Context(), adapters.Config{Name: "b", Parameters: map[string]string{"pools": pool.Mount, "volumes": pool.Mount}})
		must(t, err)
		t.Cleanup(func() { must(t, a.Close()) })
		add("reflink-"+fstype, 64<<20, fstype == "btrfs", csi.Backend{Kind: adapters.Kind{Name: "reflink"}, Adapter: adapters.Retry(a, adapters.RetryPolicy{})})
	}
	Run(t, sites...)
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// freezerProgram builds the freezer.
func freezerProgram(t testing.TB) string {
	t.Helper()
	program := filepath.Join(t.TempDir(), "stillpoint-freezer")
	if out, err := exec.Command("go", "build", "-o", program, "stillpoint.io/stillpoint/cmd/stillpoint-freezer").CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	return program
}
