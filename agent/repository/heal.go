package repository

import (
	"bytes"
	"context"
	"errors"

	"github.com/kopia/kopia/repo"
	"github.com/kopia/kopia/repo/compression"
	"github.com/kopia/kopia/repo/content"

	"stillpoint.io/stillpoint/fault"
)

// Healer stores again what the repository has lost or what has rotted in it, under the names that it had: every backup
// that refers to it is whole again, and no manifest changes. It takes nothing on trust: what it is given is compared with
// the name first, and what is something else is refused as Invalid and changes nothing. An old entry of the index and
// the new one trade places in one blob, so a healer that is killed leaves what was there before. It is not safe in
// parallel.
type Healer struct {
	r       *Repository
	m       *Medium
	kopia   repo.DirectRepositoryWriter
	put     storer
	pending int64
	remade  map[content.ID]bool // what a Remake has stored: the Medium goes on saying that it is lost
	Stored  int64               // contents stored again
}

// healFlush is how many bytes are stored before they become part of the repository.
const healFlush = 256 << 20

// NewHealer begins to heal what m shows. Close it.
func (m *Medium) NewHealer(ctx context.Context) (*Healer, error) {
	r := m.r
	if err := r.at.sweep(); err != nil {
		return nil, r.at.fault("writing to", err)
	}
	_, k, err := r.kopia.NewDirectWriter(ctx, repo.WriteSessionOptions{Purpose: "stillpoint repair"})
	if err != nil {
		return nil, r.at.fault("writing to", err)
	}
	c := k.ContentManager()
	c.DisableIndexFlush(ctx)
	h := &Healer{r: r, m: m, kopia: k, remade: map[content.ID]bool{}}
	h.put = func(ctx context.Context, p []byte, prefix content.IDPrefix, comp compression.HeaderID) (content.ID, error) {
		b := argument(c.WriteContent)
		b.Slices = [][]byte{p}
		return c.WriteContent(ctx, b, prefix, comp)
	}
	return h, nil
}

// Flush makes what was stored part of the repository, durably.
func (h *Healer) Flush(ctx context.Context) error {
	c := h.kopia.ContentManager()
	c.EnableIndexFlush(ctx)
	defer c.DisableIndexFlush(ctx)
	h.pending = 0
	return h.r.at.fault("writing to", h.kopia.Flush(ctx))
}

// Close ends the session. What was not flushed is as if it had not been.
func (h *Healer) Close(ctx context.Context) error { return h.r.at.fault("closing", h.kopia.Close(ctx)) }

// store takes p in place of what the repository has under that name.
func (h *Healer) store(ctx context.Context, id content.ID, p []byte, comp compression.HeaderID) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if h.r.idOf(id.Prefix(), p) != id {
		return fault.Errorf(fault.Invalid, "content %s: this is something else", id)
	}
	if err := h.kopia.ContentManager().DeleteContent(ctx, id); err != nil && !errors.Is(err, content.ErrContentNotFound) {
		return h.r.at.fault("writing to", err)
	}
	if _, err := h.put(ctx, p, id.Prefix(), comp); err != nil {
		return h.r.at.fault("writing to", err)
	}
	h.Stored++
	if h.pending += int64(len(p)); h.pending >= healFlush {
		return h.Flush(ctx)
	}
	return nil
}

// Chunk stores a chunk again.
func (h *Healer) Chunk(ctx context.Context, c Chunk, p []byte) error {
	comp := content.NoCompression
	if compressible(p) {
		comp = chunkCompressor
	}
	return h.store(ctx, c.id, p, comp)
}

// Segment stores a segment's index again.
func (h *Healer) Segment(ctx context.Context, s Segment, chunks []Chunk) error {
	if len(chunks) != chunksIn(s.Length, h.r.ChunkSize()) {
		return fault.Errorf(fault.Invalid, "a segment without all of its chunks")
	}
	return h.store(ctx, s.id, appendIndex(nil, chunks, h.r.ChunkSize(), s.Length), indexCompressor)
}

// SegmentOf names the segment that has these chunks, without storing it.
func (r *Repository) SegmentOf(chunks []Chunk, length int64) Segment {
	return Segment{r.idOf(indexPrefix, appendIndex(nil, chunks, r.ChunkSize(), length)), length}
}

