//go:build ceph && cgo

package ceph

import (
	"context"
	"errors"
	"io"
	"sync"

	"github.com/ceph/go-ceph/cephfs"

	"stillpoint.io/stillpoint/fault"
)

// openFile is an open file, until its last user is gone: calls that were abandoned keep it.
type openFile struct {
	mount *mount
	lib   *cephfs.File

	mu     sync.Mutex
	users  int // calls under way
	closed bool
}

// use makes a call with the file.
func use[T any](ctx context.Context, f *openFile, do func(*call) (T, error)) (T, error) {
	var none T
	all := f.mount.connection.cluster.calls
	ctx, cancel := all.limited(ctx)
	defer cancel()
	if err := all.admit(ctx); err != nil {
		return none, err
	}
	f.mu.Lock()
	if f.closed {
		f.mu.Unlock()
		all.leave()
		return none, fault.Errorf(fault.Invalid, "it was closed")
	}
	f.users++
	f.mu.Unlock()
	f.mount.hold()
	return run(ctx, all, func(one *call) (T, error) {
		one.later(all.leave)
		one.later(f.done)
		one.later(f.mount.release)
		v, err := do(one)
		if isShutOut(err) {
			f.mount.lose()
		}
		return v, err
	})
}

func (f *openFile) done() {
	f.mu.Lock()
	f.users--
	last := f.closed && f.users == 0
	f.mu.Unlock()
	if last {
		f.shut()
	}
}

func (f *openFile) shut() error {
	err := f.lib.Close()
	f.mount.release()
	return err
}

// close closes the file, at once for the caller.
func (f *openFile) close() error {
	f.mu.Lock()
	first := !f.closed
	f.closed = true
	last := first && f.users == 0
	f.mu.Unlock()
	if !last {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), closePatience)
	defer cancel()
	_, err := run(ctx, f.mount.connection.cluster.calls, func(*call) (none, error) { return none{}, f.shut() })
	if errors.Is(err, context.DeadlineExceeded) {
		err = fault.Errorf(fault.Unavailable, "closing a file: Ceph did not answer within %v", closePatience)
	}
	return err
}

// read fills p, in pieces. What a call reads goes into a buffer of its own first.
func (f *openFile) read(ctx context.Context, p []byte, off int64) error {
	for len(p) > 0 {
		want := min(len(p), pieceMax)
		b, err := use(ctx, f, func(*call) (*buffer, error) {
			b := takeBuffer(want)
			for n := 0; n < want; {
				r, err := f.lib.ReadAt(b.bytes[n:], off+int64(n))
				if err == io.EOF || err == nil && r == 0 {
					err = fault.Errorf(fault.Corrupt, "%d bytes instead of %d", n, want)
				}
				if err != nil {
					return b, err
				}
				n += r
			}
			return b, nil
		})
		if err == nil {
			copy(p, b.bytes)
		}
		b.giveBack()
		if err != nil {
			return err
		}
		p, off = p[want:], off+int64(want)
	}
	return ctx.Err()
}
