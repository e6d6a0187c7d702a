//go:build ceph && cgo

package ceph

import (
	"crypto/rand"
	"syscall"
	"time"

	"github.com/ceph/go-ceph/rados"
)

const (
	// turnLock is the name of the lock on an image's name that whoever changes the image for Stillpoint holds meanwhile.
	turnLock = "stillpoint"
	// turnMax is after how long one that was not given back is nobody's any more.
	turnMax = 15 * time.Second
	// turnPoll is how long one waits before asking for it again, at first and at most.
	turnPoll, turnPollMax = 2 * time.Millisecond, 50 * time.Millisecond
)

// clusterTurn lets the changes of an image that Stillpoint's processes make, on any node, come one after the other, as
// turns does within one process. It is a courtesy: nothing is wrong where it is not kept. Without it, a client that is
// about to close the image has to make another one's snapshot, because it still is the owner of the image's exclusive
// lock; they wait for each other, and librbd has been seen to fail an assertion in that (16.2.15, AsyncOpTracker).
//
// It waits for its turn, and answers with how to give it back.
func clusterTurn(one *call, pool *rados.IOContext, image string) (giveBack func(), err error) {
	cookie := rand.Text()
	for wait := turnPoll; ; wait = min(2*wait, turnPollMax) {
		err := lockCall(pool, image, "lock", encodeLock(turnLock, cookie, turnMax))
		switch {
		case err == nil:
			return func() { lockCall(pool, image, "unlock", encodeUnlock(turnLock, cookie)) }, nil
		case isForbidden(err), errnoOf(err) == syscall.EOPNOTSUPP:
			return func() {}, nil
		case errnoOf(err) != syscall.EBUSY:
			return nil, err
		}
		select {
		case <-time.After(wait):
		case <-one.ctx.Done():
			return nil, one.ctx.Err()
		}
	}
}

// lockCall calls a method of the OSDs' class lock on the object that says which image has a name.
func lockCall(pool *rados.IOContext, image, method string, in []byte) error {
	op := rados.CreateWriteOp()
	defer op.Release()
	op.AssertExists() // the method would make the object
	op.Exec("lock", method, in)
	return op.Operate(pool, nameObject+image, rados.OperationNoFlag)
}

// nameObject starts the name of that object; the image's follows. Source: src/include/rbd_types.h, RBD_ID_PREFIX.
const nameObject = "rbd_id."
