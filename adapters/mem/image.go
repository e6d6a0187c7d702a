package mem

import (
	"context"
	"io"
	"sync/atomic"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

// image is an open snapshot. Reads take no lock and allocate nothing.
type image struct {
	adapter *Adapter
	*snapshot
	closed atomic.Bool
}

// Open opens a snapshot that is published and ready.
func (a *Adapter) Open(ctx context.Context, id adapters.SnapshotID) (adapters.Image, error) {
	defer a.store.lock()()
	s, err := a.readableAs(ctx, id, adapters.BlockForm)
	if err != nil {
		return nil, err
	}
	a.images.Add(1)
	return &image{adapter: a, snapshot: s}, nil
}

func (m *image) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	switch {
	case m.closed.Load():
		return 0, fault.Errorf(fault.Invalid, "snapshot %s: read after Close", m.info.ID)
	case m.gone.Load():
		return 0, fault.Errorf(fault.NotFound, "snapshot %s: deleted while it was open", m.info.ID)
	case off < 0:
		return 0, fault.Errorf(fault.Invalid, "snapshot %s: read at %d", m.info.ID, off)
	case ctx.Err() != nil:
		return 0, ctx.Err()
	case off >= m.info.Size:
		return 0, io.EOF
	}
	n := int(min(int64(len(p)), m.info.Size-off))
	m.read(p[:n], off)
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (m *image) Size() int64 { return m.info.Size }

func (m *image) Close() error {
	if m.closed.Swap(true) {
		return fault.Errorf(fault.Invalid, "snapshot %s: closed twice", m.info.ID)
	}
	m.adapter.images.Add(-1)
	return nil
}
