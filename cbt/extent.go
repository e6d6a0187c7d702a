// Package cbt is about changed blocks: what an extent and a delta are, and the algebra over streams of extents.
//
// Words. An extent is a run of bytes of a volume, either data or zero. A Seq is a stream of extents in ascending order
// without overlap. A Delta is a Seq together with what it is worth: the sizes of both snapshots, the granularity of the
// source, and how far it can be trusted. What a delta does not mention is equal in both snapshots.
//
// The algebra takes streams and returns streams: Of, Check, Clip, Coalesce, Align and Fill for one, Merge, Subtract and
// Intersect for two, Sum to add one up. Its inputs must keep the contract of Seq, which Check enforces; its results then
// keep it too. An error of an input ends the result, after what was already certain. Memory is constant and nothing is
// allocated per extent: nothing here ever holds a whole delta. Whoever breaks out of a result releases its inputs. A
// result can be ranged over as often as its inputs can.
//
// Sources of deltas live in the packages below this one.
package cbt

import "iter"

// Extent is the half-open run of bytes [Offset, Offset+Length) of a volume. Offset ≥ 0 and Length > 0. Zero says that
// every byte of it reads as zero (a hole, an unwritten or a discarded range); Zero == false promises nothing about the
// content: it may happen to be zero.
type Extent struct {
	Offset, Length int64
	Zero           bool
}

// End is the offset of the first byte after the extent.
func (e Extent) End() int64 { return e.Offset + e.Length }

// Seq is a stream of extents: ascending by Offset, not overlapping, though neighbours may touch even when they are of
// one kind. It stops at the first error, which is yielded with a zero Extent. A Seq can be ranged over once, unless
// its source says otherwise; breaking out of the loop releases what it holds.
type Seq = iter.Seq2[Extent, error]

// Confidence is how far a delta can be trusted by its own account. The engine audits every one of them regardless.
type Confidence uint8

const (
	// Unknown: the source gave an answer it cannot vouch for.
	Unknown Confidence = iota
	// Superset: everything that changed is in the delta, and some of what did not.
	Superset
	// Exact: precisely the blocks, at the source's granularity, that were written, discarded or newly allocated.
	Exact
)

// String returns the word that JSON and tables show.
func (c Confidence) String() string {
	switch c {
	case Exact:
		return "exact"
	case Superset:
		return "superset"
	default:
		return "unknown"
	}
}

// Delta is the answer to "what is different?" (between two snapshots of one volume) or "what is there?" (in one
// snapshot; BaseSize is then 0 and everything not mentioned is zero).
//
// Sizes and Granularity are bytes. Extents lie within [from, TargetSize), where from is what the caller asked to start
// at; an extent that straddles from is cut there. All bytes between BaseSize and
// TargetSize are in the stream, as data or as zeros.
type Delta struct {
	BaseSize, TargetSize int64
	Granularity          int64 // every extent starts and ends on a multiple of it, or at TargetSize; 1 if the source promises none
	Confidence           Confidence
	Extents              Seq
}
