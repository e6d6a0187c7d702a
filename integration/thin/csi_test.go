package thin

import (
	"os"
	"path/filepath"
	"testing"

	"stillpoint.io/stillpoint/agent/csi"
	integration "stillpoint.io/stillpoint/integration/csi"
	"stillpoint.io/stillpoint/integration/lab"
	"stillpoint.io/stillpoint/integration/vm"
)

// The whole of csi-sanity, with filesystems and raw, over thin volumes.
func TestSanity(t *testing.T) {
	needsDeviceMapper(t)
	thinPool(t)
	l := lab.Test(t)
	// Volumes that nobody has staged are snapshotted too, and nobody can say that nothing writes to them.
	crash := map[string]string{csi.Prefix + "allow-crash-consistent": "true"}
	var sites []integration.Site
	for name, block := range map[string]bool{"filesystem": false, "block": true} {
		folder := filepath.Join(l.Dir, name)
		must(t, os.Mkdir(folder, 0o700))
		socket := integration.Serve(t, folder, csi.Config{
			Backends: csi.Backends{"lvm-thin": {Kind: "lvm-thin", Adapter: openThin(t)}},
			Cut:      integration.Node(t, vm.Program("stillpoint-freezer")),
		})
		sites = append(sites, integration.Site{Name: name, Socket: socket, Folder: folder, Block: block, Size: 32 << 20, Volumes: crash, Snapshots: crash})
	}
	integration.Run(t, sites...)
}
