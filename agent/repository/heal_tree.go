package repository

import (
	"context"

	"github.com/kopia/kopia/repo/content"
	"github.com/kopia/kopia/repo/object"

	"stillpoint.io/stillpoint/adapters"
)

// Remake makes directories of a tree again, and what entries hold that are neither files nor directories, without storing
// anything. It keeps the bytes of those contents only that the repository lacks. What comes out is for the caller to compare
// with what was there: Holds of the entries says whether it is the same.
type Remake struct {
	m    *Medium
	lost []part
	seen map[content.ID]bool
}

// NewRemake begins with nothing.
func (m *Medium) NewRemake() *Remake { return &Remake{m: m, seen: map[content.ID]bool{}} }

// RemadeDirectory is a directory that is made again. All of it is in memory.
type RemadeDirectory struct {
	to *Remake
	directoryText
}

// Directory begins a directory.
func (k *Remake) Directory() *RemadeDirectory { return &RemadeDirectory{k, newDirectoryText()} }

// Add appends an entry, in the order of DirectoryWriter.Add.
func (d *RemadeDirectory) Add(e TreeEntry) error { return d.add(e) }

// Finish gives the directory as an entry that is described by self, as DirectoryWriter.Finish would have stored it.
func (d *RemadeDirectory) Finish(ctx context.Context, self adapters.Entry) (TreeEntry, error) {
	e := TreeEntry{Entry: self, summary: &d.summary}
	large := len(d.buf) >= directoryBuffer
	if err := d.end(self); err != nil {
		return e, err
	}
	if !large {
		p := part{d.to.m.r.idOf(directoryPrefix, d.buf), d.buf}
		e.object = object.DirectObjectID(p.id)
		return e, d.to.keep(ctx, p)
	}
	parts, err := d.to.m.r.cut(d.buf, directoryPrefix)
	if err != nil {
		return e, err
	}
	if e.object, err = object.ParseID("I" + parts[len(parts)-1].id.String()); err != nil {
		return e, err
	}
	return e, d.to.keep(ctx, parts...)
}

// Text is Writer.WriteText.
func (k *Remake) Text(ctx context.Context, e adapters.Entry) (TreeEntry, error) {
	p := part{k.m.r.idOf("", []byte(e.Target)), []byte(e.Target)}
	return TreeEntry{Entry: e, object: object.DirectObjectID(p.id)}, k.keep(ctx, p)
}

// keep keeps what the repository lacks.
func (k *Remake) keep(ctx context.Context, parts ...part) error {
	for _, p := range parts {
		if k.seen[p.id] {
			continue
		}
		bad, err := k.m.lacks(ctx, p.id)
		if err != nil {
			return err
		}
		if k.seen[p.id] = true; bad {
			k.lost = append(k.lost, p)
		}
	}
	return nil
}

// Lost counts the contents that the repository lacks.
func (k *Remake) Lost() int { return len(k.lost) }

// Remake stores what was made again and is lost, except what this healer stored already.
func (h *Healer) Remake(ctx context.Context, k *Remake) error {
	for _, p := range k.lost {
		if h.remade[p.id] {
			continue
		}
		comp := content.NoCompression
		if p.id.Prefix() == directoryPrefix {
			comp = indexCompressor
		}
		if err := h.store(ctx, p.id, p.p, comp); err != nil {
			return err
		}
		h.remade[p.id] = true
	}
	return nil
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
