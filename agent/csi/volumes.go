package csi

import (
	"context"
	"errors"
	"fmt"
	"slices"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/backup"
	"stillpoint.io/stillpoint/agent/kube/class"
	"stillpoint.io/stillpoint/fault"
)

type controller struct {
	csipb.UnimplementedControllerServer
	*Driver
}

// ControllerGetCapabilities lists what the controller can do. GET_SNAPSHOT works too, and is not among them: it is alpha.
func (d *controller) ControllerGetCapabilities(context.Context, *csipb.ControllerGetCapabilitiesRequest) (*csipb.ControllerGetCapabilitiesResponse, error) {
	r := &csipb.ControllerGetCapabilitiesResponse{}
	for _, t := range []csipb.ControllerServiceCapability_RPC_Type{
		csipb.ControllerServiceCapability_RPC_CREATE_DELETE_SNAPSHOT,
		csipb.ControllerServiceCapability_RPC_LIST_SNAPSHOTS,
		csipb.ControllerServiceCapability_RPC_CREATE_DELETE_VOLUME,
		csipb.ControllerServiceCapability_RPC_CLONE_VOLUME,
		csipb.ControllerServiceCapability_RPC_EXPAND_VOLUME,
	} {
		r.Capabilities = append(r.Capabilities, &csipb.ControllerServiceCapability{Type: &csipb.ControllerServiceCapability_Rpc{Rpc: &csipb.ControllerServiceCapability_RPC{Type: t}}})
	}
	return r, nil
}

const (
	defaultSize = 1 << 30 // bytes, of a volume that none was asked for
	sizeMax     = 1 << 60 // bytes; nobody makes a larger one
	sizeUnit    = 4096    // bytes; sizes are multiples of it, so that every device can be that large
)

// provisioned is a volume of ours, and the backend that it is on.
type provisioned struct {
	id      adapters.VolumeID
	adapter adapters.Adapter
	adapters.Provisioner
}

// provisioned reads the handle of a volume that a Provisioner may have.
func (d *Driver) provisioned(handle string) (provisioned, error) {
	id, a, err := d.Backends.volume(handle)
	if err != nil {
		return provisioned{}, err
	}
	p, ok := adapters.As[adapters.Provisioner](a)
	if !ok {
		return provisioned{}, fault.Errorf(fault.NotFound, "there is no volume %q of this driver: the backend %s makes none", handle, id.Backend)
	}
	return provisioned{id, a, p}, nil
}

// CreateVolume makes a volume of zeros, or of the content of a snapshot or of another volume: by sharing it where the
// backend can, and else by copying, which the next call continues where it is cut short.
func (d *controller) CreateVolume(ctx context.Context, r *csipb.CreateVolumeRequest) (*csipb.CreateVolumeResponse, error) {
	if r.GetName() == "" {
		return nil, missing("name")
	}
	if len(r.GetMutableParameters()) > 0 {
		return nil, status.Error(codes.InvalidArgument, "mutable_parameters: nothing of a volume can be modified")
	}
	if err := capable(r.GetVolumeCapabilities()); err != nil {
		return nil, err
	}
	c, err := class.Parse(class.Volumes, r.GetParameters())
	if err != nil {
		return nil, err
	}
	if !d.accessible(r.GetAccessibilityRequirements()) {
		return nil, status.Errorf(codes.ResourceExhausted, "volumes made here are on the node %s, which is not among those required", d.Node)
	}
	_, a, err := d.Backends.choose(c, func(a adapters.Adapter) bool { _, ok := adapters.As[adapters.Provisioner](a); return ok }, "makes no volumes")
	if err != nil {
		return nil, err
	}
	p, _ := adapters.As[adapters.Provisioner](a)
	id, err := p.Place(ctx, r.GetName())
	if err != nil {
		return nil, err
	}
	if len(id.String()) > adapters.HandleMax {
		return nil, fault.Errorf(fault.Unsupported, "the volume %s would have a longer handle than the %d bytes that CSI allows; give the backend a shorter name, or its volumes a shorter path", id, adapters.HandleMax)
	}
	w := wanted{
		provisioned: provisioned{id, a, p}, class: c, size: r.GetCapacityRange(),
		origin: adapters.Origin{Name: r.GetName(), Source: sourceOf(r.GetVolumeContentSource())},
	}
	var v adapters.Volume
	err = d.turns.take(ctx, id.String(), func(ctx context.Context) (err error) {
		v, err = d.make(ctx, w, r.GetVolumeContentSource())
		return err
	})
	if err != nil {
		return nil, err
	}
	return &csipb.CreateVolumeResponse{Volume: &csipb.Volume{
		VolumeId: v.ID.String(), CapacityBytes: v.Size, ContentSource: r.GetVolumeContentSource(),
		AccessibleTopology: []*csipb.Topology{d.topology()},
	}}, nil
}

