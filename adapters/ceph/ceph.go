// Package ceph has the adapters for Ceph: ceph-rbd, whose volumes are RBD images, and ceph-fs, whose volumes are trees of files
// in CephFS (fs_kind.go says what is its own). They call Ceph's own libraries, so they
// are in a binary only if it was built with cgo, the headers of librados and librbd, and the build tag ceph, together
// with the tag of Ceph's release where that is an old one (-tags ceph,pacific with the libraries of Debian 12; see the
// README of go-ceph). In any other binary the registry's row is there all the same and says how to get the adapter.
//
// # Names
//
// A volume is POOL/IMAGE, or POOL/NAMESPACE/IMAGE for an image in a namespace of RADOS; what a person types is canonical
// but for two things. With the parameter pool an id without a slash is an image of that pool. And the volume handle of a
// PersistentVolume of ceph-csi may stand in an id's place, 0001-0024-…: it names its pool by number and its image by a
// UUID (csi.go). The image's name is what names a volume: an image that is renamed becomes another one, and takes its
// snapshots along.
//
// # Where marks are
//
// In the metadata of the image (rbd image-meta), under a key that has the snapshot's number: what the snapshot is
// (image, wanted name, mark, notes), in JSON. The record names the image by its internal id, because a clone starts with
// a copy of its parent's metadata. A snapshot without such a record is not ours; nor is one in another namespace of
// snapshots (a group's, a mirror's, the trash).
//
// # Steps, and what a crash leaves
//
// A snapshot is taken under a name that nobody else has (.stillpoint.NAME.NONCE), gets its record, and last its own
// name, by a renaming that fails if that is taken. So what has a name of ours is whole, and its record was written
// for it: no race makes a stranger's snapshot ours. What a crash leaves has the long name; Publish and DeleteSnapshot
// remove it once it is old enough to be nobody's work. Snapshots are deleted by number. One that has clones is moved to
// the trash by Ceph when it is deleted, and goes with the last of them; where the clones are of the old kind (version
// 1), or somebody protected it, it is Busy.
//
// A restore makes an image .stillpoint-restore-HASH in the pool of the volume that is to be, and renames it at Commit. What
// fills an image says in the image's metadata which process on which boot of which kernel it is, and which client of Ceph:
// when that process is known to have died, the next one shuts its client out rather than waiting until Ceph has noticed
// (holder.go). Records whose snapshot is gone, and what a clone has of its parent's records, go with the next publication or
// deletion (sweep.go).
//
// The changes of one image come one after the other, within a process (turns) and among all that are Stillpoint's
// (turn.go): clients that change an image at once have to take its exclusive lock from each other.
//
// # Changed blocks
//
// Ceph answers the question in two ways. By its object maps it knows in a millisecond which objects changed, of 4 MiB
// usually; by asking for an object's snapshots it knows exactly which bytes did. The adapter reads the maps of the
// snapshots in question itself and asks exactly only within objects that changed, many at once (delta.go). Without
// object maps, with an invalid one, with striping, and where the sizes show that the image shrank in between, it asks
// about every object.
//
// # Never hanging
//
// A call into Ceph's libraries cannot be cancelled. Every one runs in a goroutine of its own; when its context ends
// first, the caller goes and the call is left to itself: it undoes what it made, closes what it opened, and ends by the
// libraries' own time limits. While one that was left runs on for more than a second, the backend answers Unavailable
// without asking Ceph (calls.go).
package ceph

import (
	"stillpoint.io/stillpoint/adapters"
)

// RBD is the row of the adapter ceph-rbd in the registry.
func RBD() adapters.Kind {
	return adapters.Kind{
		Name:    "ceph-rbd",
		Summary: "RBD images of a Ceph cluster" + lacking,
		Keys: append(connectionKeys(),
			adapters.Key{Name: "pool", Usage: "the pool that the backend is limited to, and that ids without a slash are in; default: every pool"},
			adapters.Key{Name: "diff", Usage: "how changed blocks are found: auto (object maps, then exactly within changed objects) or exact (every object is asked); default: auto"},
		),
		Open:    openRBD,
		Drivers: []string{rbdDriver, "*." + rbdDriver},
		Resolve: resolveRBD,
	}
}
