//go:build ceph && cgo

package ceph

import "testing"

func TestBuffers(t *testing.T) {
	for _, n := range []int{0, 1, 4096, 64<<10 - 1, 64 << 10, 64<<10 + 1, 1 << 20, 1<<20 + 1, pieceMax - 1, pieceMax} {
		b := takeBuffer(n)
		if len(b.bytes) != n || cap(b.bytes) > max(2*n, 1<<bufferMin) {
			t.Errorf("a buffer for %d bytes has %d, and %d in all", n, len(b.bytes), cap(b.bytes))
		}
		b.giveBack()
		if again := takeBuffer(n); len(again.bytes) != n {
			t.Errorf("a buffer that was used for %d bytes has %d", n, len(again.bytes))
		}
	}
	(*buffer)(nil).giveBack()
}
