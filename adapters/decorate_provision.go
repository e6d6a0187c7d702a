package adapters

import "context"

type provisioner struct {
	layered
	inner Provisioner
}

func (p provisioner) Place(ctx context.Context, wanted string) (id VolumeID, err error) {
	err = p.call(ctx, "Place", func(ctx context.Context) error { id, err = p.inner.Place(ctx, wanted); return err })
	return id, err
}

func (p provisioner) Origin(ctx context.Context, id VolumeID) (o Origin, err error) {
	err = p.call(ctx, "Origin", func(ctx context.Context) error { o, err = p.inner.Origin(ctx, id); return err })
	return o, err
}

func (p provisioner) Grow(ctx context.Context, id VolumeID, size int64) (v Volume, err error) {
	err = p.call(ctx, "Grow", func(ctx context.Context) error { v, err = p.inner.Grow(ctx, id, size); return err })
	return v, err
}

func (p provisioner) Attach(ctx context.Context, id VolumeID) (path string, err error) {
	err = p.call(ctx, "Attach", func(ctx context.Context) error { path, err = p.inner.Attach(ctx, id); return err })
	return path, err
}

func (p provisioner) Detach(ctx context.Context, id VolumeID) error {
	return p.call(ctx, "Detach", func(ctx context.Context) error { return p.inner.Detach(ctx, id) })
}

func (p provisioner) DeleteVolume(ctx context.Context, id VolumeID) error {
	return p.call(ctx, "DeleteVolume", func(ctx context.Context) error { return p.inner.DeleteVolume(ctx, id) })
}
