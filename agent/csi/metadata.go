package csi

import (
	"context"
	"errors"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/cbt"
	"stillpoint.io/stillpoint/fault"
)

type metadata struct {
	csipb.UnimplementedSnapshotMetadataServer
	*Driver
}

// errNoPair is the one answer for base and target that cannot be compared by whoever asks, whatever the reason: it does not
// tell what exists.
var errNoPair = status.Error(codes.NotFound, "base_snapshot_id and target_snapshot_id are not two snapshots of one volume here")

// GetMetadataAllocated streams the ranges of a snapshot that hold data.
func (d *metadata) GetMetadataAllocated(r *csipb.GetMetadataAllocatedRequest, stream csipb.SnapshotMetadata_GetMetadataAllocatedServer) error {
	if r.GetSnapshotId() == "" {
		return missing("snapshot_id")
	}
	ctx, cancel := context.WithTimeoutCause(stream.Context(), d.StreamLimit, errStreamLimit)
	defer cancel()
	s, a, err := d.Backends.verified(ctx, r.GetSnapshotId())
	if err != nil {
		return err
	}
	b, err := d.blocks(a, s, r.GetStartingOffset(), r.GetMaxResults())
	if err != nil {
		return err
	}
	delta, err := b.differ.Allocated(ctx, s.ID, b.From)
	if err != nil {
		return err
	}
	return b.send(ctx, delta.Extents, false, func(page []*csipb.BlockMetadata) error {
		return stream.Send(&csipb.GetMetadataAllocatedResponse{BlockMetadataType: b.style(), VolumeCapacityBytes: s.Size, BlockMetadata: page})
	})
}

// GetMetadataDelta streams the ranges in which target differs from base, those that became zero included.
func (d *metadata) GetMetadataDelta(r *csipb.GetMetadataDeltaRequest, stream csipb.SnapshotMetadata_GetMetadataDeltaServer) error {
	switch {
	case r.GetBaseSnapshotId() == "":
		return missing("base_snapshot_id")
	case r.GetTargetSnapshotId() == "":
		return missing("target_snapshot_id")
	}
	ctx, cancel := context.WithTimeoutCause(stream.Context(), d.StreamLimit, errStreamLimit)
	defer cancel()
	base, target, a, err := d.pair(ctx, r.GetBaseSnapshotId(), r.GetTargetSnapshotId())
	if err != nil {
		return err
	}
	b, err := d.blocks(a, target, r.GetStartingOffset(), r.GetMaxResults())
	if err != nil {
		return err
	}
	delta, err := b.differ.Changed(ctx, base.ID, target.ID, b.From)
	if err != nil {
		return err
	}
	return b.send(ctx, delta.Extents, true, func(page []*csipb.BlockMetadata) error {
		return stream.Send(&csipb.GetMetadataDeltaResponse{BlockMetadataType: b.style(), VolumeCapacityBytes: target.Size, BlockMetadata: page})
	})
}

// pair finds two snapshots of one volume that the asker may compare.
func (d *metadata) pair(ctx context.Context, one, other string) (base, target adapters.Snapshot, a adapters.Adapter, err error) {
	if base, _, err = d.Backends.verified(ctx, one); err == nil {
		target, a, err = d.Backends.verified(ctx, other)
	}
	if err == nil && base.ID.Volume == target.ID.Volume {
		err = d.Lookup.Related(ctx, one, other)
	} else if err == nil {
		err = errNoPair
	}
	if fault.KindOf(err) == fault.NotFound {
		err = errNoPair
	}
	return base, target, a, err
}

var errStreamLimit = errors.New("the time that a stream may take is over; go on with a starting_offset behind the last range received")

// request is one call for metadata.
type request struct {
	layout
	differ adapters.Differ
	page   int // tuples in a message, at most
}

// Pages are as large as is worth a message, and far below gRPC's 4 MiB: a tuple has at most 22 bytes.
const (
	pageDefault = 4096
	pageMax     = 16384
)

// blocks checks what a request wants of a snapshot.
func (d *metadata) blocks(a adapters.Adapter, s adapters.Snapshot, from int64, most int32) (request, error) {
	differ, ok := adapters.As[adapters.Differ](a)
	switch {
	case most < 0:
		return request{}, status.Error(codes.InvalidArgument, "max_results is negative")
	case !ok || s.Form != adapters.BlockForm:
		return request{}, fault.Errorf(fault.Unsupported, "changed blocks of %s cannot be had: it is a tree of files, or its backend cannot tell; make a full backup", s.ID)
	case from < 0 || from > s.Size:
		return request{}, status.Errorf(codes.OutOfRange, "starting_offset %d is not within the volume's %d bytes", from, s.Size)
	}
	r := request{layout: newLayout(s.Size, from, d.MetadataBlock), differ: differ, page: pageDefault}
	if most > 0 {
		r.page = min(int(most), pageMax)
	}
	return r, nil
}

func (r request) style() csipb.BlockMetadataType {
	if r.Block > 0 {
		return csipb.BlockMetadataType_FIXED_LENGTH
	}
	return csipb.BlockMetadataType_VARIABLE_LENGTH
}

// send streams ranges in pages. There is always a page, so that the volume's capacity is told even if nothing is in it.
func (r request) send(ctx context.Context, extents cbt.Seq, zeros bool, send func([]*csipb.BlockMetadata) error) error {
	page, sent := make([]*csipb.BlockMetadata, 0, r.page), false
	flush := func() error {
		err := send(page)
		page, sent = make([]*csipb.BlockMetadata, 0, r.page), true // gRPC may still hold the old one
		return err
	}
	for e, err := range r.ranges(extents, zeros) {
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return streamError(ctx, err)
		}
		page = append(page, &csipb.BlockMetadata{ByteOffset: e.Offset, SizeBytes: e.Length})
		if len(page) == r.page {
			if err := flush(); err != nil {
				return err
			}
		}
	}
	if len(page) > 0 || !sent {
		return flush()
	}
	return nil
}

// streamError says how to go on when the stream's time is over.
func streamError(ctx context.Context, err error) error {
	if errors.Is(context.Cause(ctx), errStreamLimit) {
		return status.Error(codes.DeadlineExceeded, errStreamLimit.Error())
	}
	return err
}
