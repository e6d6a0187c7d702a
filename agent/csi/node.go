package csi

import (
	"context"
	"errors"
	"path/filepath"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"stillpoint.io/stillpoint/fault"
)

type node struct {
	csipb.UnimplementedNodeServer
	*Driver
}

// NodeGetCapabilities lists what the node can do.
func (d *node) NodeGetCapabilities(context.Context, *csipb.NodeGetCapabilitiesRequest) (*csipb.NodeGetCapabilitiesResponse, error) {
	r := &csipb.NodeGetCapabilitiesResponse{}
	for _, t := range []csipb.NodeServiceCapability_RPC_Type{
		csipb.NodeServiceCapability_RPC_STAGE_UNSTAGE_VOLUME,
		csipb.NodeServiceCapability_RPC_GET_VOLUME_STATS,
		csipb.NodeServiceCapability_RPC_EXPAND_VOLUME,
	} {
		r.Capabilities = append(r.Capabilities, &csipb.NodeServiceCapability{Type: &csipb.NodeServiceCapability_Rpc{Rpc: &csipb.NodeServiceCapability_RPC{Type: t}}})
	}
	return r, nil
}

// NodeGetInfo names the node, to which its volumes are bound.
func (d *node) NodeGetInfo(context.Context, *csipb.NodeGetInfoRequest) (*csipb.NodeGetInfoResponse, error) {
	return &csipb.NodeGetInfoResponse{NodeId: d.Node, AccessibleTopology: d.topology()}, nil
}

// NodeStageVolume attaches the volume and, unless it is for raw use, mounts the filesystem on it, which is made if the
// volume holds nothing that anybody knows. A filesystem that began with another volume's content is grown to the volume.
func (d *node) NodeStageVolume(ctx context.Context, r *csipb.NodeStageVolumeRequest) (*csipb.NodeStageVolumeResponse, error) {
	switch {
	case r.GetVolumeId() == "":
		return nil, missing("volume_id")
	case r.GetStagingTargetPath() == "":
		return nil, missing("staging_target_path")
	case r.GetVolumeCapability() == nil:
		return nil, missing("volume_capability")
	}
	if err := capable([]*csipb.VolumeCapability{r.GetVolumeCapability()}); err != nil {
		return nil, err
	}
	p, err := d.provisioned(r.GetVolumeId())
	if err != nil {
		return nil, err
	}
	err = d.turns.take(ctx, p.id.String(), func(ctx context.Context) error {
		origin, err := p.Origin(ctx, p.id)
		if err != nil {
			return err
		}
		device, err := p.Attach(ctx, p.id)
		if err != nil || r.GetVolumeCapability().GetBlock() != nil {
			return err
		}
		mount := r.GetVolumeCapability().GetMount()
		return d.mounts.stage(ctx, staging{
			device: device, at: r.GetStagingTargetPath(), fstype: mount.GetFsType(), flags: mount.GetMountFlags(),
			readOnly: readOnly(r.GetVolumeCapability()), grown: origin.Source != "",
		})
	})
	if err != nil {
		return nil, err
	}
	return &csipb.NodeStageVolumeResponse{}, nil
}

// readOnly says whether a use only reads.
func readOnly(c *csipb.VolumeCapability) bool {
	return c.GetAccessMode().GetMode() == csipb.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY
}

// NodeUnstageVolume unmounts the volume and detaches it.
func (d *node) NodeUnstageVolume(ctx context.Context, r *csipb.NodeUnstageVolumeRequest) (*csipb.NodeUnstageVolumeResponse, error) {
	switch {
	case r.GetVolumeId() == "":
		return nil, missing("volume_id")
	case r.GetStagingTargetPath() == "":
		return nil, missing("staging_target_path")
	}
	p, err := d.provisioned(r.GetVolumeId())
	if err != nil {
		return nil, err
	}
	err = d.turns.take(ctx, p.id.String(), func(ctx context.Context) error {
		if err := d.mounts.unmount(r.GetStagingTargetPath()); err != nil {
			return err
		}
		return p.Detach(ctx, p.id)
	})
	if err != nil {
		return nil, err
	}
	return &csipb.NodeUnstageVolumeResponse{}, nil
}

// NodePublishVolume shows a staged volume at another place: its filesystem, or its device as a file.
func (d *node) NodePublishVolume(ctx context.Context, r *csipb.NodePublishVolumeRequest) (*csipb.NodePublishVolumeResponse, error) {
	switch {
	case r.GetVolumeId() == "":
		return nil, missing("volume_id")
	case r.GetTargetPath() == "":
		return nil, missing("target_path")
	case r.GetVolumeCapability() == nil:
		return nil, missing("volume_capability")
	case r.GetStagingTargetPath() == "":
		return nil, status.Error(codes.FailedPrecondition, "the request has no staging_target_path: a volume is staged before it is published")
	}
	if err := capable([]*csipb.VolumeCapability{r.GetVolumeCapability()}); err != nil {
		return nil, err
	}
	p, err := d.provisioned(r.GetVolumeId())
	if err != nil {
		return nil, err
	}
	only := r.GetReadonly() || readOnly(r.GetVolumeCapability())
	block := r.GetVolumeCapability().GetBlock() != nil
	if block && only {
		return nil, status.Error(codes.FailedPrecondition, "a device cannot be published read-only: a read-only mount of its node does not keep anybody from writing to it")
	}
	err = d.turns.take(ctx, p.id.String(), func(ctx context.Context) error {
		v, err := p.adapter.Volume(ctx, p.id)
		if err == nil && v.Device == 0 {
			err = status.Errorf(codes.FailedPrecondition, "the volume %s is not staged", p.id)
		}
		if err != nil {
			return err
		}
		device, err := p.Attach(ctx, p.id) // which it is: where
		if err != nil {
			return err
		}
		if block {
			return d.mounts.publishDevice(device, r.GetTargetPath())
		}
		return d.mounts.publish(device, r.GetStagingTargetPath(), r.GetTargetPath(), only)
	})
	if err != nil {
		return nil, err
	}
	return &csipb.NodePublishVolumeResponse{}, nil
}