// wanted is a volume that is asked for.
type wanted struct {
	provisioned
	class  class.Class
	origin adapters.Origin
	size   *csipb.CapacityRange
}

// sourceOf is the handle of what a volume shall begin with; empty for zeros.
func sourceOf(s *csipb.VolumeContentSource) string {
	if s.GetSnapshot() != nil {
		return s.GetSnapshot().GetSnapshotId()
	}
	return s.GetVolume().GetVolumeId()
}

// make finds the volume, or makes it.
func (d *Driver) make(ctx context.Context, w wanted, source *csipb.VolumeContentSource) (adapters.Volume, error) {
	v, err := w.adapter.Volume(ctx, w.id)
	switch {
	case err == nil:
		if err = w.matches(ctx, v); err == nil && source.GetVolume() != nil {
			err = d.dropClone(ctx, w) // of a call that ended before it did so
		}
		return v, err
	case !errors.Is(err, fault.NotFound):
		return adapters.Volume{}, err
	}
	switch {
	case source == nil:
		return w.zeros(ctx)
	case source.GetSnapshot() != nil:
		s, from, err := d.Backends.verified(ctx, w.origin.Source)
		if err != nil {
			return adapters.Volume{}, err
		}
		return w.copy(ctx, s, from)
	case source.GetVolume() != nil:
		return d.clone(ctx, w)
	}
	return adapters.Volume{}, status.Error(codes.InvalidArgument, "volume_content_source is neither a snapshot nor a volume")
}

// matches says whether a volume that is there is the one that is asked for: AlreadyExists if not.
func (w wanted) matches(ctx context.Context, v adapters.Volume) error {
	o, err := w.Origin(ctx, v.ID)
	switch {
	case err != nil && !errors.Is(err, fault.Invalid):
		return err
	case err != nil:
		return status.Errorf(codes.AlreadyExists, "%v", err)
	case o.Name != w.origin.Name:
		return status.Errorf(codes.AlreadyExists, "the volume %s was made for the name %q, not %q", v.ID, o.Name, w.origin.Name)
	case o.Source != w.origin.Source:
		return status.Errorf(codes.AlreadyExists, "the volume %s exists, and began with the content of %q, not of %q", v.ID, o.Source, w.origin.Source)
	case v.Size < w.size.GetRequiredBytes() || w.size.GetLimitBytes() > 0 && v.Size > w.size.GetLimitBytes():
		return status.Errorf(codes.AlreadyExists, "the volume %s exists, and its %d bytes are not what is asked for: at least %d, at most %d (0: no limit)", v.ID, v.Size, w.size.GetRequiredBytes(), w.size.GetLimitBytes())
	}
	return nil
}

// chooseSize is the size of a new volume that holds at least so many bytes, OutOfRange if that cannot be.
func chooseSize(r *csipb.CapacityRange, least int64) (int64, error) {
	required, limit := r.GetRequiredBytes(), r.GetLimitBytes()
	if required < 0 || limit < 0 || limit > 0 && required > limit {
		return 0, status.Errorf(codes.OutOfRange, "a capacity of at least %d and at most %d bytes cannot be", required, limit)
	}
	size := required
	if size == 0 {
		size = max(least, defaultSize)
		if least > 0 {
			size = least
		}
		if limit > 0 {
			size = min(size, limit/sizeUnit*sizeUnit)
		}
	}
	if size > sizeMax {
		return 0, status.Errorf(codes.OutOfRange, "there are no volumes of %d bytes", size)
	}
	size = (size + sizeUnit - 1) / sizeUnit * sizeUnit
	if size < least || size <= 0 || limit > 0 && size > limit {
		return 0, status.Errorf(codes.OutOfRange, "a capacity of at least %d and at most %d bytes (0: no limit) cannot be had in units of %d bytes, with %d bytes of content", required, limit, sizeUnit, least)
	}
	return size, nil
}

// zeros makes a volume of zeros.
func (w wanted) zeros(ctx context.Context) (adapters.Volume, error) {
	size, err := chooseSize(w.size, 0)
	if err != nil {
		return adapters.Volume{}, err
	}
	restorer, ok := adapters.As[adapters.Restorer](w.adapter)
	if !ok {
		return adapters.Volume{}, fault.Errorf(fault.Unsupported, "the backend %s cannot make volumes", w.id.Backend)
	}
	token := adapters.ShortName(fmt.Sprintf("new volume %s of %d bytes", w.origin.Name, size))
	target, err := restorer.Begin(ctx, adapters.VolumeSpec{ID: w.id, Size: size, Token: token, Origin: w.origin})
	if err != nil {
		return adapters.Volume{}, err
	}
	if !target.ReadsZero() {
		if err := target.Zero(ctx, 0, size); err != nil {
			return adapters.Volume{}, errors.Join(err, target.Abort(context.WithoutCancel(ctx)))
		}
	}
	v, err := target.Commit(ctx)
	return v, w.within(v, err)
}

