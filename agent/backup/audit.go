package backup

import (
	"context"
	"fmt"
	"math/rand/v2"

	"stillpoint.io/stillpoint/agent/repository"
)

// The audit reads some of what the backend calls unchanged and compares it with the base: where filesystems keep their
// superblocks, and at random max(5 % of the changed bytes, 64 MiB), half of it where the base has data, half anywhere.
// With n chunks read, a fraction f of changes that the backend missed is found with probability 1 − (1 − f)^n.

const (
	auditShare = 20       // one in so many of the changed bytes
	auditFloor = 64 << 20 // bytes
)

// superblocks are the offsets, in bytes, where ext4 (and its first copies, for blocks of 1 and 4 KiB), xfs, and btrfs
// (fs/btrfs/volumes.h: BTRFS_SUPER_MIRROR) keep them.
var superblocks = []int64{0, 64 << 10, 8 << 20, 64 << 20, 128 << 20, 256 << 30}

// audit submits the audit's jobs. It is called when everything that changed has been fed.
func (l *line) audit(ctx context.Context) error {
	if l.base == nil || l.size == 0 {
		return nil
	}
	chunks := (min(l.size, l.base.Size()) + l.chunk - 1) / l.chunk
	seen := map[int64]bool{}
	try := func(c int64) error {
		if c >= chunks || l.changed[c/64]&(1<<(c%64)) != 0 || seen[c] {
			return nil
		}
		seen[c] = true
		return l.submit(ctx, job{audit: c})
	}
	for _, off := range superblocks {
		if err := try(off / l.chunk); err != nil {
			return err
		}
	}
	if err := try(chunks - 1); err != nil {
		return err
	}
	wanted := int(max(auditFloor, l.touched/auditShare) / l.chunk)
	if int64(wanted) >= chunks {
		for c := range chunks {
			if err := try(c); err != nil {
				return err
			}
		}
		return nil
	}
	for i := 0; i < 4*wanted && len(seen) < wanted; i++ { // a try may hit what changed or was read
		c := rand.Int64N(chunks)
		if n := rand.IntN(l.base.Segments()); i%2 == 0 {
			if _, zero := l.base.Segment(n); !zero {
				c = (int64(n)*repository.SegmentSize + rand.Int64N(repository.SegmentSize)) / l.chunk
			}
		}
		if err := try(c); err != nil {
			return err
		}
	}
	return nil
}

// auditChunk compares a chunk with the base.
func (l *line) auditChunk(ctx context.Context, c int64, p []byte) error {
	off := c * l.chunk
	length := min(l.chunk, l.size-off)
	if err := l.fill(ctx, p, off, length); err != nil {
		return err
	}
	l.audited.Add(length)
	chunks, err := l.base.Chunks(ctx, int(off/repository.SegmentSize))
	if err != nil {
		return baseFault(ctx, err)
	}
	if chunks[off%repository.SegmentSize/l.chunk] != l.r.ChunkOf(p[:length]) {
		return &distrustError{fmt.Sprintf("the %d bytes at %d changed and are not among them", length, off)}
	}
	return nil
}
