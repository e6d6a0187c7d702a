//go:build ceph && cgo

package ceph

import (
	"math/bits"
	"sync"
)

// buffer is what a call reads into or writes from, in place of its caller's memory: a call that is abandoned uses it for as
// long as it likes.
type buffer struct {
	bytes []byte
	class int
}

const (
	bufferMin     = 16 // the smallest, as a power of two: 64 KiB
	bufferClasses = 7  // up to pieceMax
)

// buffers are those that are not in use, by size: each is a power of two.
var buffers [bufferClasses]sync.Pool

// takeBuffer takes one of n bytes, at most pieceMax.
func takeBuffer(n int) *buffer {
	class := max(bits.Len(uint(max(n, 1)-1))-bufferMin, 0)
	b, ok := buffers[class].Get().(*buffer)
	if !ok {
		b = &buffer{make([]byte, 1<<(class+bufferMin)), class}
	}
	b.bytes = b.bytes[:n]
	return b
}

// giveBack gives one back that nobody uses any more; nil is none.
func (b *buffer) giveBack() {
	if b != nil {
		buffers[b.class].Put(b)
	}
}
