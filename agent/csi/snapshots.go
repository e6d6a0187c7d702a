package csi

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/cut"
	"stillpoint.io/stillpoint/agent/kube"
	"stillpoint.io/stillpoint/agent/kube/class"
	"stillpoint.io/stillpoint/fault"
)

// CreateSnapshot cuts one volume. A snapshot that was made before is found by its name, whether it is ready or not.
func (d *controller) CreateSnapshot(ctx context.Context, r *csipb.CreateSnapshotRequest) (*csipb.CreateSnapshotResponse, error) {
	switch {
	case r.GetName() == "":
		return nil, missing("name")
	case r.GetSourceVolumeId() == "":
		return nil, missing("source_volume_id")
	}
	c, err := class.Parse(class.Snapshots, r.GetParameters())
	if err != nil {
		return nil, err
	}
	q := SourceQuery{Name: r.GetName(), Class: c, Parameters: r.GetParameters()}
	made, err := d.cut(ctx, q, []string{r.GetSourceVolumeId()})
	if err != nil {
		d.tell(q, kube.Failed("Cutting the volume", err))
		return nil, err
	}
	s := describe(made[0], r.GetSourceVolumeId(), "")
	return &csipb.CreateSnapshotResponse{Snapshot: s}, nil
}

// cut looks the volumes up and cuts them, or finds the cut of that name. The snapshots are in the order of the handles.
func (d *Driver) cut(ctx context.Context, q SourceQuery, handles []string) ([]adapters.Snapshot, error) {
	c, name := q.Class, q.Name
	if c.Backup != nil {
		return nil, fault.Errorf(fault.Unsupported, "the class wants backups, and this agent makes none")
	}
	request := cut.Request{Name: name, MaxFreeze: c.Cut.MaxFreeze, AllowCrashConsistent: c.Cut.AllowCrash, AllowSeparateInstants: c.Cut.AllowSeparate}
	ids := make([]adapters.SnapshotID, len(handles))
	for i, handle := range handles {
		q.Handle = handle
		from, err := d.Lookup.Source(ctx, q)
		if err != nil {
			return nil, err
		}
		if err := d.Backends.fits(c, from.ID); err != nil {
			return nil, err
		}
		a, err := d.Backends.find(from.ID.Backend)
		if err != nil {
			return nil, err
		}
		v, err := a.Volume(ctx, from.ID)
		if err != nil {
			return nil, err
		}
		ids[i] = adapters.SnapshotID{Volume: v.ID, Name: adapters.Name(name)}
		request.Volumes = append(request.Volumes, cut.Volume{ID: v.ID, Adapter: a})
		if !from.Unique && len(handles) == 1 {
			if err := d.onlyOf(ctx, name, v.ID); err != nil {
				return nil, err
			}
		}
	}
	result, err := cut.Make(ctx, request, d.Cut)
	if fault.KindOf(err) == fault.Busy {
		return nil, d.taken(ctx, err, ids)
	}
	if fault.KindOf(err) == fault.Unsupported {
		return nil, fmt.Errorf("%w (in a class those are %s and, for groups, %s)", err, class.CrashKey, class.SeparateKey)
	}
	if err != nil {
		return nil, err
	}
	if !result.Adopted {
		d.tell(q, kube.Frozen(len(result.Frozen), longest(result.Frozen)))
	}
	for _, f := range result.Frozen {
		d.Log.InfoContext(ctx, "frozen", "name", name, "filesystem", f.Filesystem, "milliseconds", f.Milliseconds, "by_backend", f.Itself)
	}
	for _, words := range result.Unverified {
		d.Log.WarnContext(ctx, "not verifiable", "name", name, "what", words)
	}
	all := make([]adapters.Snapshot, len(ids))
	for i, id := range ids {
		if all[i], err = request.Volumes[i].Adapter.Snapshot(ctx, id); err != nil {
			return nil, err
		}
	}
	return all, nil
}

// longest is the longest time that a filesystem stood still.
func longest(all []cut.FrozenFilesystem) time.Duration {
	var most float64
	for _, f := range all {
		most = max(most, f.Milliseconds)
	}
	return time.Duration(most * float64(time.Millisecond))
}

