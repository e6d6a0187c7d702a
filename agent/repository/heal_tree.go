package repository

import (
	"context"

	"github.com/kopia/kopia/repo/compression"
	"github.com/kopia/kopia/repo/content"

	"stillpoint.io/stillpoint/adapters"
)

// Remake makes directories of a tree again, and what entries hold that are neither files nor directories. What comes out is
// for the caller to compare with what was there: Holds of the entries says whether it is the same. One of a Medium stores
// nothing; when the comparison has said that everything belongs there, one of a Healer makes the same once more, and stores
// what the repository lacks. So neither holds more than the directories that are open, and a name for each that was made.
type Remake struct {
	m    *Medium
	to   *Healer // nil: store nothing
	seen map[content.ID]bool
	lost int64
}

// NewRemake begins with nothing.
func (m *Medium) NewRemake() *Remake { return &Remake{m: m, seen: map[content.ID]bool{}} }

// NewRemake begins one that stores.
func (h *Healer) NewRemake() *Remake { return &Remake{m: h.m, to: h, seen: map[content.ID]bool{}} }

// Directory begins a directory.
func (k *Remake) Directory() *DirectoryWriter { return newDirectory(k.put) }

// Text is Writer.WriteText.
func (k *Remake) Text(ctx context.Context, e adapters.Entry) (TreeEntry, error) {
	return writeText(ctx, k.put, e)
}

// Lost counts the contents made so far that the repository lacks.
func (k *Remake) Lost() int64 { return k.lost }

// put names a content, and looks whether the repository lacks it.
func (k *Remake) put(ctx context.Context, p []byte, prefix content.IDPrefix, comp compression.HeaderID) (content.ID, error) {
	id := k.m.r.idOf(prefix, p)
	if k.seen[id] {
		return id, nil
	}
	bad, err := k.m.lacks(ctx, id)
	if err != nil {
		return id, err
	}
	if k.seen[id] = true; !bad {
		return id, nil
	}
	k.lost++
	if k.to == nil || k.to.remade[id] {
		return id, nil
	}
	k.to.remade[id] = true
	return id, k.to.store(ctx, id, p, comp)
}

// Chunk names the one content that holds the bytes of a file of at most a chunk.
func (e TreeEntry) Chunk() (Chunk, bool) {
	id, compressed, ok := e.object.ContentID()
	return Chunk{id}, ok && !compressed
}

// AsImage is a large file, as if it were the image of a backup of its own.
func (e TreeEntry) AsImage() Backup { return Backup{Image: ImageID{e.object}, Size: e.Size} }

// ImageOf names the top level that has these segments, without storing it.
func (r *Repository) ImageOf(segments []Segment) (ImageID, error) {
	_, image, err := r.topLevel(segments)
	return image, err
}
