package thinmeta

import (
	"context"
	"iter"
	"math"

	"stillpoint.io/stillpoint/cbt"
	"stillpoint.io/stillpoint/fault"
)

// Volume is a thin device and its size in bytes, which is not in the metadata: the volume manager knows it. What is
// mapped behind the size is left out.
type Volume struct {
	ID   DeviceID
	Size int64
}

// Allocated lists what a device has mapped, from an offset on. What it does not list reads as zeros. Granularity is the
// pool's block size. The stream can be ranged over again. Errors: Invalid for an offset outside [0, Size], NotFound for a
// device that is not in the metadata, Corrupt.
func (m *Metadata) Allocated(ctx context.Context, v Volume, from int64) (cbt.Delta, error) {
	at, err := m.volume(ctx, v, from)
	if err != nil {
		return cbt.Delta{}, err
	}
	return m.delta(0, v.Size, cbt.Clip(m.mapped(ctx, at, from, v.Size), from, v.Size)), nil
}

// Changed lists where a target differs from a base, from an offset of the target on, which may be less than its size.
// Which of both is older does not matter. Blocks that the base has mapped and the target has not were discarded: they are
// zero extents. Where the target is larger, all of it behind the base's last whole block is listed, as data or as zeros.
// Granularity, errors and streams are those of Allocated.
func (m *Metadata) Changed(ctx context.Context, base, target Volume, from int64) (cbt.Delta, error) {
	a, err := m.volume(ctx, base, 0)
	if err != nil {
		return cbt.Delta{}, err
	}
	b, err := m.volume(ctx, target, from)
	if err != nil {
		return cbt.Delta{}, err
	}
	common := target.Size
	if base.Size < target.Size {
		common = base.Size - base.Size%m.super.BlockSize
	}
	grown := max(from, common)
	parts := func(yield func(cbt.Extent, error) bool) {
		for _, part := range []cbt.Seq{
			cbt.Clip(m.changed(ctx, a, b, from, common), from, common),
			cbt.Fill(cbt.Clip(m.mapped(ctx, b, grown, target.Size), grown, target.Size), grown, target.Size),
		} {
			for e, err := range part {
				if !yield(e, err) || err != nil {
					return
				}
			}
		}
	}
	return m.delta(base.Size, target.Size, parts), nil
}

func (m *Metadata) delta(base, target int64, s cbt.Seq) cbt.Delta {
	return cbt.Delta{BaseSize: base, TargetSize: target, Granularity: m.super.BlockSize, Confidence: cbt.Exact, Extents: cbt.Coalesce(s)}
}

// volume checks a request and returns the root of the device's tree.
func (m *Metadata) volume(ctx context.Context, v Volume, from int64) (uint64, error) {
	if v.Size < 0 || from < 0 || from > v.Size {
		return 0, fault.Errorf(fault.Invalid, "thin device %d: offset %d is outside the device of %d bytes", v.ID, from, v.Size)
	}
	return m.tree(ctx, v.ID)
}

// span is a run of a device's blocks, [begin, end).
type span struct {
	begin, end uint64
	zero       bool
}

// spans turns spans into extents.
func (m *Metadata) spans(walk func(yield func(span) bool) error) cbt.Seq {
	return func(yield func(cbt.Extent, error) bool) {
		more := true
		err := walk(func(s span) bool {
			size := m.super.BlockSize
			more = yield(cbt.Extent{Offset: int64(s.begin) * size, Length: int64(s.end-s.begin) * size, Zero: s.zero}, nil)
			return more
		})
		if err != nil && more {
			yield(cbt.Extent{}, err)
		}
	}
}

// limit is the block at which to stop for a size in bytes: behind the block of its last byte.
func (m *Metadata) limit(size int64) uint64 {
	return min((uint64(size)+uint64(m.super.BlockSize)-1)/uint64(m.super.BlockSize), uint64(math.MaxInt64/m.super.BlockSize))
}

// mapped lists the mapped blocks of a tree that touch [from, to) bytes.
func (m *Metadata) mapped(ctx context.Context, at uint64, from, to int64) cbt.Seq {
	return m.spans(func(yield func(span) bool) error {
		if from >= to {
			return nil
		}
		c, err := m.newCursor(ctx, at, mappingSize, m.block(from))
		if err != nil {
			return err
		}
		limit := m.limit(to)
		for c.key() < limit {
			if err := c.enter(); err != nil {
				return err
			}
			if !c.open() {
				break
			}
			if err := m.run(c, limit, false, yield); err != nil {
				return stopped(err)
			}
		}
		return nil
	})
}

// block is the block of a byte.
func (m *Metadata) block(offset int64) uint64 { return uint64(offset / m.super.BlockSize) }

// run yields what the leaf that c stands in maps below a limit, and leaves it behind.
func (m *Metadata) run(c *cursor, limit uint64, zero bool, yield func(span) bool) error {
	d := c.top()
	i := d.position
	for i < d.n && d.key(i) < limit {
		s := span{begin: d.key(i), zero: zero}
		for s.end = s.begin; i < d.n && d.key(i) == s.end && s.end < limit; i++ {
			if err := m.inside(d, i); err != nil {
				return err
			}
			s.end++
		}
		if !yield(s) {
			return errStopped
		}
	}
	d.position = i
	c.settle()
	return nil
}

// inside checks that a mapping leads into the data device.
func (m *Metadata) inside(d *node, i int) error {
	if data := d.word(i) >> timeBits; data >= m.dataBlocks {
		return corrupt(d.block, "it maps block %d to block %d of the data device, which has %d", d.key(i), data, m.dataBlocks)
	}
	return nil
}

// Mapping is a run of a device's blocks that lie one behind the other on the data device and were mapped at one time.
// Block, Data and Length are in blocks of the pool.
type Mapping struct {
	Block, Data, Length uint64
	Time                uint32 // the pool's counter of snapshots when it was mapped
}

// timeBits is how many bits of a mapping are its time.
const timeBits = 24

// Mappings lists the mappings of a device, as long as they can be. It can be ranged over again. Errors: NotFound, Corrupt.
func (m *Metadata) Mappings(ctx context.Context, id DeviceID) iter.Seq2[Mapping, error] {
	return func(yield func(Mapping, error) bool) {
		at, err := m.tree(ctx, id)
		var c *cursor
		if err == nil {
			c, err = m.newCursor(ctx, at, mappingSize, 0)
		}
		var run Mapping
		for err == nil && !c.done() {
			if err = c.enter(); err != nil {
				break
			}
			for d := c.top(); d.position < d.n && err == nil; d.position++ {
				if err = m.inside(d, d.position); err != nil {
					break
				}
				key, word := d.key(d.position), d.word(d.position)
				if next := (Mapping{Block: key, Data: word >> timeBits, Length: 1, Time: uint32(word & (1<<timeBits - 1))}); run.Length > 0 && run.precedes(next) {
					run.Length++
				} else if run.Length > 0 && !yield(run, nil) {
					return
				} else {
					run = next
				}
			}
			c.settle()
		}
		if run.Length > 0 && !yield(run, nil) {
			return
		}
		if err != nil {
			yield(Mapping{}, err)
		}
	}
}

// precedes reports whether another mapping continues this one.
func (r Mapping) precedes(next Mapping) bool {
	return r.Block+r.Length == next.Block && r.Data+r.Length == next.Data && r.Time == next.Time
}
