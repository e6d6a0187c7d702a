//go:build ceph && cgo

package ceph

import (
	"cmp"
	"context"
	"io"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/ceph/go-ceph/rados"
	"github.com/ceph/go-ceph/rbd"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

// image is an image that librbd has open. Every call that uses it holds it; whoever lets go last closes it, so a call
// that was abandoned never finds it closed.
type image struct {
	connection *connection
	name       imageName
	pool       *rados.IOContext
	rbd        *rbd.Image
	id         string // the internal one

	mu    sync.Mutex
	users int
}

// access is what an image is opened for.
type access uint8

const (
	forReading access = iota
	forChange         // registers as a watcher, which others see as use
)

// open opens an image's head for a call, which must see to its release.
func (c *cluster) open(one *call, name imageName, a access) (*image, error) {
	n, err := c.connection(one)
	if err != nil {
		return nil, err
	}
	pool, err := n.pool(name.pool, name.namespace)
	if err != nil {
		return nil, err
	}
	open := rbd.OpenImageReadOnly
	if a == forChange {
		open = rbd.OpenImage
	}
	return n.keep(name, pool)(open(pool, name.image, rbd.NoSnapshot))
}

// keep wraps an image that was just opened.
func (n *connection) keep(name imageName, pool *rados.IOContext) func(*rbd.Image, error) (*image, error) {
	return func(opened *rbd.Image, err error) (*image, error) {
		if err != nil {
			pool.Destroy()
			return nil, err
		}
		n.hold()
		m := &image{connection: n, name: name, pool: pool, rbd: opened, users: 1}
		if m.id, err = opened.GetId(); err != nil {
			m.release()
			return nil, err
		}
		return m, nil
	}
}

func (m *image) hold() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.users++
}

func (m *image) release() {
	m.mu.Lock()
	m.users--
	last := m.users == 0
	m.mu.Unlock()
	if last {
		if m.rbd.Close() != nil { // it may have left a watch or a lock, which goes with the connection only
			m.connection.cluster.renew()
		}
		m.pool.Destroy()
		m.connection.release()
	}
}

// using makes a call on an open image.
func using[T any](ctx context.Context, m *image, f func(*call) (T, error)) (T, error) {
	all := m.connection.cluster.calls
	ctx, cancel := all.limited(ctx)
	defer cancel()
	if err := all.admit(ctx); err != nil {
		var none T
		return none, err
	}
	m.hold()
	return run(ctx, all, func(one *call) (T, error) {
		one.later(m.release)
		one.later(all.leave)
		return f(one)
	})
}

// shut lets go of an image. Where that closes it, it is waited for a while; a call that hangs closes it later.
func (m *image) shut() {
	ctx, cancel := context.WithTimeout(context.Background(), closePatience)
	defer cancel()
	run(ctx, m.connection.cluster.calls, func(*call) (struct{}, error) {
		m.release()
		return struct{}{}, nil
	})
}

// numbers lists an image's snapshots, ascending by number, which is their order in time; those of other namespaces of
// snapshots (a group's, the trash) too.
func (m *image) numbers() ([]rbd.SnapInfo, error) {
	all, err := m.rbd.GetSnapshotNames()
	for tries := 0; errnoOf(err) == syscall.ERANGE && tries < 100; tries++ { // more were made while it counted
		all, err = m.rbd.GetSnapshotNames()
	}
	slices.SortFunc(all, func(a, b rbd.SnapInfo) int { return cmp.Compare(a.Id, b.Id) })
	return all, err
}

// find looks a snapshot up by its name; nil if there is none that a user made.
func (m *image) find(name string) (*found, error) {
	all, err := m.numbers()
	if err != nil {
		return nil, err
	}
	for _, s := range all {
		if s.Name == name {
			return m.inspect(s)
		}
	}
	return nil, nil
}

