package adapters

import (
	"context"
	"regexp"
)

// Provisioner is an adapter that makes, grows, attaches and deletes volumes of its own: with one, Stillpoint is a whole CSI
// driver for its volumes. Made for somebody are the volumes that Begin or BeginClone was given an Origin for; the backend
// keeps it with the volume. All others are somebody else's: they are neither grown nor attached nor deleted, Invalid.
type Provisioner interface {
	// Place is the id of the volume that is to be made for a wanted name, or has been, in the place that the backend has for
	// new volumes. Unsupported: its configuration names no such place.
	Place(ctx context.Context, wanted string) (VolumeID, error)

	// Origin is what the volume was made for. NotFound, or Invalid where it was not made by us.
	Origin(ctx context.Context, id VolumeID) (Origin, error)

	// Grow makes the volume at least size bytes large, and its device where it is attached; the filesystem on it is the
	// caller's to grow. A volume that is as large already is left alone. What is new reads as zeros.
	Grow(ctx context.Context, id VolumeID, size int64) (Volume, error)

	// Attach makes the volume a block device of this node, whose path it returns. Twice is once, also by two processes and
	// after the death of one. Busy: somebody else has attached it.
	Attach(ctx context.Context, id VolumeID) (path string, err error)

	// Detach takes the device away. A volume that is not attached, or not there, is success; one that is mounted or open
	// is Busy.
	Detach(ctx context.Context, id VolumeID) error

	// DeleteVolume removes the volume; its snapshots stay. One that does not exist is success, one that is attached or in
	// use is Busy, and if the locality is not reachable from here the answer is Unavailable.
	DeleteVolume(ctx context.Context, id VolumeID) error
}

// Origin says for whom a volume was made. The zero Origin is that of volumes which are nobody's to delete.
type Origin struct {
	Name   string `json:"name"`             // the wanted name; the volume's own is VolumeName of it
	Source string `json:"source,omitempty"` // handle of the snapshot or volume whose content it began with
}

// volumeNameMax leaves room for a locality and a backend's name in the 128 bytes of a handle, and holds pvc-<UUID>.
const volumeNameMax = 40

var plainVolumeName = regexp.MustCompile(`^[a-z][a-z0-9-]*$`)

// VolumeName is a wanted name as every backend can keep it: itself if it is at most 40 of [a-z0-9-] and begins with a
// letter, its ShortName with a letter before it if not.
func VolumeName(wanted string) string {
	if len(wanted) <= volumeNameMax && plainVolumeName.MatchString(wanted) {
		return wanted
	}
	return "v" + ShortName(wanted)
}
