//go:build ceph && cgo

package ceph

// #include <sys/types.h>
// #include <rbd/librbd.h>
import "C"

import (
	"runtime/cgo"
	"unsafe"
)

// stillpointReadDone is called by a thread of librbd when a read has ended.
//
//export stillpointReadDone
func stillpointReadDone(completion C.rbd_completion_t, argument unsafe.Pointer) {
	r := C.rbd_aio_get_return_value(completion)
	C.rbd_aio_release(completion)
	number := cgo.Handle(uintptr(argument))
	number.Value().(chan int) <- int(r)
	number.Delete()
}
