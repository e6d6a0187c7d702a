package csi

import (
	"context"
	"fmt"
	"regexp"
	"slices"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/cut"
	"stillpoint.io/stillpoint/agent/kube/class"
	"stillpoint.io/stillpoint/fault"
)

// groupPrefix begins a group's handle, and the instant of its cut follows. No backend's name has a slash.
const groupPrefix = "group/"

var groupHandle = regexp.MustCompile(`^group/[0-9a-f]{32}$`)

// groupOf is the handle of the group that a published snapshot belongs to, empty if it was cut alone. A group of one volume
// is one only for who made it.
func groupOf(s adapters.Snapshot) string {
	if s.Notes.Instant == "" || cut.Alone(s) {
		return ""
	}
	return groupPrefix + s.Notes.Instant
}

type group struct {
	csipb.UnimplementedGroupControllerServer
	*Driver
}

// GroupControllerGetCapabilities says that there are groups.
func (d *group) GroupControllerGetCapabilities(context.Context, *csipb.GroupControllerGetCapabilitiesRequest) (*csipb.GroupControllerGetCapabilitiesResponse, error) {
	return &csipb.GroupControllerGetCapabilitiesResponse{Capabilities: []*csipb.GroupControllerServiceCapability{
		{Type: &csipb.GroupControllerServiceCapability_Rpc{Rpc: &csipb.GroupControllerServiceCapability_RPC{
			Type: csipb.GroupControllerServiceCapability_RPC_CREATE_DELETE_GET_VOLUME_GROUP_SNAPSHOT}}},
	}}, nil
}

// CreateVolumeGroupSnapshot is one cut of all the volumes, on whatever backends they are.
func (d *group) CreateVolumeGroupSnapshot(ctx context.Context, r *csipb.CreateVolumeGroupSnapshotRequest) (*csipb.CreateVolumeGroupSnapshotResponse, error) {
	handles := slices.Clone(r.GetSourceVolumeIds())
	slices.Sort(handles)
	switch {
	case r.GetName() == "":
		return nil, missing("name")
	case len(handles) == 0 || slices.Contains(handles, ""):
		return nil, missing("source_volume_ids")
	case len(slices.Compact(handles)) < len(r.GetSourceVolumeIds()):
		return nil, status.Error(codes.InvalidArgument, "source_volume_ids names a volume twice")
	}
	c, err := class.Parse(class.Groups, r.GetParameters())
	if err != nil {
		return nil, err
	}
	made, err := d.cut(ctx, SourceQuery{Own: true, Name: r.GetName(), Class: c, Parameters: r.GetParameters()}, r.GetSourceVolumeIds())
	if err != nil {
		return nil, err
	}
	g := &csipb.VolumeGroupSnapshot{GroupSnapshotId: groupPrefix + made[0].Notes.Instant}
	for i, s := range made {
		g.Snapshots = append(g.Snapshots, describe(s, r.GetSourceVolumeIds()[i], g.GetGroupSnapshotId()))
	}
	return &csipb.CreateVolumeGroupSnapshotResponse{GroupSnapshot: complete(g)}, nil
}

// complete says of a group what follows from its members: it is as old as the oldest, and ready when all are.
func complete(g *csipb.VolumeGroupSnapshot) *csipb.VolumeGroupSnapshot {
	g.ReadyToUse = true
	for _, s := range g.GetSnapshots() {
		g.ReadyToUse = g.ReadyToUse && s.GetReadyToUse()
		if at := s.GetCreationTime(); g.CreationTime == nil || at.AsTime().Before(g.CreationTime.AsTime()) {
			g.CreationTime = timestamppb.New(at.AsTime())
		}
	}
	return g
}

// GetVolumeGroupSnapshot looks the members up. NotFound unless all are there.
func (d *group) GetVolumeGroupSnapshot(ctx context.Context, r *csipb.GetVolumeGroupSnapshotRequest) (*csipb.GetVolumeGroupSnapshotResponse, error) {
	id := r.GetGroupSnapshotId()
	if id == "" {
		return nil, missing("group_snapshot_id")
	}
	members, err := d.members(ctx, id, r.GetSnapshotIds())
	if err != nil {
		return nil, err
	}
	if len(members) == 0 || len(members) < len(r.GetSnapshotIds()) {
		return nil, fault.Errorf(fault.NotFound, "the group %s is not there, or not all of its snapshots are", id)
	}
	g := &csipb.VolumeGroupSnapshot{GroupSnapshotId: id}
	for _, s := range members {
		described, err := d.describe(ctx, s)
		if err != nil {
			return nil, err
		}
		described.GroupSnapshotId = id
		g.Snapshots = append(g.Snapshots, described)
	}
	return &csipb.GetVolumeGroupSnapshotResponse{GroupSnapshot: complete(g)}, nil
}

// DeleteVolumeGroupSnapshot removes all members that are still there.
func (d *group) DeleteVolumeGroupSnapshot(ctx context.Context, r *csipb.DeleteVolumeGroupSnapshotRequest) (*csipb.DeleteVolumeGroupSnapshotResponse, error) {
	id := r.GetGroupSnapshotId()
	if id == "" {
		return nil, missing("group_snapshot_id")
	}
	members, err := d.members(ctx, id, r.GetSnapshotIds())
	if err != nil {
		return nil, err
	}
	for _, s := range members {
		a, err := d.Backends.find(s.ID.Volume.Backend)
		if err == nil {
			err = a.DeleteSnapshot(ctx, s.ID)
		}
		if err != nil && fault.KindOf(err) != fault.NotFound {
			return nil, err
		}
	}
	return &csipb.DeleteVolumeGroupSnapshotResponse{}, nil
}

// members are the snapshots of a group that are there, of those named and of all others that its instant finds. One named
// that is of another cut, and one found that is not named, are a mismatch of the list: InvalidArgument.
func (d *group) members(ctx context.Context, id string, handles []string) ([]adapters.Snapshot, error) {
	if !groupHandle.MatchString(id) {
		if len(handles) > 0 {
			return nil, status.Errorf(codes.InvalidArgument, "%q is no group of ours, and can have no snapshots", id)
		}
		return nil, nil
	}
	instant := id[len(groupPrefix):]
	var members []adapters.Snapshot
	named := map[adapters.SnapshotID]bool{}
	for _, handle := range handles {
		s, _, err := d.Backends.verified(ctx, handle)
		switch {
		case fault.KindOf(err) == fault.NotFound:
			continue
		case err != nil:
			return nil, err
		case s.Notes.Instant != instant:
			return nil, status.Errorf(codes.InvalidArgument, "the snapshot %s is not of the group %s", handle, id)
		case named[s.ID]:
			return nil, status.Errorf(codes.InvalidArgument, "the snapshot %s is named twice", handle)
		}
		named[s.ID] = true
		members = append(members, s)
	}
	all, err := d.Backends.snapshots(ctx, adapters.Filter{}, d.Backends.names()...)
	if err != nil {
		return nil, fmt.Errorf("looking for the members of the group %s: %w", id, err)
	}
	for _, s := range all {
		if s.Notes.Instant == instant && !named[s.ID] {
			return nil, status.Errorf(codes.InvalidArgument, "the snapshot %s is of the group %s too, and not among its snapshot_ids", s.ID, id)
		}
	}
	return members, nil
}
