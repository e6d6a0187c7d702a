package fiemap

import (
	"bytes"
	"context"
	"errors"
	"io"
	"unsafe"

	"stillpoint.io/stillpoint/cbt"
	"stillpoint.io/stillpoint/fault"
)

// content compares two files by what they hold. Its buffers are made when they are first needed.
type content struct {
	base, target *source
	a, b         []byte
}

// compare reads both files from pos, a multiple of the block, to end and emits the blocks that differ, until emit
// returns false: then it returns false too.
func (c *content) compare(ctx context.Context, pos, end int64, emit func(cbt.Extent) bool) (bool, error) {
	block := c.target.block
	if c.a == nil {
		n := max(256<<10/block, 1) * block
		c.a, c.b = aligned(n, block), aligned(n, block)
	}
	for pos < end {
		if err := ctx.Err(); err != nil {
			return false, err
		}
		n := min(end-pos, int64(len(c.a)))
		if err := c.base.fill(c.a, pos, n); err != nil {
			return false, err
		}
		if err := c.target.fill(c.b, pos, n); err != nil {
			return false, err
		}
		if err := errors.Join(c.base.settled(), c.target.settled()); err != nil {
			return false, err
		}
		for i := int64(0); i < n; i += block {
			j := min(i+block, n)
			if !bytes.Equal(c.a[i:j], c.b[i:j]) && !emit(cbt.Extent{Offset: pos + i, Length: j - i}) {
				return false, nil
			}
		}
		pos += n
	}
	return true, nil
}

// fill reads n bytes at pos into p. It asks for whole blocks, as a file that was opened with O_DIRECT demands.
func (s *source) fill(p []byte, pos, n int64) error {
	whole := min((n+s.block-1)/s.block*s.block, int64(len(p)))
	got, err := s.f.ReadAt(p[:whole], pos)
	if int64(got) >= n {
		return nil
	}
	if errors.Is(err, io.EOF) {
		return fault.Errorf(fault.Busy, "%s ends at %d, before its size: it was truncated while its extents were listed", s.f.Name(), pos+int64(got))
	}
	return err
}

// aligned makes a buffer whose address is a multiple of align, a power of two.
func aligned(n, align int64) []byte {
	b := make([]byte, n+align)
	skip := -int64(uintptr(unsafe.Pointer(&b[0]))) & (align - 1)
	return b[skip : skip+n : skip+n]
}
