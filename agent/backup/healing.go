package backup

import (
	"context"
	"errors"
	"fmt"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/repository"
	"stillpoint.io/stillpoint/fault"
)

// healing makes what is bad again, from snapshots. What several backups share it makes once.
type healing struct {
	m       *repository.Medium
	r       *repository.Repository
	to      *repository.Healer // nil: only look whether it could be done
	sources *sources
	chunk   buffer
	done    map[repository.Chunk]bool
	whole   map[string]bool // files, directories and descriptions in which everything is made again
	count   int64
}

// one makes what hurts a backup again. If it cannot, it says why.
func (h *healing) one(ctx context.Context, b repository.Backup, hurt Hurt) (ok bool, why string, err error) {
	switch hurt.Part {
	case DescriptionPart:
		return h.description(ctx, b)
	case FilePart, DirectoryPart:
		return h.grown(ctx, b, hurt)
	case TopPart:
		if b.Form == adapters.TreeForm { // it hangs in the directory that the description is in
			return h.description(ctx, b)
		}
		return h.top(ctx, b)
	case SegmentPart, ZerosPart, ChunkPart:
	}
	image, err := h.m.OpenImage(ctx, b)
	if err != nil {
		return false, "", err
	}
	defer image.Close()
	name, s := hurt.chunk, repository.Segment{}
	if hurt.chunk == (repository.Chunk{}) {
		s, _ = image.Segment(hurt.segment)
		name = s.Index()
	}
	if h.done[name] {
		return true, "", nil
	}
	if hurt.Part == ZerosPart {
		err = h.zeros(ctx, s, hurt, b)
		ok = err == nil
	} else {
		ok, why, err = h.fromSnapshots(ctx, b, name, s, hurt)
	}
	if err != nil {
		return false, "", err
	}
	if ok {
		h.done[name] = true
		h.count++
	}
	return ok, why, nil
}

func (h *healing) description(ctx context.Context, b repository.Backup) (bool, string, error) {
	if h.whole[b.ID] {
		return true, "", nil
	}
	if h.to == nil {
		if !h.r.CanDescribe(ctx, b) {
			return false, "its directory cannot be made again from its manifest", nil
		}
		h.count++
		h.whole[b.ID] = true
		return true, "", nil
	}
	before := h.to.Stored
	err := h.to.Description(ctx, b)
	h.count += h.to.Stored - before
	if errors.Is(err, fault.Invalid) {
		return false, err.Error(), nil
	}
	h.whole[b.ID] = err == nil
	return err == nil, "", err
}

// zeros stores what stands for zeros.
func (h *healing) zeros(ctx context.Context, s repository.Segment, hurt Hurt, b repository.Backup) error {
	switch {
	case h.to == nil:
		return nil
	case hurt.chunk == (repository.Chunk{}):
		return h.to.ZeroSegment(ctx, s)
	}
	size := h.r.ChunkSize()
	return h.to.Chunk(ctx, hurt.chunk, make([]byte, min(size, b.Size-hurt.Offset/size*size)))
}

// fromSnapshots looks for a chunk or a segment's index in every snapshot that may have it.
func (h *healing) fromSnapshots(ctx context.Context, b repository.Backup, name repository.Chunk, s repository.Segment, hurt Hurt) (bool, string, error) {
	all, why, err := h.sources.of(ctx, b)
	if err != nil {
		return false, "", err
	}
	for _, from := range all {
		if hurt.Offset+hurt.Length > from.image.Size() {
			continue
		}
		ok, err := h.try(ctx, from.image, name, s, hurt)
		if unread := (*sourceError)(nil); errors.As(err, &unread) && ctx.Err() == nil {
			why = fmt.Sprintf("snapshot %s: %v", from.id, err)
			continue
		} else if err != nil {
			return false, "", err
		}
		if ok {
			return true, "", nil
		}
		why = fmt.Sprintf("no snapshot of %s has the bytes that were there", b.Volume)
	}
	return false, why, nil
}

