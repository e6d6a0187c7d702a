package kubernetes

import (
	"context"
	"net"
	"path/filepath"
	"sync"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// driver is a CSI driver that keeps snapshots in memory and remembers what it was asked. It is a server in the test.
type driver struct {
	csi.UnimplementedIdentityServer
	csi.UnimplementedControllerServer
	csi.UnimplementedSnapshotMetadataServer
	name string

	mu        sync.Mutex
	created   []*csi.CreateSnapshotRequest
	deleted   []*csi.DeleteSnapshotRequest
	snapshots map[string]*csi.Snapshot // by name
}

// serve serves a driver on a socket until the test ends.
func serve(t *testing.T, c *Cluster, name string) (d *driver, socket string) {
	t.Helper()
	dir, err := c.Folder()
	if err != nil {
		t.Fatal(err)
	}
	d, socket = &driver{name: name, snapshots: map[string]*csi.Snapshot{}}, filepath.Join(dir, "csi.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	csi.RegisterIdentityServer(s, d)
	csi.RegisterControllerServer(s, d)
	csi.RegisterSnapshotMetadataServer(s, d)
	done := make(chan error)
	go func() { done <- s.Serve(l) }()
	t.Cleanup(func() {
		s.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return d, socket
}

func (d *driver) asked() (created []*csi.CreateSnapshotRequest, deleted []*csi.DeleteSnapshotRequest) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.created, d.deleted
}

func (d *driver) GetPluginInfo(context.Context, *csi.GetPluginInfoRequest) (*csi.GetPluginInfoResponse, error) {
	return &csi.GetPluginInfoResponse{Name: d.name, VendorVersion: "1"}, nil
}

func (d *driver) Probe(context.Context, *csi.ProbeRequest) (*csi.ProbeResponse, error) {
	return &csi.ProbeResponse{Ready: wrapperspb.Bool(true)}, nil
}

func (d *driver) GetPluginCapabilities(context.Context, *csi.GetPluginCapabilitiesRequest) (*csi.GetPluginCapabilitiesResponse, error) {
	r := &csi.GetPluginCapabilitiesResponse{}
	for _, s := range []csi.PluginCapability_Service_Type{csi.PluginCapability_Service_CONTROLLER_SERVICE, csi.PluginCapability_Service_SNAPSHOT_METADATA_SERVICE} {
		r.Capabilities = append(r.Capabilities, &csi.PluginCapability{Type: &csi.PluginCapability_Service_{Service: &csi.PluginCapability_Service{Type: s}}})
	}
	return r, nil
}

func (d *driver) ControllerGetCapabilities(context.Context, *csi.ControllerGetCapabilitiesRequest) (*csi.ControllerGetCapabilitiesResponse, error) {
	r := &csi.ControllerGetCapabilitiesResponse{}
	for _, c := range []csi.ControllerServiceCapability_RPC_Type{csi.ControllerServiceCapability_RPC_CREATE_DELETE_VOLUME, csi.ControllerServiceCapability_RPC_CREATE_DELETE_SNAPSHOT} {
		r.Capabilities = append(r.Capabilities, &csi.ControllerServiceCapability{Type: &csi.ControllerServiceCapability_Rpc{Rpc: &csi.ControllerServiceCapability_RPC{Type: c}}})
	}
	return r, nil
}

func (d *driver) CreateVolume(_ context.Context, r *csi.CreateVolumeRequest) (*csi.CreateVolumeResponse, error) {
	return &csi.CreateVolumeResponse{Volume: &csi.Volume{VolumeId: "made-" + r.Name, CapacityBytes: r.GetCapacityRange().GetRequiredBytes(), ContentSource: r.VolumeContentSource}}, nil
}

func (d *driver) DeleteVolume(context.Context, *csi.DeleteVolumeRequest) (*csi.DeleteVolumeResponse, error) {
	return &csi.DeleteVolumeResponse{}, nil
}

func (d *driver) CreateSnapshot(_ context.Context, r *csi.CreateSnapshotRequest) (*csi.CreateSnapshotResponse, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.created = append(d.created, r)
	if d.snapshots[r.Name] == nil {
		d.snapshots[r.Name] = &csi.Snapshot{SnapshotId: r.SourceVolumeId + "@" + r.Name, SourceVolumeId: r.SourceVolumeId, SizeBytes: 1 << 30, CreationTime: timestamppb.Now(), ReadyToUse: true}
	}
	return &csi.CreateSnapshotResponse{Snapshot: d.snapshots[r.Name]}, nil
}

func (d *driver) DeleteSnapshot(_ context.Context, r *csi.DeleteSnapshotRequest) (*csi.DeleteSnapshotResponse, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.deleted = append(d.deleted, r)
	return &csi.DeleteSnapshotResponse{}, nil
}

func (d *driver) GetMetadataAllocated(r *csi.GetMetadataAllocatedRequest, s csi.SnapshotMetadata_GetMetadataAllocatedServer) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, snapshot := range d.snapshots {
		if snapshot.SnapshotId == r.SnapshotId {
			return s.Send(&csi.GetMetadataAllocatedResponse{BlockMetadataType: csi.BlockMetadataType_FIXED_LENGTH, VolumeCapacityBytes: snapshot.SizeBytes,
				BlockMetadata: []*csi.BlockMetadata{{ByteOffset: 8192, SizeBytes: 4096}}})
		}
	}
	return status.Error(codes.NotFound, r.SnapshotId)
}
