package csi

import (
	"context"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/kube/class"
	"stillpoint.io/stillpoint/fault"
)

// Lookup knows what only the orchestrator does: whose volume a handle is, and who may see what. Standalone is the one for a
// driver all of whose volumes are of its own backends, Kubernetes the one for a cluster.
type Lookup interface {
	// Source finds the volume that is to be snapshotted. NotFound if the orchestrator knows no such volume, Invalid if what
	// it knows contradicts the request.
	Source(ctx context.Context, q SourceQuery) (Source, error)

	// VolumeHandle is the orchestrator's handle of a snapshot's volume: what a response gives as its source.
	VolumeHandle(ctx context.Context, s adapters.Snapshot) (string, error)

	// Related says that whoever may read the snapshot target, which is all that was asked when the call came, may read base
	// too. NotFound if not, without a word more.
	Related(ctx context.Context, base, target string) error
}

// SourceQuery is what a request says of a volume.
type SourceQuery struct {
	Handle string // the orchestrator's handle of the volume
	// Own says that only a volume of this driver itself can be meant: it is cloned, its snapshots are listed, or it is of
	// a group, in which the snapshot controller takes no others.
	Own        bool
	Name       string            // of the snapshot or the group that is wanted
	Class      class.Class       // how it is wanted
	Parameters map[string]string // the request's, with what a sidecar added
}

// Source is a volume that was looked up.
type Source struct {
	ID adapters.VolumeID // need not be canonical
	// Unique says that no other volume can have a snapshot of this name: the name holds the UID of an object which the
	// orchestrator says is of this volume.
	Unique bool
}

// Standalone is the Lookup of a driver whose volumes all have handles of its own, and one tenant.
type Standalone struct{ Backends Backends }

// Source reads the handle.
func (s Standalone) Source(_ context.Context, q SourceQuery) (Source, error) {
	id, _, err := s.Backends.volume(q.Handle)
	return Source{ID: id}, err
}

// VolumeHandle is the volume's own.
func (s Standalone) VolumeHandle(_ context.Context, snapshot adapters.Snapshot) (string, error) {
	handle := snapshot.ID.Volume.String()
	if len(handle) > adapters.HandleMax {
		return "", fault.Errorf(fault.Unsupported, "volume %s: its handle is longer than the %d bytes that CSI allows", handle, adapters.HandleMax)
	}
	return handle, nil
}

// Related is always so.
func (s Standalone) Related(context.Context, string, string) error { return nil }
