package main

import (
	"context"
	"fmt"
	"path/filepath"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
	"stillpoint.io/stillpoint/integration/lab"
	"stillpoint.io/stillpoint/integration/vm"
)

// grounds is what the demo's volumes are on.
type grounds struct {
	backend string
	thin    lab.ThinPool
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
	}
	return g, fault.Errorf(fault.Invalid, "there is no demo on %q: on reflink, or on lvm-thin", backend)
}

// close is called when the lab is closed, which removes the thin volumes.
func (g grounds) close() error {
	if g.thin == "" {
		return nil
	}
	return g.thin.Close()
}

func (g grounds) title() string {
	if g.thin == "" {
		return "a pool (XFS with reflink, in a sparse file) with two volumes (ext4 and XFS, on loop devices), all mounted"
	}
	return "a pool of files (XFS with reflink) with a volume (ext4, on a loop device), and a thin pool of LVM with another (XFS), all mounted"
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
	if g.thin == "" {
		second, err := l.Volume(ctx, pool.Mount, "volume-xfs", "xfs", volumeSize)
		return []volume{onFile(first), onFile(second)}, err
	}
	second, err := g.thin.In(l)(ctx, "volume-xfs", "xfs", volumeSize)
	if err != nil {
		return nil, err
	}
	return []volume{onFile(first), {thinID(second.Thin), second, second.Device}}, nil
}

// beside makes the volume that another one's backup is restored to: of the same kind, with whatever is in it.
func (v volume) beside(ctx context.Context, l *lab.Lab, g grounds) (volume, error) {
	if v.fs.Thin != "" {
		t, err := g.thin.Volume(ctx, l, "restored", volumeSize)
		return volume{id: thinID(t), path: t.Device()}, err
	}
	path := filepath.Join(filepath.Dir(v.fs.File), fmt.Sprintf("restored-%s.img", v.fs.Type))
	return volume{id: fileID(path), path: path}, lab.Sparse(path, volumeSize)
}

func onFile(fs *lab.Filesystem) volume { return volume{fileID(fs.File), fs, fs.File} }

func fileID(path string) adapters.VolumeID { return adapters.VolumeID{Backend: "reflink", ID: path} }
func thinID(v lab.ThinVolume) adapters.VolumeID {
	return adapters.VolumeID{Backend: "lvm-thin", ID: string(v)}
}
