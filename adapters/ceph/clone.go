//go:build ceph && cgo

package ceph

import (
	"context"
	"fmt"

	"github.com/ceph/go-ceph/rados"
	"github.com/ceph/go-ceph/rbd"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

// BeginClone makes a clone of the snapshot, in any pool and namespace of the cluster.
//
// The clone has the snapshot's data from there until it has written its own (copy on write); it is not flattened, which
// would copy all of it after all. Clones are of version 2, as ceph-csi's: a snapshot that has some can be deleted, Ceph
// keeps it in its trash until the last of them is deleted or flattened. What it cannot do until then is remove the image
// that the snapshot is of. Where the configuration demands version 1, whose clones keep their snapshot, the answer is
// Unsupported; so it is where the snapshot's image is itself the last of a long chain of clones, each of which a read may
// have to ask.
func (a *Adapter) BeginClone(ctx context.Context, id adapters.SnapshotID, spec adapters.VolumeSpec) (adapters.Target, error) {
	if spec.Token == "" || spec.Overwrite {
		return nil, fault.Errorf(fault.Invalid, "volume %s: a clone is a new volume, and needs a token", spec.ID)
	}
	return callOn(ctx, a, spec.ID, "", func(one *call, name imageName) (adapters.Target, error) {
		of, err := a.originOf(one, id)
		if err != nil {
			return nil, fmt.Errorf("a clone of the snapshot %s: %w", id, err)
		}
		if spec.Size < of.found.size {
			return nil, fault.Errorf(fault.Invalid, "a clone of %s has at least its %d bytes, not %d", id, of.found.size, spec.Size)
		}
		return a.begin(one, name, spec, of)
	})
}

// origin is the snapshot that a clone is made of. The image is open as long as the call that looked it up runs.
type origin struct {
	image *image
	found found
	text  string
}

// depthMax is how many clones a chain may have. Kernels open at most 16 (rbd_dev_probe_parent() of drivers/block/rbd.c),
// and ceph-csi begins to flatten at 4.
const depthMax = 4

// originOf looks up a snapshot of ours that is to be cloned.
func (a *Adapter) originOf(one *call, id adapters.SnapshotID) (*origin, error) {
	name, err := a.resolve(one, id.Volume)
	if err != nil {
		return nil, err
	}
	if err := checkName(id); err != nil {
		return nil, err
	}
	m, err := a.cluster.open(one, name, forReading)
	if err != nil {
		return nil, err
	}
	one.later(m.release)
	f, err := m.find(id.Name)
	if err == nil && (f == nil || !f.mine) {
		err = notFound()
	}
	if err != nil {
		return nil, err
	}
	features, err := m.rbd.GetFeatures()
	if err != nil {
		return nil, err
	}
	if features&rbd.FeatureLayering == 0 {
		return nil, fault.Errorf(fault.Unsupported, "its image has not the feature layering")
	}
	if version, err := m.connection.rados.GetConfigOption("rbd_default_clone_format"); err != nil || version == "1" {
		return nil, fault.Errorf(fault.Unsupported, "the cluster's configuration demands clones of version 1 (rbd_default_clone_format), which keep their snapshots from being deleted")
	}
	depth, err := m.depth(one, f.number)
	if err == nil && depth >= depthMax {
		err = fault.Errorf(fault.Unsupported, "its image is the last of %d clones of each other", depth)
	}
	return &origin{m, *f, originText(uint64(m.pool.GetPoolID()), m.id, uint64(f.number))}, err
}

// originText names a snapshot as no other ever is, within a cluster. It is kept in the metadata of unfinished clones.
func originText(pool uint64, image string, number uint64) string {
	return fmt.Sprintf("%d/%s@%d", pool, image, number)
}

// String is what is kept of it in an unfinished clone's metadata, empty for nil.
func (o *origin) String() string {
	if o == nil {
		return ""
	}
	return o.text
}

// clone makes a clone. Objects that the parent keeps in a pool of their own are the clone's too if it is to be in the
// same pool.
func (o *origin) clone(pool *rados.IOContext, name string, options *rbd.ImageOptions) error {
	if err := options.SetUint64(rbd.ImageOptionCloneFormat, 2); err != nil {
		return err
	}
	data, err := o.image.rbd.GetDataPoolID()
	if err != nil {
		return err
	}
	if own := o.image.pool.GetPoolID(); pool.GetPoolID() == own && data >= 0 && data != own {
		name, err := o.image.connection.rados.GetPoolByID(data)
		if err == nil {
			err = options.SetString(rbd.ImageOptionDataPool, name)
		}
		if err != nil {
			return err
		}
	}
	return rbd.CloneImage(o.image.pool, o.image.name.image, o.found.name, pool, name, options)
}

// parent names the snapshot that an image is a clone of, empty if it is none.
func (m *image) parent() (string, error) {
	of, err := m.rbd.GetParent()
	if err != nil {
		return "", ignore(err)
	}
	return originText(of.Image.PoolID, of.Image.ImageID, of.Snap.ID), nil
}

// depth is how many clones a chain has whose last is a snapshot of this image: 0 if it is no clone. It is counted up to
// depthMax.
func (m *image) depth(one *call, n snapshotNumber) (depth int, err error) {
	if err := m.rbd.SetSnapByID(uint64(n)); err != nil {
		return 0, err
	}
	for depth < depthMax {
		next, _, err := m.openParent()
		if err != nil || next == nil {
			return depth, err
		}
		one.later(next.release)
		if err := one.wanted(); err != nil {
			return depth, err
		}
		m, depth = next, depth+1
	}
	return depth, nil
}

// openParent opens the snapshot that an image, at the snapshot it is opened at, is a clone of, wherever it is by now; nil
// if it is none.
func (m *image) openParent() (*image, snapshotNumber, error) {
	of, err := m.rbd.GetParent()
	if err != nil {
		return nil, 0, ignore(err)
	}
	name := imageName{of.Image.PoolName, of.Image.PoolNamespace, of.Image.ImageName}
	pool, err := m.connection.pool(name.pool, name.namespace)
	if err != nil {
		return nil, 0, err
	}
	p, err := m.connection.keep(name, pool)(rbd.OpenImageByIdReadOnly(pool, of.Image.ImageID, rbd.NoSnapshot))
	if err != nil {
		return nil, 0, fmt.Errorf("its parent %s: %w", name, err)
	}
	if err := p.rbd.SetSnapByID(of.Snap.ID); err != nil {
		p.release()
		return nil, 0, fmt.Errorf("its parent %s@%s: %w", name, of.Snap.SnapName, err)
	}
	return p, snapshotNumber(of.Snap.ID), nil
}
