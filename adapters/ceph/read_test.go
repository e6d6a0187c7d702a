//go:build ceph && cgo

package ceph

import (
	"bytes"
	"syscall"
	"testing"
)

// TestReadAt: reads are asynchronous with this go-ceph, and give what librbd's synchronous ones do.
func TestReadAt(t *testing.T) {
	t.Parallel()
	v := makeImage(t, freeName("rbd", ""), 1<<20, nil)
	want := randomBytes(1 << 20)
	_, err := v.WriteAt(want, 0)
	must(t, err)
	if _, ok := handleOf(v.rbd); !ok {
		t.Error("go-ceph keeps librbd's handle elsewhere: images are read synchronously")
	}
	m := &image{rbd: v.rbd}
	for _, c := range [][2]int{{0, 1 << 20}, {4095, 2}, {1 << 19, 70_000}, {0, 0}, {1<<20 - 1, 1}} {
		b := takeBuffer(c[1])
		n, err := m.readAt(b, int64(c[0]))
		if n != c[1] || err != nil || !bytes.Equal(b.bytes, want[c[0]:c[0]+c[1]]) {
			t.Errorf("%d bytes at %d: %d, %v", c[1], c[0], n, err)
		}
		b.giveBack()
	}
	if n, err := m.readAt(takeBuffer(4096), 1<<20); n != 0 && errnoOf(err) != syscall.EINVAL {
		t.Errorf("behind the end: %d, %v", n, err)
	}
}

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
