package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
	"stillpoint.io/stillpoint/integration/ceph"
	"stillpoint.io/stillpoint/integration/lab"
	"stillpoint.io/stillpoint/integration/vm"
)

// grounds is what the demo's volumes are on.
type grounds struct {
	backend string
	thin    lab.ThinPool
	cluster *ceph.Cluster
	images  *ceph.Images // of the cluster
}

// volume is a mounted volume, or one that is restored to and not mounted.
type volume struct {
	id   adapters.VolumeID
	fs   *lab.Filesystem // nil if it is not mounted
	path string          // its file or device
}

func newGrounds(ctx context.Context, backend string) (g grounds, err error) {
	g.backend = backend
	switch backend {
	case "reflink":
		return g, nil
	case "lvm-thin":
		g.thin, err = lab.MakeThinPool(ctx, "stillpoint-demo", vm.Disks()[0])
		return g, err
	case "ceph-rbd":
		if g.cluster, err = ceph.Start(ctx, ceph.Options{}); err != nil {
			return g, err
		}
		if g.images, err = g.cluster.Images(ctx, imagePool); err != nil {
			return g, errors.Join(err, g.cluster.Close())
		}
		return g, nil
	}
	return g, fault.Errorf(fault.Invalid, "there is no demo on %q: on reflink, on lvm-thin, or on ceph-rbd", backend)
}

const imagePool = "rbd"

// close is called when the lab is closed, which removes the thin volumes.
func (g grounds) close() error {
	switch {
	case g.thin != "":
		return g.thin.Close()
	case g.cluster != nil:
		return errors.Join(g.images.Close(), g.cluster.Close())
	}
	return nil
}

func (g grounds) title() string {
	const file = "a pool of files (XFS with reflink) with a volume (ext4, on a loop device), and "
	switch {
	case g.thin != "":
		return file + "a thin pool of LVM with another (XFS), all mounted"
	case g.cluster != nil:
		return file + "a Ceph cluster with another (XFS on an RBD image, by rbd-fuse and a loop device), all mounted"
	}
	return "a pool (XFS with reflink, in a sparse file) with two volumes (ext4 and XFS, on loop devices), all mounted"
}

// backends are the parameters of the backends that the demo needs.
func (g grounds) backends() map[string]map[string]string {
	all := map[string]map[string]string{"reflink": {}}
	if g.backend != "reflink" {
		all[g.backend] = map[string]string{}
	}
	if g.cluster != nil {
		all[g.backend] = map[string]string{"conf": g.cluster.Conf, "fuse": imagePool + "=" + g.images.Folder}
	}
	return all
}

// rate is how many bytes a second the writer writes: less where a guest's one processor does everything.
func (g grounds) rate() int64 {
	if g.thin == "" {
		return 20 * mib
	}
	return 5 * mib
}

// volumes makes the two that are cut.
func (g grounds) volumes(ctx context.Context, l *lab.Lab) ([]volume, error) {
	pool, err := l.Pool(ctx, "pool", "xfs", poolSize)
	if err != nil {
		return nil, err
	}
	first, err := l.Volume(ctx, pool.Mount, "volume-ext4", "ext4", volumeSize)
	if err != nil {
		return nil, err
	}
	const fstype, name = "xfs", "volume-xfs"
	var second *lab.Filesystem
	switch {
	case g.thin != "":
		second, err = g.thin.In(l)(ctx, name, fstype, volumeSize)
	case g.cluster != nil:
		second, err = g.images.In(l)(ctx, name, fstype, volumeSize)
	default:
		second, err = l.Volume(ctx, pool.Mount, name, fstype, volumeSize)
	}
	if err != nil {
		return nil, err
	}
	switch {
	case g.thin != "":
		return []volume{onFile(first), {thinID(second.Thin), second, second.Device}}, nil
	case g.cluster != nil:
		return []volume{onFile(first), {imageID(name), second, second.File}}, nil
	}
	return []volume{onFile(first), onFile(second)}, nil
}

// beside makes the volume that another one's backup is restored to: of the same kind, full of old bytes.
func (v volume) beside(ctx context.Context, l *lab.Lab, g grounds) (volume, error) {
	switch v.id.Backend {
	case "lvm-thin":
		t, err := g.thin.Volume(ctx, l, "restored", volumeSize)
		if err != nil {
			return volume{}, err
		}
		return volume{id: thinID(t), path: t.Device()}, fill(t.Device())
	case "ceph-rbd": // not through rbd-fuse: what that has open is in use
		const name = "restored"
		old := filepath.Join(l.Dir, "old")
		if err := errors.Join(lab.Sparse(old, volumeSize), fill(old)); err != nil {
			return volume{}, err
		}
		out, err := g.cluster.Command(ctx, "rbd", "import", "--no-progress", old, imagePool+"/"+name).CombinedOutput()
		if err != nil {
			err = fmt.Errorf("rbd import: %w: %s", err, out)
		}
		return volume{id: imageID(name), path: g.images.File(name)}, errors.Join(err, os.Remove(old))
	}
	path := filepath.Join(filepath.Dir(v.fs.File), fmt.Sprintf("restored-%s.img", v.fs.Type))
	return volume{id: fileID(path), path: path}, errors.Join(lab.Sparse(path, volumeSize), fill(path))
}

func onFile(fs *lab.Filesystem) volume { return volume{fileID(fs.File), fs, fs.File} }

func fileID(path string) adapters.VolumeID { return adapters.VolumeID{Backend: "reflink", ID: path} }
func imageID(name string) adapters.VolumeID {
	return adapters.VolumeID{Backend: "ceph-rbd", ID: imagePool + "/" + name}
}
func thinID(v lab.ThinVolume) adapters.VolumeID {
	return adapters.VolumeID{Backend: "lvm-thin", ID: string(v)}
}