// NodeUnpublishVolume takes that away, with the file or directory.
func (d *node) NodeUnpublishVolume(ctx context.Context, r *csipb.NodeUnpublishVolumeRequest) (*csipb.NodeUnpublishVolumeResponse, error) {
	switch {
	case r.GetVolumeId() == "":
		return nil, missing("volume_id")
	case r.GetTargetPath() == "":
		return nil, missing("target_path")
	}
	p, err := d.provisioned(r.GetVolumeId())
	if err != nil {
		return nil, err
	}
	err = d.turns.take(ctx, p.id.String(), func(context.Context) error { return d.mounts.unpublish(r.GetTargetPath()) })
	if err != nil {
		return nil, err
	}
	return &csipb.NodeUnpublishVolumeResponse{}, nil
}

// NodeGetVolumeStats tells how full the filesystem is, or how large the device.
func (d *node) NodeGetVolumeStats(ctx context.Context, r *csipb.NodeGetVolumeStatsRequest) (*csipb.NodeGetVolumeStatsResponse, error) {
	switch {
	case r.GetVolumeId() == "":
		return nil, missing("volume_id")
	case r.GetVolumePath() == "":
		return nil, missing("volume_path")
	}
	at, err := d.used(ctx, r.GetVolumeId(), r.GetVolumePath())
	if err != nil {
		return nil, err
	}
	if at.raw {
		return &csipb.NodeGetVolumeStatsResponse{Usage: []*csipb.VolumeUsage{{Unit: csipb.VolumeUsage_BYTES, Total: at.size}}}, nil
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(r.GetVolumePath(), &fs); err != nil {
		return nil, err
	}
	unit := int64(fs.Bsize)
	return &csipb.NodeGetVolumeStatsResponse{Usage: []*csipb.VolumeUsage{
		{Unit: csipb.VolumeUsage_BYTES, Total: int64(fs.Blocks) * unit, Available: int64(fs.Bavail) * unit, Used: int64(fs.Blocks-fs.Bfree) * unit},
		{Unit: csipb.VolumeUsage_INODES, Total: int64(fs.Files), Available: int64(fs.Ffree), Used: int64(fs.Files - fs.Ffree)},
	}}, nil
}

// NodeExpandVolume grows the filesystem to the volume, while it is mounted.
func (d *node) NodeExpandVolume(ctx context.Context, r *csipb.NodeExpandVolumeRequest) (*csipb.NodeExpandVolumeResponse, error) {
	switch {
	case r.GetVolumeId() == "":
		return nil, missing("volume_id")
	case r.GetVolumePath() == "":
		return nil, missing("volume_path")
	}
	at, err := d.used(ctx, r.GetVolumeId(), r.GetVolumePath())
	if err != nil {
		return nil, err
	}
	var size int64
	err = d.turns.take(ctx, at.volume.id.String(), func(ctx context.Context) error {
		v, err := at.volume.Grow(ctx, at.volume.id, at.size) // its device too, if that had been missed
		size = v.Size
		if err != nil || at.raw {
			return err
		}
		return d.mounts.growFilesystem(at.device, r.GetVolumePath())
	})
	if err != nil {
		return nil, err
	}
	return &csipb.NodeExpandVolumeResponse{CapacityBytes: size}, nil
}

// use is where a volume is staged or published.
type use struct {
	volume provisioned
	device string
	size   int64 // of the volume, bytes
	raw    bool  // the place is the device itself
}

// used finds out what is at a place. NotFound unless it is the volume.
func (d *Driver) used(ctx context.Context, handle, path string) (use, error) {
	p, err := d.provisioned(handle)
	if err != nil {
		return use{}, err
	}
	v, err := p.adapter.Volume(ctx, p.id)
	if err == nil {
		_, err = p.Origin(ctx, p.id)
	}
	if err != nil {
		return use{}, err
	}
	absent := fault.Errorf(fault.NotFound, "the volume %s is not at %s", handle, path)
	if v.Device == 0 || !filepath.IsAbs(path) {
		return use{}, absent
	}
	u := use{volume: p, size: v.Size}
	var st unix.Stat_t
	switch err := unix.Stat(path, &st); {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR):
		return use{}, absent
	case err != nil:
		return use{}, err
	}
	if u.raw = st.Mode&unix.S_IFMT == unix.S_IFBLK; u.raw {
		u.device = path
		if st.Rdev != uint64(v.Device) {
			return use{}, absent
		}
		return u, nil
	}
	m, err := mountAt(path)
	if err != nil {
		return use{}, err
	}
	if m == nil || !m.of(uint64(v.Device)) {
		return use{}, absent
	}
	u.device = m.info.Source
	return u, nil
}