// inspect reads a snapshot's record; nil if the snapshot is not one that a user made, or is gone.
func (m *image) inspect(s rbd.SnapInfo) (*found, error) {
	space, err := m.rbd.GetSnapNamespaceType(s.Id)
	if err != nil {
		return nil, ignore(err)
	}
	if space != rbd.SnapNamespaceTypeUser {
		return nil, nil
	}
	f := &found{number: snapshotNumber(s.Id), name: s.Name, size: int64(s.Size)}
	at, err := m.rbd.GetSnapTimestamp(s.Id)
	if err != nil {
		return nil, ignore(err)
	}
	f.created = time.Unix(at.Sec, at.Nsec).UTC()
	text, err := m.rbd.GetMetadata(recordKey(f.number))
	if err != nil {
		return f, ignore(err)
	}
	f.record, f.mine = decodeRecord(text, m.id)
	return f, nil
}

// ignore forgives what is not there.
func ignore(err error) error {
	if isAbsent(err) {
		return nil
	}
	return err
}

// reader is an open snapshot.
type reader struct {
	image  *image
	id     adapters.SnapshotID
	size   int64
	mu     sync.Mutex
	closed bool
}

// Open opens a snapshot of ours.
func (a *Adapter) Open(ctx context.Context, id adapters.SnapshotID) (adapters.Image, error) {
	m, f, err := a.openSnapshot(ctx, id)
	if err != nil {
		return nil, err
	}
	return &reader{image: m, id: id, size: f.size}, nil
}

// openSnapshot opens an image at a snapshot of ours.
func (a *Adapter) openSnapshot(ctx context.Context, id adapters.SnapshotID) (*image, found, error) {
	type opened struct {
		image *image
		found found
	}
	o, err := callOn(ctx, a, id.Volume, "snapshot "+id.String(), func(one *call, name imageName) (opened, error) {
		if err := checkName(id); err != nil {
			return opened{}, err
		}
		m, err := a.cluster.open(one, name, forReading)
		if err != nil {
			return opened{}, err
		}
		one.onAbandon(m.release)
		f, err := m.find(id.Name)
		if err == nil && (f == nil || !f.mine) {
			err = notFound()
		}
		if err == nil {
			err = m.rbd.SetSnapByID(uint64(f.number))
		}
		if err != nil {
			return opened{}, err
		}
		return opened{m, *f}, nil
	})
	return o.image, o.found, err
}

// pieceMax is the most bytes that one call reads or writes.
const pieceMax = 4 << 20

// ReadAt reads. A large read is made in pieces, one after the other.
func (r *reader) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	r.mu.Lock()
	closed := r.closed
	r.mu.Unlock()
	switch {
	case closed:
		return 0, fault.Errorf(fault.Invalid, "snapshot %s: read after it was closed", r.id)
	case off < 0:
		return 0, fault.Errorf(fault.Invalid, "snapshot %s: read at %d, before the beginning", r.id, off)
	}
	n := 0
	for end := min(int64(len(p)), max(r.size-off, 0)); int64(n) < end; {
		began, piece := time.Now(), p[n:min(end, int64(n)+pieceMax)]
		if err := r.image.read(ctx, piece, off+int64(n)); err != nil {
			return n, r.image.connection.failure(err, began, "snapshot %s: reading %d bytes at %d", r.id, len(piece), off+int64(n))
		}
		n += len(piece)
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, ctx.Err()
}

// read fills p, of at most pieceMax bytes.
func (m *image) read(ctx context.Context, p []byte, off int64) error {
	b, err := using(ctx, m, func(*call) (*buffer, error) {
		b := takeBuffer(len(p))
		n, err := m.readAt(b, off)
		if err == nil && n != len(b.bytes) || err == io.EOF {
			err = fault.Errorf(fault.Corrupt, "%d bytes instead of %d: %w", n, len(b.bytes), io.ErrUnexpectedEOF)
		}
		return b, err
	})
	if err == nil {
		copy(p, b.bytes)
	}
	b.giveBack()
	return err
}

// Size is the snapshot's size in bytes.
func (r *reader) Size() int64 { return r.size }

// Close closes the snapshot, at once for the caller; calls that were abandoned keep it open for themselves.
func (r *reader) Close() error {
	r.mu.Lock()
	closed := r.closed
	r.closed = true
	r.mu.Unlock()
	if closed {
		return nil
	}
	r.image.shut()
	return nil
}
