package csi

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/kube/class"
	"stillpoint.io/stillpoint/fault"
)

// Backend is an opened backend, and the adapter that it is of.
type Backend struct {
	Kind    adapters.Kind
	Adapter adapters.Adapter
}

// Backends are the opened backends by their names.
type Backends map[string]Backend

// names are the backends' names in order.
func (b Backends) names() []string { return slices.Sorted(maps.Keys(b)) }

// find is the backend of a handle. One that is not configured here may be on another node, or be configured again: it is
// Unavailable, never NotFound.
func (b Backends) find(name string) (adapters.Adapter, error) {
	found, ok := b[name]
	if !ok {
		return nil, fault.Errorf(fault.Unavailable, "the backend %q is not configured here; there is %s", name, strings.Join(b.names(), ", "))
	}
	return found.Adapter, nil
}

// meant are the backends that a class may mean: the one it names, or those of the adapter that it names, or all. Invalid if
// there is none of that name or adapter.
func (b Backends) meant(c class.Class) ([]string, error) {
	var fit, kinds []string
	for _, name := range b.names() {
		kind := b[name].Kind.Name
		kinds = append(kinds, kind)
		if (c.Backend == "" || c.Backend == name) && (c.Adapter == "" || c.Adapter == kind) {
			fit = append(fit, name)
		}
	}
	named, there := b[c.Backend]
	switch {
	case len(fit) > 0 || c.Backend == "" && c.Adapter == "":
		return fit, nil
	case c.Backend == "":
		return nil, fault.Errorf(fault.Invalid, "%s: no backend of the adapter %q is configured here%s", class.AdapterKey, c.Adapter, class.Meant(c.Adapter, kinds))
	case !there:
		return nil, fault.Errorf(fault.Invalid, "%s: there is no backend %q%s", class.BackendKey, c.Backend, class.Meant(c.Backend, b.names()))
	}
	return nil, fault.Errorf(fault.Invalid, "the backend %q is of the adapter %q, and %s says %q", c.Backend, named.Kind.Name, class.AdapterKey, c.Adapter)
}

// choose is the one backend that a class may mean and that will do. Invalid if there are several, Unsupported if none does
// what is wanted.
func (b Backends) choose(c class.Class, will func(adapters.Adapter) bool, what string) (string, adapters.Adapter, error) {
	meant, err := b.meant(c)
	if err != nil {
		return "", nil, err
	}
	fit := slices.DeleteFunc(slices.Clone(meant), func(name string) bool { return !will(b[name].Adapter) })
	switch {
	case len(fit) == 1:
		return fit[0], b[fit[0]].Adapter, nil
	case len(fit) > 1:
		return "", nil, fault.Errorf(fault.Invalid, "%d backends would do: say which one with %s: %s", len(fit), class.BackendKey, strings.Join(fit, ", "))
	case c.Backend != "":
		return "", nil, fault.Errorf(fault.Unsupported, "the backend %q %s", c.Backend, what)
	}
	return "", nil, fault.Errorf(fault.Unsupported, "no backend will do: each %s", what)
}

// fits checks that a volume is of the backend and adapter that a class names.
func (b Backends) fits(c class.Class, id adapters.VolumeID) error {
	switch kind := b[id.Backend].Kind.Name; {
	case c.Backend != "" && c.Backend != id.Backend:
		return fault.Errorf(fault.Invalid, "the class is for the backend %q, and the volume %s is not on it", c.Backend, id)
	case c.Adapter != "" && c.Adapter != kind:
		return fault.Errorf(fault.Invalid, "the class is for the adapter %q, and the volume %s is of the adapter %q%s", c.Adapter, id, kind, class.Meant(c.Adapter, []string{kind}))
	}
	return nil
}

// volume reads the handle of a volume of ours. What cannot be one is NotFound: it names a volume that we have not.
func (b Backends) volume(handle string) (adapters.VolumeID, adapters.Adapter, error) {
	h, err := adapters.ParseHandle(handle)
	if err != nil || h.IsSnapshot() {
		return adapters.VolumeID{}, nil, fault.Errorf(fault.NotFound, "there is no volume %q: a volume of Stillpoint is BACKEND:ID", handle)
	}
	a, err := b.find(h.Volume.Backend)
	return h.Volume, a, err
}

// snapshot reads the handle of a snapshot and makes it canonical. What cannot be one is NotFound.
func (b Backends) snapshot(ctx context.Context, handle string) (adapters.SnapshotID, adapters.Adapter, error) {
	h, err := adapters.ParseHandle(handle)
	if err != nil || !h.IsSnapshot() {
		return adapters.SnapshotID{}, nil, fault.Errorf(fault.NotFound, "there is no snapshot %q: a snapshot of Stillpoint is BACKEND:ID@NAME", handle)
	}
	a, err := b.find(h.Volume.Backend)
	if err != nil {
		return adapters.SnapshotID{}, nil, fmt.Errorf("snapshot %s: %w", handle, err)
	}
	id, err := adapters.Resolve(ctx, a, h)
	return id, a, err
}

// verified finds a snapshot that may be handed out. One that is still cutting does not exist yet for anybody: NotFound.
func (b Backends) verified(ctx context.Context, handle string) (adapters.Snapshot, adapters.Adapter, error) {
	id, a, err := b.snapshot(ctx, handle)
	if err != nil {
		return adapters.Snapshot{}, nil, err
	}
	s, err := a.Snapshot(ctx, id)
	if err == nil && s.Mark != adapters.Verified {
		err = fault.Errorf(fault.NotFound, "there is no snapshot %s: the cut that is making it is not verified", handle)
	}
	return s, a, err
}