// try takes a chunk or a segment from a snapshot if it is there.
func (h *healing) try(ctx context.Context, from adapters.Image, name repository.Chunk, s repository.Segment, hurt Hurt) (bool, error) {
	if s == (repository.Segment{}) {
		if err := readFull(ctx, from, h.chunk.p, hurt.Offset, hurt.Length); err != nil {
			return false, &sourceError{err}
		}
		p := h.chunk.p[:hurt.Length]
		if h.r.ChunkOf(p) != name {
			return false, nil
		}
		if h.to == nil {
			return true, nil
		}
		return true, h.to.Chunk(ctx, name, p)
	}
	chunks, err := h.chunks(ctx, from, hurt.Offset, hurt.Length)
	if err != nil || h.r.SegmentOf(chunks, s.Length) != s {
		return false, err
	}
	if h.to == nil {
		return true, nil
	}
	return true, h.to.Segment(ctx, s, chunks)
}

// sourceError is a snapshot that cannot be read: another may be.
type sourceError struct{ error }

func (e *sourceError) Unwrap() error { return e.error }

// chunks names the chunks of a stretch of a snapshot.
func (h *healing) chunks(ctx context.Context, from adapters.Image, start, length int64) ([]repository.Chunk, error) {
	var chunks []repository.Chunk
	size := h.r.ChunkSize()
	for off := int64(0); off < length; off += size {
		n := min(size, length-off)
		if err := readFull(ctx, from, h.chunk.p, start+off, n); err != nil {
			return nil, &sourceError{err}
		}
		if p := h.chunk.p[:n]; repository.IsZero(p) {
			chunks = append(chunks, h.r.ZeroChunk(n))
		} else {
			chunks = append(chunks, h.r.ChunkOf(p))
		}
	}
	return chunks, nil
}

// top makes a top level again, from a snapshot of which everything has to be read.
func (h *healing) top(ctx context.Context, b repository.Backup) (bool, string, error) {
	all, why, err := h.sources.of(ctx, b)
	if err != nil {
		return false, "", err
	}
	for _, from := range all {
		if from.image.Size() != b.Size {
			continue
		}
		segments, err := h.segments(ctx, from, b.Size)
		if err != nil && ctx.Err() == nil {
			why = fmt.Sprintf("snapshot %s: %v", from.id, err)
			continue
		} else if err != nil {
			return false, "", err
		}
		if !h.r.IsTop(b, segments) {
			why = fmt.Sprintf("no snapshot of %s is what was backed up", b.Volume)
			continue
		}
		h.count++
		if h.to == nil {
			return true, "", nil
		}
		return true, "", h.to.Top(ctx, b, segments)
	}
	return false, why, nil
}

// segments names the segments of a snapshot. What the backend calls unallocated is taken for zeros: a wrong answer makes
// another name.
func (h *healing) segments(ctx context.Context, from source, size int64) ([]repository.Segment, error) {
	used := make([]bool, (size+repository.SegmentSize-1)/repository.SegmentSize)
	extents, err := changes(ctx, from.adapter, Plan{Snapshot: from.snapshot}, h.r.ChunkSize())
	if err != nil {
		return nil, err
	}
	for e, err := range extents {
		if err != nil {
			return nil, err
		}
		for off := e.Offset; !e.Zero && off < e.End(); off = (off/repository.SegmentSize + 1) * repository.SegmentSize {
			used[off/repository.SegmentSize] = true
		}
	}
	var segments []repository.Segment
	for n := range used {
		start := int64(n) * repository.SegmentSize
		length := min(repository.SegmentSize, size-start)
		if !used[n] {
			segments = append(segments, h.r.ZeroSegment(length))
			continue
		}
		chunks, err := h.chunks(ctx, from.image, start, length)
		if err != nil {
			return nil, err
		}
		segments = append(segments, h.r.SegmentOf(chunks, length))
	}
	return segments, nil
}