// tell tells the people of a VolumeSnapshot what happened to it, if the request is for one.
func (d *Driver) tell(q SourceQuery, e kube.Event) {
	if o, err := class.OriginOf(q.Parameters, q.Name); err == nil {
		d.Tell(o, e)
	}
}

// taken turns a cut's Busy into AlreadyExists where the name is taken, by a verified snapshot of another cut.
func (d *Driver) taken(ctx context.Context, err error, ids []adapters.SnapshotID) error {
	for _, id := range ids {
		a, e := d.Backends.find(id.Volume.Backend)
		if e != nil {
			continue
		}
		if s, e := a.Snapshot(ctx, id); e == nil && s.Mark == adapters.Verified {
			return status.Error(codes.AlreadyExists, err.Error())
		}
	}
	return err
}

// onlyOf refuses a name that a snapshot of another volume has: names of snapshots are the driver's, not a volume's.
func (d *Driver) onlyOf(ctx context.Context, name string, of adapters.VolumeID) error {
	for _, backend := range d.Backends.names() {
		for s, err := range d.Backends[backend].Adapter.Snapshots(ctx, adapters.Filter{}) {
			if err != nil {
				return fmt.Errorf("looking whether another snapshot has the name %q: %w", name, err)
			}
			if s.Wanted == name && s.ID.Volume != of {
				return status.Errorf(codes.AlreadyExists, "the name %q is that of the snapshot %s, of another volume; choose another name", name, s.ID)
			}
		}
	}
	return nil
}

// describe is a snapshot as CSI has it.
func describe(s adapters.Snapshot, source, group string) *csipb.Snapshot {
	return &csipb.Snapshot{
		SnapshotId: s.ID.String(), SourceVolumeId: source, GroupSnapshotId: group,
		SizeBytes: s.Size, CreationTime: timestamppb.New(s.Created), ReadyToUse: s.State == adapters.Ready,
	}
}

// describe is a snapshot that was looked up.
func (d *Driver) describe(ctx context.Context, s adapters.Snapshot) (*csipb.Snapshot, error) {
	source, err := d.Lookup.VolumeHandle(ctx, s)
	return describe(s, source, groupOf(s)), err
}

// DeleteSnapshot removes a snapshot of ours. What is no handle of ours, or not there, is success.
func (d *controller) DeleteSnapshot(ctx context.Context, r *csipb.DeleteSnapshotRequest) (*csipb.DeleteSnapshotResponse, error) {
	if r.GetSnapshotId() == "" {
		return nil, missing("snapshot_id")
	}
	if err := d.Backends.delete(ctx, r.GetSnapshotId()); err != nil {
		return nil, err
	}
	return &csipb.DeleteSnapshotResponse{}, nil
}

// delete removes a snapshot by its handle. One that is not ours stays, and is none for us.
func (b Backends) delete(ctx context.Context, handle string) error {
	id, a, err := b.snapshot(ctx, handle)
	if err == nil {
		err = a.DeleteSnapshot(ctx, id)
	}
	if fault.KindOf(err) == fault.Invalid { // is it not ours?
		if _, e := a.Snapshot(ctx, id); e != nil {
			err = e
		}
	}
	if fault.KindOf(err) == fault.NotFound {
		return nil
	}
	return err
}

// ListSnapshots lists all, those of a volume, or one, in the order of their handles. A page's token is the handle that it
// ended with, so that pages neither repeat nor skip what was there all the time.
func (d *controller) ListSnapshots(ctx context.Context, r *csipb.ListSnapshotsRequest) (*csipb.ListSnapshotsResponse, error) {
	if r.GetMaxEntries() < 0 {
		return nil, status.Error(codes.InvalidArgument, "max_entries is negative")
	}
	after, err := pageAfter(r.GetStartingToken())
	if err != nil {
		return nil, err
	}
	found, err := d.list(ctx, r.GetSnapshotId(), r.GetSourceVolumeId())
	if fault.KindOf(err) == fault.NotFound {
		return &csipb.ListSnapshotsResponse{}, nil
	}
	if err != nil {
		return nil, err
	}
	var all []*csipb.Snapshot
	for _, s := range found {
		described, err := d.describe(ctx, s)
		if fault.KindOf(err) == fault.Unsupported {
			continue // its volume cannot be named in CSI
		}
		if err != nil {
			return nil, err
		}
		all = append(all, described)
	}
	page, next := pageOf(all, after, int(r.GetMaxEntries()))
	response := &csipb.ListSnapshotsResponse{NextToken: next}
	for _, s := range page {
		response.Entries = append(response.Entries, &csipb.ListSnapshotsResponse_Entry{Snapshot: s})
	}
	return response, nil
}

