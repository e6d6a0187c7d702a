package backup

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/repository"
	"stillpoint.io/stillpoint/fault"
)

// sources are the snapshots that backups were made of, and others of the same volumes, open.
type sources struct {
	adapter func(ctx context.Context, backend string) (adapters.Adapter, error)
	volumes map[adapters.VolumeID][]source
	why     map[adapters.VolumeID]string // there are none
}

// source is a snapshot that can be read.
type source struct {
	id       adapters.SnapshotID
	snapshot adapters.Snapshot
	adapter  adapters.Adapter
	image    adapters.Image // of a volume that is blocks
	tree     adapters.Tree  // of one that is files
}

func newSources(adapter func(context.Context, string) (adapters.Adapter, error)) *sources {
	return &sources{adapter: adapter, volumes: map[adapters.VolumeID][]source{}, why: map[adapters.VolumeID]string{}}
}

// of gives the snapshots of a backup's volume, the one that it was made of first, the others from the newest. If there
// are none it says why.
func (s *sources) of(ctx context.Context, b repository.Backup) ([]source, string, error) {
	if _, ok := s.volumes[b.Volume]; !ok {
		all, err := s.open(ctx, b.Volume)
		if ctx.Err() != nil {
			return nil, "", ctx.Err()
		}
		s.volumes[b.Volume] = all
		switch {
		case err != nil:
			s.why[b.Volume] = err.Error()
		case len(all) == 0:
			s.why[b.Volume] = fmt.Sprintf("the backend has no snapshot of %s any more", b.Volume)
		}
	}
	all := slices.DeleteFunc(slices.Clone(s.volumes[b.Volume]), func(x source) bool { return x.snapshot.Form != b.Form })
	if why := s.why[b.Volume]; len(all) == 0 && why == "" {
		return nil, fmt.Sprintf("the backend has no snapshot of %s of the form %s any more", b.Volume, b.Form), nil
	}
	slices.SortStableFunc(all, func(x, y source) int {
		if own := isOf(b, x.snapshot); own != isOf(b, y.snapshot) {
			if own {
				return -1
			}
			return 1
		}
		return y.snapshot.Created.Compare(x.snapshot.Created)
	})
	return all, s.why[b.Volume], nil
}

func (s *sources) open(ctx context.Context, v adapters.VolumeID) ([]source, error) {
	a, err := s.adapter(ctx, v.Backend)
	if err != nil {
		return nil, err
	}
	var all []source
	var failed error
	for snapshot, err := range a.Snapshots(ctx, adapters.Filter{Volume: v}) {
		if err != nil {
			return all, errors.Join(failed, err)
		}
		if snapshot.State != adapters.Ready || snapshot.Mark != adapters.Verified {
			continue
		}
		from, err := openSource(ctx, a, snapshot)
		if err != nil {
			failed = errors.Join(failed, err)
			continue
		}
		all = append(all, from)
	}
	return all, failed
}

func openSource(ctx context.Context, a adapters.Adapter, snapshot adapters.Snapshot) (from source, err error) {
	from = source{id: snapshot.ID, snapshot: snapshot, adapter: a}
	opener, images := adapters.As[adapters.Opener](a)
	trees, files := adapters.As[adapters.Trees](a)
	switch {
	case snapshot.Form == adapters.TreeForm && files:
		from.tree, err = trees.OpenTree(ctx, snapshot.ID, nil)
	case snapshot.Form == adapters.BlockForm && images:
		from.image, err = opener.Open(ctx, snapshot.ID)
	default:
		err = fault.Errorf(fault.Unsupported, "backend %s cannot open snapshots", snapshot.ID.Volume.Backend)
	}
	return from, err
}

// Close releases the snapshot.
func (s source) Close() error {
	if s.tree != nil {
		return s.tree.Close()
	}
	return s.image.Close()
}

func (s *sources) close() error {
	var errs []error
	for _, all := range s.volumes {
		for _, from := range all {
			errs = append(errs, from.Close())
		}
	}
	return errors.Join(errs...)
}
