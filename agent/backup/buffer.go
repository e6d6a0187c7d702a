package backup

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// buffer is page-aligned memory outside the heap: what direct reads want, and nothing for the collector to copy or
// to keep.
type buffer struct{ p []byte }

func newBuffer(size int64) (buffer, error) {
	p, err := unix.Mmap(-1, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return buffer{}, fmt.Errorf("mapping a buffer of %d bytes: %w", size, err)
	}
	return buffer{p}, nil
}

func (b buffer) free() { unix.Munmap(b.p) }
