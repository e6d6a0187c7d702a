package adapters

import (
	"context"
	"fmt"

	"stillpoint.io/stillpoint/fault"
)

// Resolve finds the snapshot that a handle means: its canonical id. A handle in the short form is searched for among
// all snapshots of the backend, those still cutting included, and NotFound if it is not one of theirs. In the long
// form the volume's id may be one that a person typed. Resolve does not say that such a snapshot exists. Handles of
// volumes are Invalid.
func Resolve(ctx context.Context, a Adapter, h Handle) (SnapshotID, error) {
	switch {
	case h.Short != "":
		for s, err := range a.Snapshots(ctx, Filter{Cutting: true}) {
			if err != nil {
				return SnapshotID{}, fmt.Errorf("looking for snapshot %s:~%s: %w", h.Volume.Backend, h.Short, err)
			}
			if ShortName(s.ID.Full()) == h.Short {
				return s.ID, nil
			}
		}
		return SnapshotID{}, fault.Errorf(fault.NotFound, "snapshot %s:~%s: no snapshot of this backend has that short handle", h.Volume.Backend, h.Short)
	case h.Name == "":
		return SnapshotID{}, fault.Errorf(fault.Invalid, "%s is a volume, a snapshot is wanted: %s@NAME", h.Volume, h.Volume)
	}
	id := SnapshotID{Volume: h.Volume, Name: h.Name}
	v, err := a.Volume(ctx, h.Volume)
	switch {
	case err == nil:
		id.Volume = v.ID
	case fault.KindOf(err) != fault.NotFound && fault.KindOf(err) != fault.Unsupported: // such a volume may have snapshots still
		return SnapshotID{}, err
	}
	return id, nil
}
