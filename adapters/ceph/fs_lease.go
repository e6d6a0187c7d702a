//go:build ceph && cgo

package ceph

import (
	"context"
	"crypto/rand"
	"sync"
	"time"

	"stillpoint.io/stillpoint/fault"
)

// lease is the lock of a restore. It lapses when nobody renews it: so does a dead process's.
type lease struct {
	mount  *mount
	name   string
	cookie string
	stop   context.CancelFunc
	ended  chan struct{}

	mu  sync.Mutex
	err error
}

const (
	leaseTime  = 20 * time.Second
	leaseRenew = leaseTime / 4
	mayRenew   = byte(1) // LIBRADOS_LOCK_FLAG_RENEW
)

// lock locks the restore of a volume. Busy if somebody else has.
func (m *mount) lock(name treeName) (*lease, error) {
	ctx, stop := context.WithCancel(context.Background())
	l := &lease{mount: m, name: name.String(), cookie: rand.Text(), stop: stop, ended: make(chan struct{})}
	if err := l.take(0); err != nil {
		stop()
		return nil, err
	}
	m.hold()
	go func() {
		defer close(l.ended)
		l.renew(ctx)
	}()
	return l, nil
}

func (l *lease) take(flags byte) error {
	io, err := l.mount.records()
	if err != nil {
		return err
	}
	defer io.Destroy()
	r, err := io.LockExclusive(restoresObject, l.name, l.cookie, "stillpoint", leaseTime, &flags)
	if err == nil && r != 0 {
		err = fault.Errorf(fault.Busy, "this restore is under way in another process, or elsewhere in this one; what a process leaves that dies is free after %v", leaseTime)
	}
	return err
}

// renew renews the lock until it is stopped, or the lock is lost.
func (l *lease) renew(ctx context.Context) {
	ticks := time.NewTicker(leaseRenew)
	defer ticks.Stop()
	for last := time.Now(); ; {
		select {
		case <-ticks.C:
		case <-ctx.Done():
			return
		}
		now := time.Now()
		err := l.take(mayRenew)
		if err == nil {
			last = now
			continue
		}
		if fault.KindOf(err) == fault.Busy || time.Since(last) > leaseTime-leaseRenew {
			l.mu.Lock()
			l.err = fault.Errorf(fault.Unavailable, "the restore's lock was lost; begin it again: %w", err)
			l.mu.Unlock()
			return
		}
	}
}

// lost is nil as long as the lock is held.
func (l *lease) lost() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.err
}

// release gives the lock back. A call that hangs does that later.
func (l *lease) release() {
	l.stop()
	ctx, cancel := context.WithTimeout(context.Background(), closePatience)
	defer cancel()
	run(ctx, l.mount.connection.cluster.calls, func(*call) (none, error) {
		<-l.ended
		defer l.mount.release()
		io, err := l.mount.records()
		if err != nil {
			return none{}, err
		}
		defer io.Destroy()
		_, err = io.Unlock(restoresObject, l.name, l.cookie)
		return none{}, err
	})
}
