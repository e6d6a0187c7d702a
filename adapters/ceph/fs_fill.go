//go:build ceph && cgo

package ceph

import (
	"context"
	"syscall"
	"time"

	"github.com/ceph/go-ceph/cephfs"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

// Create makes a regular file, or takes over one that a dead process left.
func (t *treeTarget) Create(ctx context.Context, path string, size int64) (adapters.FileTarget, error) {
	if size < 0 {
		return nil, fault.Errorf(fault.Invalid, "%s: %q: a file of %d bytes", t.what(), path, size)
	}
	f, err := inTarget(ctx, t, path, func(one *call, m *mount, at string) (*treeFile, error) {
		if path == "" {
			return nil, libError(syscall.EEXIST)
		}
		f := &treeFile{target: t, path: path, size: size, openFile: openFile{mount: m}}
		taken, err := t.left.take(m, path, size, at)
		if err == nil && !taken {
			f.lib, err = m.lib.Open(at, syscall.O_CREAT|syscall.O_EXCL|syscall.O_RDWR|syscall.O_NOFOLLOW, 0o600)
			f.fresh = true
		} else if err == nil {
			f.lib, err = m.lib.Open(at, syscall.O_RDWR|syscall.O_NOFOLLOW, 0)
		}
		if err != nil {
			return nil, err
		}
		m.hold()
		one.onAbandon(func() { f.shut() })
		if f.fresh && size > 0 {
			err = f.lib.Truncate(size)
		}
		return f, err
	})
	if err != nil {
		return nil, err
	}
	return f, nil
}

// treeFile is a file being filled.
type treeFile struct {
	openFile
	target *treeTarget
	path   string
	size   int64
	fresh  bool
}

func (f *treeFile) Fresh() bool  { return f.fresh }
func (f *treeFile) Close() error { return f.close() }

// within checks a range, and that the target may be written to.
func (f *treeFile) within(off, length int64) error {
	if off < 0 || length < 0 || off > f.size-length {
		return fault.Errorf(fault.Invalid, "%s: %q: %d bytes at %d are not within the file's %d", f.target.what(), f.path, length, off, f.size)
	}
	return f.target.lease.lost()
}

func (f *treeFile) failure(err error, began time.Time, doing string, off int64) error {
	if err == nil {
		return nil
	}
	return f.target.adapter.cluster.fsFailure(err, began, "%s: %q: %s at %d", f.target.what(), f.path, doing, off)
}

// WriteAt writes, in pieces. What a call writes is a copy: a call that is abandoned writes whenever it likes.
func (f *treeFile) WriteAt(ctx context.Context, p []byte, off int64) error {
	if err := f.within(off, int64(len(p))); err != nil {
		return err
	}
	began := time.Now()
	for len(p) > 0 {
		want := min(len(p), pieceMax)
		b := takeBuffer(want)
		copy(b.bytes, p)
		_, err := use(ctx, &f.openFile, func(one *call) (none, error) {
			f.target.writing(one)
			one.later(b.giveBack)
			for n := 0; n < want; {
				w, err := f.lib.WriteAt(b.bytes[n:], off+int64(n))
				if err == nil && w == 0 {
					err = libError(syscall.EIO)
				}
				if err != nil {
					return none{}, err
				}
				n += w
			}
			return none{}, nil
		})
		if err != nil {
			return f.failure(err, began, "writing", off)
		}
		p, off = p[want:], off+int64(want)
	}
	return nil
}

// ReadAt reads what the file holds.
func (f *treeFile) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := f.within(off, int64(len(p))); err != nil {
		return err
	}
	began := time.Now()
	return f.failure(f.read(ctx, p, off), began, "reading", off)
}

// Zero makes a hole.
func (f *treeFile) Zero(ctx context.Context, off, length int64) error {
	if err := f.within(off, length); err != nil || length == 0 {
		return err
	}
	began := time.Now()
	_, err := use(ctx, &f.openFile, func(one *call) (none, error) {
		f.target.writing(one)
		return none{}, f.lib.Fallocate(cephfs.FallocFlPunchHole|cephfs.FallocFlKeepSize, off, length)
	})
	return f.failure(err, began, "zeroing", off)
}

// writing notes a write until it has ended.
func (t *treeTarget) writing(one *call) {
	t.writesMu.Lock()
	defer t.writesMu.Unlock()
	t.writes[one] = struct{}{}
	one.later(func() {
		t.writesMu.Lock()
		defer t.writesMu.Unlock()
		delete(t.writes, one)
	})
}