// within is OutOfRange for a volume that its backend made larger than is allowed; such a volume stays, for a call with
// another limit.
func (w wanted) within(v adapters.Volume, err error) error {
	if limit := w.size.GetLimitBytes(); err == nil && limit > 0 && v.Size > limit {
		return status.Errorf(codes.OutOfRange, "the backend %s makes volumes of %d bytes, and at most %d are allowed", w.id.Backend, v.Size, limit)
	}
	return err
}

// copy makes a volume of a snapshot.
func (w wanted) copy(ctx context.Context, s adapters.Snapshot, from adapters.Adapter) (adapters.Volume, error) {
	switch {
	case s.Form != adapters.BlockForm:
		return adapters.Volume{}, fault.Errorf(fault.Unsupported, "the snapshot %s is a tree of files, and makes no volume", s.ID)
	case s.State != adapters.Ready:
		return adapters.Volume{}, fault.Errorf(fault.Unavailable, "the snapshot %s is not ready yet; try again", s.ID)
	}
	size, err := chooseSize(w.size, s.Size)
	if err != nil {
		return adapters.Volume{}, err
	}
	_, err = backup.Restore(ctx, backup.RestoreRequest{Source: backup.FromSnapshot(from, s.ID), Target: w.adapter, Volume: w.id, Size: size, Origin: w.origin})
	if err != nil {
		return adapters.Volume{}, err
	}
	v, err := w.adapter.Volume(ctx, w.id)
	return v, w.within(v, err)
}

// clone makes a volume of another one, through a snapshot that is gone afterwards. The snapshot's name follows from the
// volume's, so that who repeats the call finds it.
func (d *Driver) clone(ctx context.Context, w wanted) (adapters.Volume, error) {
	made, err := d.cut(ctx, SourceQuery{Own: true, Name: cloneOf(w.id), Class: w.class}, []string{w.origin.Source})
	if err != nil {
		return adapters.Volume{}, err
	}
	from, err := d.Backends.find(made[0].ID.Volume.Backend)
	if err != nil {
		return adapters.Volume{}, err
	}
	v, err := w.copy(ctx, made[0], from)
	if err != nil {
		return adapters.Volume{}, err
	}
	return v, from.DeleteSnapshot(ctx, made[0].ID)
}

// cloneOf names the snapshot through which a volume becomes a clone.
func cloneOf(id adapters.VolumeID) string { return "clone " + id.String() }

// dropClone removes that snapshot, if it is still there.
func (d *Driver) dropClone(ctx context.Context, w wanted) error {
	from, err := d.Lookup.Source(ctx, SourceQuery{Handle: w.origin.Source})
	if err != nil {
		return nil // a volume that is not there any more; its snapshots are in the list, if it left some
	}
	a, err := d.Backends.find(from.ID.Backend)
	if err != nil {
		return err
	}
	v, err := a.Volume(ctx, from.ID)
	switch {
	case errors.Is(err, fault.NotFound):
		return nil
	case err != nil:
		return err
	}
	return a.DeleteSnapshot(ctx, adapters.SnapshotID{Volume: v.ID, Name: adapters.Name(cloneOf(w.id))})
}

// DeleteVolume removes a volume of ours. What is no handle of ours, or not there, is success.
func (d *controller) DeleteVolume(ctx context.Context, r *csipb.DeleteVolumeRequest) (*csipb.DeleteVolumeResponse, error) {
	if r.GetVolumeId() == "" {
		return nil, missing("volume_id")
	}
	p, err := d.provisioned(r.GetVolumeId())
	if err == nil {
		err = d.turns.take(ctx, p.id.String(), func(ctx context.Context) error { return p.DeleteVolume(ctx, p.id) })
	}
	if err != nil && fault.KindOf(err) != fault.NotFound {
		return nil, err
	}
	return &csipb.DeleteVolumeResponse{}, nil
}

