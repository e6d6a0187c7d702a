//go:build !ceph || !cgo

package ceph

import (
	"context"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

// lacking is what the registry's row says about a binary without Ceph's libraries.
const lacking = " (not in this program: build it with `make ceph`, which needs the headers of librados, librbd and libcephfs)"

func openRBD(_ context.Context, c adapters.Config) (adapters.Adapter, error) {
	if _, err := RBD().Params(c); err != nil {
		return nil, err
	}
	return nil, fault.Errorf(fault.Unsupported, "backend %s: this program was built without Ceph's libraries: build it with `make ceph`, which needs the headers of librados, librbd and libcephfs", c.Name)
}

func openFS(_ context.Context, c adapters.Config) (adapters.Adapter, error) {
	if _, err := FS().Params(c); err != nil {
		return nil, err
	}
	return nil, fault.Errorf(fault.Unsupported, "backend %s: this program was built without Ceph's libraries: build it with `make ceph`, which needs the headers of librados, librbd and libcephfs", c.Name)
}
