package csi

import (
	"context"
	"errors"
	"strings"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/kube"
	"stillpoint.io/stillpoint/agent/kube/class"
	"stillpoint.io/stillpoint/fault"
)

// Kubernetes is the Lookup of a driver that snapshots PersistentVolumes of any CSI driver, its own among them.
type Kubernetes struct {
	API      *kube.API
	Backends Backends
}

// Source goes from the VolumeSnapshot that the sidecar says the call is for to the PersistentVolume, checks that its handle
// is the one that the call gives, and finds its backend by its driver and the class.
func (k Kubernetes) Source(ctx context.Context, q SourceQuery) (Source, error) {
	if q.Own {
		return Standalone{k.Backends}.Source(ctx, q)
	}
	o, err := class.OriginOf(q.Parameters, q.Name)
	if err != nil {
		return Source{}, err
	}
	source, err := k.API.Source(ctx, o, q.Handle)
	if err != nil {
		return Source{}, err
	}
	id, err := k.Backends.of(source.Persistent, q.Class)
	return Source{ID: id, Unique: true}, err
}

// of finds the volume behind a PersistentVolume: in the backend that the class names, or the one whose adapter knows the
// volumes of its driver. Unsupported if there is none, Invalid if there are several or the class names a wrong one.
func (b Backends) of(pv adapters.PersistentVolume, c class.Class) (adapters.VolumeID, error) {
	if pv.Driver == class.Driver {
		id, _, err := b.volume(pv.Handle)
		return id, err // whether the class is for it is asked of every volume
	}
	meant, err := b.meant(c)
	if err != nil {
		return adapters.VolumeID{}, err
	}
	var id adapters.VolumeID
	var found []string
	var reasons []error
	for _, name := range meant {
		known, err := b[name].Kind.VolumeOf(pv)
		if err != nil {
			reasons = append(reasons, err)
			continue
		}
		found = append(found, name)
		id = adapters.VolumeID{Backend: name, ID: known}
	}
	switch {
	case len(found) == 1:
		return id, nil
	case len(found) > 1:
		return adapters.VolumeID{}, fault.Errorf(fault.Invalid, "volume %q of the CSI driver %s may be in several backends: say which one in the class, with %s: %s",
			pv.Handle, pv.Driver, class.BackendKey, strings.Join(found, ", "))
	case len(reasons) == 0:
		return adapters.VolumeID{}, fault.Errorf(fault.Unsupported, "volume %q of the CSI driver %s: no backend is configured here", pv.Handle, pv.Driver)
	}
	return adapters.VolumeID{}, errors.Join(reasons...)
}

// VolumeHandle is that of the PersistentVolume; of a snapshot that Kubernetes does not know, or not any more, it is the
// volume's in our own terms.
func (k Kubernetes) VolumeHandle(ctx context.Context, s adapters.Snapshot) (string, error) {
	handle, err := k.API.VolumeHandle(ctx, s.Wanted)
	if fault.KindOf(err) == fault.NotFound {
		return Standalone{k.Backends}.VolumeHandle(ctx, s)
	}
	return handle, err
}

// Related says that every namespace that has target has base.
func (k Kubernetes) Related(ctx context.Context, base, target string) error {
	return k.API.Related(ctx, base, target)
}