// ControllerExpandVolume makes a volume larger, and its device where it is attached. The filesystem is the node's to grow.
func (d *controller) ControllerExpandVolume(ctx context.Context, r *csipb.ControllerExpandVolumeRequest) (*csipb.ControllerExpandVolumeResponse, error) {
	switch {
	case r.GetVolumeId() == "":
		return nil, missing("volume_id")
	case r.GetCapacityRange() == nil:
		return nil, missing("capacity_range")
	}
	p, err := d.provisioned(r.GetVolumeId())
	if err != nil {
		return nil, err
	}
	var v adapters.Volume
	err = d.turns.take(ctx, p.id.String(), func(ctx context.Context) (err error) {
		v, err = p.grow(ctx, r.GetCapacityRange())
		return err
	})
	if err != nil {
		return nil, err
	}
	return &csipb.ControllerExpandVolumeResponse{CapacityBytes: v.Size, NodeExpansionRequired: r.GetVolumeCapability().GetBlock() == nil}, nil
}

// grow makes a volume as large as is asked for. One that is as large already is left as it is.
func (p provisioned) grow(ctx context.Context, r *csipb.CapacityRange) (adapters.Volume, error) {
	v, err := p.adapter.Volume(ctx, p.id)
	if err != nil {
		return adapters.Volume{}, err
	}
	size := max(v.Size, r.GetRequiredBytes())
	if r.GetRequiredBytes() > v.Size {
		if size, err = chooseSize(r, 0); err != nil {
			return adapters.Volume{}, err
		}
	}
	if limit := r.GetLimitBytes(); limit > 0 && size > limit {
		return adapters.Volume{}, status.Errorf(codes.OutOfRange, "the volume %s has %d bytes already, and at most %d are asked for", v.ID, v.Size, limit)
	}
	return p.Grow(ctx, p.id, size)
}

// ValidateVolumeCapabilities confirms what every volume of ours can do.
func (d *controller) ValidateVolumeCapabilities(ctx context.Context, r *csipb.ValidateVolumeCapabilitiesRequest) (*csipb.ValidateVolumeCapabilitiesResponse, error) {
	switch {
	case r.GetVolumeId() == "":
		return nil, missing("volume_id")
	case len(r.GetVolumeCapabilities()) == 0:
		return nil, missing("volume_capabilities")
	}
	p, err := d.provisioned(r.GetVolumeId())
	if err == nil {
		_, err = p.Origin(ctx, p.id)
	}
	if err != nil {
		return nil, err
	}
	if err := capable(r.GetVolumeCapabilities()); err != nil {
		return &csipb.ValidateVolumeCapabilitiesResponse{Message: status.Convert(err).Message()}, nil
	}
	if _, err := class.Parse(class.Volumes, r.GetParameters()); err != nil {
		return &csipb.ValidateVolumeCapabilitiesResponse{Message: err.Error()}, nil
	}
	return &csipb.ValidateVolumeCapabilitiesResponse{Confirmed: &csipb.ValidateVolumeCapabilitiesResponse_Confirmed{
		VolumeContext: r.GetVolumeContext(), VolumeCapabilities: r.GetVolumeCapabilities(), Parameters: r.GetParameters(),
	}}, nil
}

// filesystems are the types that volumes are made with; the first is the default.
var filesystems = []string{"ext4", "xfs", "btrfs"}

// capable is InvalidArgument for a use that volumes of ours do not have: they are on one node.
func capable(all []*csipb.VolumeCapability) error {
	if len(all) == 0 {
		return missing("volume_capabilities")
	}
	for _, c := range all {
		switch mode := c.GetAccessMode().GetMode(); mode {
		case csipb.VolumeCapability_AccessMode_SINGLE_NODE_WRITER, csipb.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY:
		default:
			return status.Errorf(codes.InvalidArgument, "access mode %v: a volume is used on the node that it is on, by one node", mode)
		}
		switch {
		case c.GetBlock() != nil:
		case c.GetMount() == nil:
			return status.Error(codes.InvalidArgument, "a capability has no access_type: block or mount")
		case c.GetMount().GetFsType() != "" && !slices.Contains(filesystems, c.GetMount().GetFsType()):
			return status.Errorf(codes.InvalidArgument, "fs_type %q%s", c.GetMount().GetFsType(), class.Meant(c.GetMount().GetFsType(), filesystems))
		case c.GetMount().GetVolumeMountGroup() != "":
			return status.Error(codes.InvalidArgument, "volume_mount_group: the driver leaves ownership to its caller")
		}
	}
	return nil
}

// topologyKey is the label of nodes by which node-local volumes are bound to one.
const topologyKey = class.Driver + "/node"

func (d *Driver) topology() *csipb.Topology {
	return &csipb.Topology{Segments: map[string]string{topologyKey: d.Node}}
}

// accessible says whether a volume on this node is where it is required.
func (d *Driver) accessible(r *csipb.TopologyRequirement) bool {
	here := func(t *csipb.Topology) bool { return t.GetSegments()[topologyKey] == d.Node }
	return len(r.GetRequisite()) == 0 || slices.ContainsFunc(r.GetRequisite(), here)
}
