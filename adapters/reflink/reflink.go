// Package reflink is the embedded backend: a volume is a regular file on a filesystem that shares blocks between files
// (XFS with reflink, btrfs), a snapshot is a clone of that file beside it (FICLONERANGE), and what changed follows from
// the addresses of the two files' extents. It needs no service and no configuration, but root: marks are trusted
// extended attributes, and published snapshots are immutable files.
//
// # Names
//
// A person writes a path, reflink:/srv/pool/disk.img. The canonical id is the filesystem's UUID and the path inside that
// filesystem, reflink:1f0c…/disk.img, whatever mount point, bind mount or symlink was used to write it; on btrfs that
// path starts at the top of the filesystem, above all subvolumes. The UUID is the locality. Two mounted filesystems with
// one UUID (a block copy that was mounted with nouuid) are ambiguous, and refused.
//
// On btrfs a subvolume is a volume too: one that is a tree of files. Its snapshot is a read-only snapshot of btrfs, one
// instant of all files in it without any freeze, and what changed follows from generations (generations.go). Subvolumes in
// it are volumes of their own and not part of it. A plain directory is no volume: no filesystem makes a snapshot of one.
//
// The path is what names a volume: a file that is moved becomes another volume, and its snapshots stay those of the old
// path. A hard link is a second volume with the same data; being in use is a matter of the file and noticed through
// every link.
//
// # Where snapshots are
//
// In a folder .stillpoint (root's, 0700) in the root of the uppermost mount that shows the volume, as files named
// <hash of the volume's id>.<snapshot name>. Who sees more of the filesystem later still finds them: every folder above
// the volume is looked into. What the snapshot is (volume, wanted name, mark, size, time, notes) is one extended
// attribute, trusted.stillpoint.snapshot, in JSON. A file without it, or one whose attribute says that it belongs
// elsewhere (a copy of the folder, a btrfs snapshot of its subvolume), is not ours.
//
// # Steps, and what a crash leaves
//
// A snapshot is made in an unnamed file (O_TMPFILE), which the kernel removes when its process dies, and gets its name
// last, by a link that fails if the name is taken. So there is either a whole snapshot or nothing, without locks and
// without sweeping. The snapshot of a subvolume is a folder beside its file, <file>.tree, made after the file and removed
// before it: a file without its folder counts for nothing, and is removed by the next who wants the name. Publish makes clone and data durable before it writes the mark. After a power failure a snapshot is
// there with the mark it had, or it was not published and is gone.
//
// The clone of a file costs about 14 µs for each of its extents, and all of it would be spent with the volume's
// filesystem frozen. Stage clones ahead into an unnamed file; CreateSnapshot then clones only the ranges in which the
// volume and that file differ.
package reflink

import (
	"context"
	"path"
	"strings"
	"sync"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/cbt"
	"stillpoint.io/stillpoint/cbt/audit"
	"stillpoint.io/stillpoint/fault"
)

// Kind is the adapter's row in the registry.
func Kind() adapters.Kind {
	return adapters.Kind{
		Name:    "reflink",
		Summary: "disk images on XFS or btrfs, snapshotted as reflink clones beside them, and subvolumes of btrfs",
		Keys: []adapters.Key{
			{Name: "pools", Usage: "mount points, separated by commas, that the backend is limited to; default: every XFS and btrfs of the node"},
			{Name: "volumes", Usage: "folder on XFS or btrfs for the volumes that a StorageClass asks for, readable by root only; default: none, so that there are no such volumes"},
		},
		Open:    open,
		Drivers: []string{rawfile},
		Resolve: resolve,
	}
}

// Adapter is the backend on this node. Between calls it holds nothing open but what is staged.
type Adapter struct {
	backend string
	pools   []string // mount points it is limited to; none: no limit
	volumes string   // folder of new volumes; empty: none

	mu     sync.Mutex
	staged map[stage]*draft
}

func open(_ context.Context, c adapters.Config) (adapters.Adapter, error) {
	params, err := Kind().Params(c)
	if err != nil {
		return nil, err
	}
	a := &Adapter{backend: c.Name, staged: map[stage]*draft{}}
	if _, given := c.Parameters["pools"]; given {
		for p := range strings.SplitSeq(params.String("pools", ""), ",") {
			p = strings.TrimSpace(p)
			if !path.IsAbs(p) {
				return nil, fault.Errorf(fault.Invalid, "backend %s: pools: %q is not an absolute path of a mount point", c.Name, p)
			}
			a.pools = append(a.pools, path.Clean(p))
		}
	}
	if _, given := c.Parameters["volumes"]; given {
		if a.volumes = path.Clean(params.String("volumes", "")); !path.IsAbs(a.volumes) {
			return nil, fault.Errorf(fault.Invalid, "backend %s: volumes: %q is not an absolute path of a folder", c.Name, a.volumes)
		}
	}
	return a, nil
}

// Capabilities describes the adapter.
func (a *Adapter) Capabilities() adapters.Capabilities {
	return adapters.Capabilities{
		Quiesce:     "the filesystem on the volume is frozen by the cut; the clone itself is one instant, because it locks the file; the snapshot of a subvolume is one instant of all its files",
		Changed:     "extent addresses (FIEMAP) of the two files, exact to the filesystem's block; generations of inodes between snapshots of a subvolume, exact to the file",
		PointInTime: "the return of ioctl_ficlonerange(2): later writes to the volume go to other blocks; that of BTRFS_IOC_SNAP_CREATE_V2 for a subvolume",
		Confidence:  cbt.Exact,
		Source:      audit.Source{Name: "fiemap"},
		NodeLocal:   true,
	}
}

// Close throws away what is still staged.
func (a *Adapter) Close() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	for key, d := range a.staged {
		d.close()
		delete(a.staged, key)
	}
	return nil
}
