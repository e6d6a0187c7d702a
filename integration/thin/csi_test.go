package thin

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/csi"
	"stillpoint.io/stillpoint/agent/kube/class"
	integration "stillpoint.io/stillpoint/integration/csi"
	"stillpoint.io/stillpoint/integration/lab"
	"stillpoint.io/stillpoint/integration/vm"
)

// drive serves the driver over a thin pool that zeroes what it gives.
func drive(t *testing.T, l *lab.Lab) integration.Site {
	t.Helper()
	if _, err := run(exec.Command("lvchange", "-q", "-Zy", group+"/pool")); err != nil {
		t.Fatal(err)
	}
	socket := integration.Serve(t, l.Dir, csi.Config{
		Backends: csi.Backends{"lvm-thin": {Kind: adapters.Kind{Name: "lvm-thin"}, Adapter: openThin(t)}},
		Cut:      integration.Node(t, vm.Program("stillpoint-freezer")),
	})
	// Volumes that nobody has staged are snapshotted too, and nobody can say that nothing writes to them.
	crash := map[string]string{class.Driver + "/allow-crash-consistent": "true"}
	return integration.Site{Name: "lvm-thin", Socket: socket, Folder: l.Dir, Size: 32 << 20, Volumes: crash, Snapshots: crash}
}

// The whole of csi-sanity over thin volumes.
func TestSanity(t *testing.T) {
	needsDeviceMapper(t)
	thinPool(t)
	integration.Run(t, drive(t, lab.Test(t)))
}

// An ext4 is grown while it is mounted, and when it begins as a smaller one's content: what a container without
// CAP_SYS_RESOURCE cannot try.
func TestVolumeGrows(t *testing.T) {
	needsDeviceMapper(t)
	thinPool(t)
	l := lab.Test(t)
	conn, err := grpc.NewClient("unix://"+drive(t, l).Socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(t, err)
	defer conn.Close()
	controller, node, ctx := csipb.NewControllerClient(conn), csipb.NewNodeClient(conn), t.Context()
	use := &csipb.VolumeCapability{
		AccessMode: &csipb.VolumeCapability_AccessMode{Mode: csipb.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
		AccessType: &csipb.VolumeCapability_Mount{Mount: &csipb.VolumeCapability_MountVolume{FsType: "ext4"}},
	}
	const size = 64 << 20
	create := func(name string, size int64, from *csipb.VolumeContentSource) string {
		r, err := controller.CreateVolume(ctx, &csipb.CreateVolumeRequest{Name: name, CapacityRange: &csipb.CapacityRange{RequiredBytes: size},
			VolumeCapabilities: []*csipb.VolumeCapability{use}, VolumeContentSource: from})
		must(t, err)
		return r.GetVolume().GetVolumeId()
	}
	stage := func(volume, at string) {
		_, err := node.NodeStageVolume(ctx, &csipb.NodeStageVolumeRequest{VolumeId: volume, StagingTargetPath: at, VolumeCapability: use})
		must(t, err)
	}
	bytes := func(volume, at string) int64 {
		r, err := node.NodeGetVolumeStats(ctx, &csipb.NodeGetVolumeStatsRequest{VolumeId: volume, VolumePath: at})
		must(t, err)
		return r.GetUsage()[0].GetTotal()
	}
	one, oneAt := create("pvc-one", size, nil), filepath.Join(l.Dir, "one")
	stage(one, oneAt)
	must(t, os.WriteFile(filepath.Join(oneAt, "file"), []byte("kept"), 0o600))
	before := bytes(one, oneAt)
	_, err = controller.ControllerExpandVolume(ctx, &csipb.ControllerExpandVolumeRequest{VolumeId: one, CapacityRange: &csipb.CapacityRange{RequiredBytes: 2 * size}})
	must(t, err)
	_, err = node.NodeExpandVolume(ctx, &csipb.NodeExpandVolumeRequest{VolumeId: one, VolumePath: oneAt})
	must(t, err)
	if now := bytes(one, oneAt); now < before*3/2 {
		t.Errorf("grown, the filesystem of %d bytes has %d", before, now)
	}
	// A mounted thin volume is snapshotted under its freeze, by us or by device-mapper.
	taken, err := controller.CreateSnapshot(ctx, &csipb.CreateSnapshotRequest{Name: "snapshot-1", SourceVolumeId: one})
	must(t, err)
	two, twoAt := create("pvc-two", 4*size, &csipb.VolumeContentSource{Type: &csipb.VolumeContentSource_Snapshot{
		Snapshot: &csipb.VolumeContentSource_SnapshotSource{SnapshotId: taken.GetSnapshot().GetSnapshotId()}}}), filepath.Join(l.Dir, "two")
	stage(two, twoAt)
	if now := bytes(two, twoAt); now < before*3 {
		t.Errorf("the filesystem of a clone has %d bytes", now)
	}
	if b, err := os.ReadFile(filepath.Join(twoAt, "file")); string(b) != "kept" {
		t.Errorf("the clone holds %q, %v", b, err)
	}
	for volume, at := range map[string]string{one: oneAt, two: twoAt} {
		_, err := node.NodeUnstageVolume(ctx, &csipb.NodeUnstageVolumeRequest{VolumeId: volume, StagingTargetPath: at})
		must(t, err)
		_, err = controller.DeleteVolume(ctx, &csipb.DeleteVolumeRequest{VolumeId: volume})
		must(t, err)
	}
	_, err = controller.DeleteSnapshot(ctx, &csipb.DeleteSnapshotRequest{SnapshotId: taken.GetSnapshot().GetSnapshotId()})
	must(t, err)
}
