// Package direct reads and writes files and block devices past the page cache where the alignment allows, and through it
// otherwise. The kernel keeps both in step on one file. Adapters whose data lies on this node share it.
package direct

import (
	"context"
	"os"
	"unsafe"

	"stillpoint.io/stillpoint/adapters"
)

// pieceMax is the most that is read or written between two looks at the context, in bytes.
const pieceMax = 4 << 20

// Move reads or writes p at an offset, piece by piece, by do: (*os.File).ReadAt or WriteAt. cached and bypass are the same
// file, the latter opened with O_DIRECT. The error is do's, or the context's; n is how much was moved before it.
func Move(ctx context.Context, cached, bypass *os.File, p []byte, off int64, do func(f *os.File, p []byte, off int64) (int, error)) (n int, err error) {
	for n < len(p) {
		if err := ctx.Err(); err != nil {
			return n, err
		}
		piece, aligned := nextPiece(p[n:], off+int64(n))
		f := cached
		if aligned {
			f = bypass
		}
		m, err := do(f, piece, off+int64(n))
		n += m
		if err != nil {
			return n, err
		}
	}
	return n, nil
}

// nextPiece is the start of p that is moved at once at an offset, and whether directly: its whole aligned part, or what is
// left of it.
func nextPiece(p []byte, off int64) (piece []byte, aligned bool) {
	p = p[:min(len(p), pieceMax)]
	if off%adapters.ImageAlign != 0 || uintptr(unsafe.Pointer(unsafe.SliceData(p)))%adapters.ImageAlign != 0 {
		return p, false
	}
	if whole := len(p) / adapters.ImageAlign * adapters.ImageAlign; whole > 0 {
		return p[:whole], true
	}
	return p, false
}
