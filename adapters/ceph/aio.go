//go:build ceph && cgo

package ceph

// #cgo LDFLAGS: -lrbd
// #include <stdint.h>
// #include <rbd/librbd.h>
//
// extern void stillpointReadDone(rbd_completion_t completion, void *argument);
//
// // begin_read begins a read into memory that stays where it is, and hands the number on to stillpointReadDone at its end.
// static int begin_read(rbd_image_t image, uint64_t offset, size_t length, void *into, uintptr_t number) {
// 	rbd_completion_t completion;
// 	int r = rbd_aio_create_completion((void *)number, stillpointReadDone, &completion);
// 	if (r < 0)
// 		return r;
// 	r = rbd_aio_read2(image, offset, length, into, completion, 0);
// 	if (r < 0)
// 		rbd_aio_release(completion);
// 	return r;
// }
import "C"

import (
	"fmt"
	"reflect"
	"runtime"
	"runtime/cgo"
	"syscall"
	"unsafe"

	"github.com/ceph/go-ceph/rbd"
)

// handleOf is librbd's own handle of an open image. go-ceph keeps it to itself, and has no asynchronous reads. ok is false if
// a later go-ceph keeps it otherwise; images are then read synchronously.
func handleOf(img *rbd.Image) (h C.rbd_image_t, ok bool) {
	f := reflect.ValueOf(img).Elem().FieldByName("image")
	if !f.IsValid() || f.Type().Kind() != reflect.UnsafePointer {
		return nil, false
	}
	return C.rbd_image_t(f.UnsafePointer()), true
}

// readAt fills the buffer. It is rbd_read(), but no thread waits in librbd meanwhile: with a thread for each of many reads
// at once, the threads' switches cost more than the reads.
func (m *image) readAt(b *buffer, off int64) (int, error) {
	handle, ok := handleOf(m.rbd)
	if !ok || len(b.bytes) == 0 {
		return m.rbd.ReadAt(b.bytes, off)
	}
	var pinned runtime.Pinner
	pinned.Pin(&b.bytes[0])
	defer pinned.Unpin()
	done := make(chan int, 1)
	number := cgo.NewHandle(done)
	if r := C.begin_read(handle, C.uint64_t(off), C.size_t(len(b.bytes)), unsafe.Pointer(&b.bytes[0]), C.uintptr_t(number)); r < 0 {
		number.Delete()
		return 0, readError(r)
	}
	r := <-done
	if r < 0 {
		return 0, readError(r)
	}
	return r, nil
}

// readError is an error that librbd returned.
type readError int

func (e readError) Error() string  { return fmt.Sprintf("rbd: ret=%d, %v", int(e), syscall.Errno(-e)) }
func (e readError) ErrorCode() int { return int(e) }
