// Package fiemap asks a filesystem where the bytes of a file lie (FS_IOC_FIEMAP), and derives from it what a file holds
// and what differs between two files that share extents: a file and its reflink clone, or two clones of one file.
// Neither reads the data, except where an address proves nothing.
//
// # The proof
//
// A block on a disk has one content at a time. So when two files have the same block at the same offset, they are
// equal there; and when a file that shares its blocks with a clone is written to, the filesystem puts what is new
// elsewhere. Holes and unwritten (preallocated) extents read as zeros and are equal to each other. What lies at
// different addresses was written in between, perhaps with the same bytes: it counts as changed.
//
// Some extents have no address that would prove anything: inline ones, tails, those still unallocated after a sync, and
// encoded ones. (btrfs reports a compressed extent by its start on the disk and does not tell which part of it the file
// uses: after a deduplication two files may show equal addresses and differ.) Where both files have such an extent,
// both are read and compared block by block. The cost of [Changed] on a compressed btrfs is therefore a reading of what
// is compressed in both.
//
// # What would break it
//
//   - A file that is written to meanwhile. Both must be left alone from before the call until the stream's end; an
//     immutable snapshot is. A changed size or modification time is noticed and ends the stream with Busy; a write that
//     evades both (a mapping written to, a time set back) is not.
//   - Extents that move: btrfs moves those of immutable files in a balance, a resize and when it reclaims space (XFS does
//     so on a zoned realtime device), and might put a block of one file where a moment ago one of the other was. There
//     each batch of the base is read before and after that of the target and must be the same both times, or both are
//     read anew. While extents move, blocks that only moved may be reported as changed.
//   - Addresses of different spaces. Both files must lie on one filesystem, and on XFS both or neither on its realtime
//     device; others are refused. Filesystems other than XFS and btrfs are refused by Changed: what they report may be
//     an address on one of several devices, or no address at all.
//   - A filesystem that answers wrongly. That is what the engine's audit is for.
//
// FIEMAP_EXTENT_LAST is not relied on, it has been wrong before: a listing ends when it has reached the file's size or
// when the filesystem has no more to tell.
//
// Source: Documentation/filesystems/fiemap.rst, include/uapi/linux/fiemap.h, fs/btrfs/fiemap.c and fs/iomap/fiemap.c of Linux.
package fiemap

import (
	"context"
	"iter"
	"os"

	"stillpoint.io/stillpoint/cbt"
)

// Record is an extent as the filesystem reports it. Logical is its offset in the file, Length its length there, in
// bytes. Physical is an address in the filesystem's own space, in bytes, and says where the record starts, unless Flags
// takes that back.
type Record struct {
	Logical, Length int64
	Physical        uint64
	Flags           Flags
}

// End is the offset of the first byte after the record.
func (r Record) End() int64 { return r.Logical + r.Length }

// Flags are the FIEMAP_EXTENT_… bits of a record.
type Flags uint32

const (
	Last       Flags = 0x0001 // the last extent of the file, by the filesystem's account
	Unknown    Flags = 0x0002 // the address is unknown
	Delalloc   Flags = 0x0004 // not allocated yet
	Encoded    Flags = 0x0008 // compressed, or otherwise not what lies at the address
	Encrypted  Flags = 0x0080 // encrypted by the filesystem
	NotAligned Flags = 0x0100 // offsets and lengths are not of whole blocks
	Inline     Flags = 0x0200 // inside the metadata
	Tail       Flags = 0x0400 // in a block with other files' tails
	Unwritten  Flags = 0x0800 // allocated, never written: reads as zeros
	Merged     Flags = 0x1000 // put together from blocks
	Shared     Flags = 0x2000 // another file has it too
)

// opaque are the flags that take from an address its meaning.
const opaque = Unknown | Delalloc | Encoded | Encrypted | NotAligned | Inline | Tail

// Zero reports whether the extent reads as zeros by the filesystem's promise.
func (f Flags) Zero() bool { return f&Unwritten != 0 && f&opaque == 0 }

// Plain reports whether the address says where precisely these bytes lie.
func (f Flags) Plain() bool { return f&(Unwritten|opaque) == 0 }

// Count returns how many extents a file has up to its size, without listing them, after writing back what is dirty. An
// extent that crosses a multiple of 1 TiB counts twice. Unsupported where the filesystem has no FIEMAP, Invalid if f
// is not a regular file; both name the file.
func Count(ctx context.Context, f *os.File) (int, error) {
	s, err := open(f, 0)
	if err != nil {
		return 0, err
	}
	// One request cannot be cancelled, and it counts in 32 bits: a window of this size has no more than that.
	const window = 1 << 40
	total := 0
	for from := int64(0); from < s.size; from += min(window, s.size-from) {
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		n, err := s.count(from, min(window, s.size-from), 0)
		if err != nil {
			return 0, err
		}
		total += n
	}
	return total, nil
}

// Extents lists a file's extents up to its size, from the one that contains from (or follows it) on, after writing back
// what is dirty. The first may start before from and the last end behind the size. Of a file that is written to
// meanwhile, each batch of about a thousand extents is an answer of its own. Errors are those of Count, Invalid for a
// from outside the file, and Corrupt for a listing that is out of order. It can be ranged over again.
func Extents(ctx context.Context, f *os.File, from int64) iter.Seq2[Record, error] {
	return func(yield func(Record, error) bool) {
		s, err := open(f, from)
		if err != nil {
			yield(Record{}, err)
			return
		}
		for records, err := range s.batches(ctx, from) {
			if err != nil {
				yield(Record{}, err)
				return
			}
			for _, r := range records {
				if !yield(r, nil) {
					return
				}
			}
		}
	}
}

// Allocated tells what a file holds from an offset on: data, and by their absence holes and unwritten extents. The
// granularity is the filesystem's block. The file must not be written to until the stream's end. Errors are those of
// Extents, and Busy in the stream if the file was written to. The stream can be ranged over again.
func Allocated(ctx context.Context, f *os.File, from int64) (cbt.Delta, error) {
	s, err := open(f, from)
	if err != nil {
		return cbt.Delta{}, err
	}
	return cbt.Delta{
		TargetSize:  s.size,
		Granularity: s.block,
		Confidence:  cbt.Exact,
		Extents:     cbt.Clip(cbt.Align(s.data(ctx, from-from%s.block), s.block, s.size), from, s.size),
	}, nil
}

// Changed tells what differs in target from base, from an offset on. Base and target are files on one XFS or btrfs that
// share extents; which is the older does not matter. Neither may be written to until the stream's end (see the
// package's proof). The granularity is the filesystem's block: what lies behind the base's size counts as changed, from
// the start of the block that the base ends in.
//
// Errors are those of Allocated; Invalid also if the files lie on two filesystems, Unsupported also on filesystems
// whose addresses prove nothing, Unavailable in the stream if extents keep moving. The stream can be ranged over again.
func Changed(ctx context.Context, base, target *os.File, from int64) (cbt.Delta, error) {
	b, err := open(base, 0)
	if err != nil {
		return cbt.Delta{}, err
	}
	t, err := open(target, from)
	if err != nil {
		return cbt.Delta{}, err
	}
	moves, err := sameSpace(b, t)
	if err != nil {
		return cbt.Delta{}, err
	}
	c := comparison{base: b, target: t, moves: moves}
	return cbt.Delta{
		BaseSize:    b.size,
		TargetSize:  t.size,
		Granularity: t.block,
		Confidence:  cbt.Exact,
		Extents:     cbt.Clip(cbt.Coalesce(c.stream(ctx, from-from%t.block)), from, t.size),
	}, nil
}