// GetSnapshot looks one up.
func (d *controller) GetSnapshot(ctx context.Context, r *csipb.GetSnapshotRequest) (*csipb.GetSnapshotResponse, error) {
	if r.GetSnapshotId() == "" {
		return nil, missing("snapshot_id")
	}
	s, _, err := d.Backends.verified(ctx, r.GetSnapshotId())
	if err != nil {
		return nil, err
	}
	described, err := d.describe(ctx, s)
	return &csipb.GetSnapshotResponse{Snapshot: described}, err
}

// list finds the snapshots that a listing asks for.
func (d *controller) list(ctx context.Context, snapshot, volume string) ([]adapters.Snapshot, error) {
	if snapshot != "" {
		s, _, err := d.Backends.verified(ctx, snapshot)
		if err != nil {
			return nil, err
		}
		if volume != "" {
			if of, err := d.Lookup.VolumeHandle(ctx, s); err != nil || of != volume {
				return nil, err
			}
		}
		return []adapters.Snapshot{s}, nil
	}
	if volume == "" {
		return d.Backends.snapshots(ctx, adapters.Filter{}, d.Backends.names()...)
	}
	from, err := d.Lookup.Source(ctx, SourceQuery{Handle: volume, Own: true})
	if err != nil {
		return nil, err
	}
	return d.Backends.snapshots(ctx, adapters.Filter{Volume: from.ID}, from.ID.Backend)
}

// snapshots lists verified snapshots of backends.
func (b Backends) snapshots(ctx context.Context, f adapters.Filter, backends ...string) (all []adapters.Snapshot, err error) {
	for _, name := range backends {
		a, err := b.find(name)
		if err != nil {
			return nil, err
		}
		if f.Volume != (adapters.VolumeID{}) {
			v, err := a.Volume(ctx, f.Volume)
			switch {
			case err == nil:
				f.Volume = v.ID
			case errors.Is(err, fault.NotFound), errors.Is(err, fault.Unsupported): // it may have snapshots still
			default:
				return nil, err
			}
		}
		for s, err := range a.Snapshots(ctx, f) {
			if err != nil {
				return nil, err
			}
			all = append(all, s)
		}
	}
	return all, nil
}

// tokenPrefix begins the token of a page, and the last handle of the page before follows.
const tokenPrefix = "after:"

// pageAfter reads a token. Aborted, as the specification wants it, for what is none.
func pageAfter(token string) (string, error) {
	after, ok := strings.CutPrefix(token, tokenPrefix)
	if token != "" && !ok {
		return "", status.Errorf(codes.Aborted, "starting_token %q is not one of ours; begin anew without one", token)
	}
	return after, nil
}

// pageOf is the page of a listing that follows a handle, with at most so many entries if that is not 0, and the token of
// the next, empty if there is none.
func pageOf(all []*csipb.Snapshot, after string, most int) (page []*csipb.Snapshot, next string) {
	slices.SortFunc(all, func(a, b *csipb.Snapshot) int { return cmp.Compare(a.GetSnapshotId(), b.GetSnapshotId()) })
	begin, found := slices.BinarySearchFunc(all, after, func(s *csipb.Snapshot, id string) int { return cmp.Compare(s.GetSnapshotId(), id) })
	if found {
		begin++
	}
	page = all[begin:]
	if most > 0 && len(page) > most {
		page = page[:most]
		next = tokenPrefix + page[most-1].GetSnapshotId()
	}
	return page, next
}