// ZeroSegment is SegmentOf zeros.
func (r *Repository) ZeroSegment(length int64) Segment { return Segment{r.zeroSegment(length), length} }

// ZeroSegment stores the index of an all-zero segment again.
func (h *Healer) ZeroSegment(ctx context.Context, s Segment) error {
	return h.Segment(ctx, s, h.r.zeroChunks(s.Length))
}

// Top stores the top level of a backup's image again, as far as it is damaged. segments are all of the image's.
func (h *Healer) Top(ctx context.Context, b Backup, segments []Segment) error {
	parts, image, err := h.r.topLevel(segments)
	if err != nil {
		return err
	}
	if image != b.Image {
		return fault.Errorf(fault.Invalid, "these segments make up the image %s and not %s", image, b.Image)
	}
	return h.storeBad(ctx, parts)
}

// IsTop says whether these segments make up the backup's image.
func (r *Repository) IsTop(b Backup, segments []Segment) bool {
	_, image, err := r.topLevel(segments)
	return err == nil && image == b.Image
}

// Description stores the directory and the description of a backup again, as far as they are damaged, from what the
// manifest says.
func (h *Healer) Description(ctx context.Context, b Backup) error {
	parts, err := h.r.description(ctx, b)
	if err != nil {
		return err
	}
	return h.storeBad(ctx, parts)
}

// part is a content that can be made again, with its bytes.
type part struct {
	id content.ID
	p  []byte
}

func (h *Healer) storeBad(ctx context.Context, parts []part) error {
	for _, p := range parts {
		bad, err := h.m.lacks(ctx, p.id)
		if err == nil && bad {
			err = h.store(ctx, p.id, p.p, indexCompressor)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// lacks says that a content cannot be read.
func (m *Medium) lacks(ctx context.Context, id content.ID) (bool, error) {
	_, err := m.Check(ctx, Chunk{id}, false)
	if isCorrupt(err) {
		return true, nil
	}
	return false, err
}

// CanDescribe says whether the directory and the description could be stored again by Description.
func (r *Repository) CanDescribe(ctx context.Context, b Backup) bool {
	_, err := r.description(ctx, b)
	return err == nil
}

// description makes the directory and the description anew. They must come out as they were.
func (r *Repository) description(ctx context.Context, b Backup) ([]part, error) {
	parts, again, err := r.imagine(ctx, b)
	if err == nil && again.root != b.root {
		err = fault.Errorf(fault.Invalid, "backup %s: its directory %s cannot be made again from its manifest", b.ID, b.root)
	}
	return parts, err
}

// imagine describes a backup without storing anything.
func (r *Repository) imagine(ctx context.Context, b Backup) ([]part, Backup, error) {
	var parts []part
	_, err := r.describe(ctx, r.imagination(&parts), &b)
	return parts, b, err
}

// imagination is a session that stores nothing, and collects what it would have stored.
func (r *Repository) imagination(parts *[]part) *session {
	return &session{put: func(_ context.Context, p []byte, prefix content.IDPrefix, _ compression.HeaderID) (content.ID, error) {
		id := r.idOf(prefix, p)
		if parts != nil {
			*parts = append(*parts, part{id, bytes.Clone(p)})
		}
		return id, nil
	}}
}

// topLevel makes a top level as Part.store would store it.
func (r *Repository) topLevel(segments []Segment) (parts []part, image ImageID, err error) {
	var p Part
	for _, s := range segments {
		p.segments = append(p.segments, s.id)
		p.Size += s.Length
	}
	image, err = p.store(context.Background(), r.imagination(&parts).put)
	return parts, image, err
}

// Drop marks a content as deleted that nobody refers to and that cannot be read, so that no backup to come is told that
// it is there already.
func (h *Healer) Drop(ctx context.Context, c Chunk) error {
	if err := h.kopia.ContentManager().DeleteContent(ctx, c.id); err != nil && !errors.Is(err, content.ErrContentNotFound) {
		return h.r.at.fault("writing to", err)
	}
	return nil
}
