package repository

import (
	"context"
	"fmt"
	"iter"

	"github.com/kopia/kopia/fs"

	"stillpoint.io/stillpoint/adapters"
)

// TreePart is a directory of a tree that is being written, as far as it came: entries that are finished, in the tree's
// order, and after them directories and large files that are not. A checkpoint stores it as a directory of numbered ones, each with a run
// of the finished entries, and one for what is not finished. So a checkpoint writes only what came since the last.
type TreePart struct {
	Self   adapters.Entry  // the directory itself
	Pieces []TreeEntry     // runs that earlier checkpoints stored
	Fresh  []TreeEntry     // what was finished since
	Open   []*TreePart     // directories in it that are being written
	Files  []FilePart      // large files in it that are being read
	Stored func(TreeEntry) // is told of the run that Fresh became, unless it is empty
}

// FilePart is the start of a large file.
type FilePart struct {
	Self adapters.Entry
	Done Part
}

// openName is the name of the directory of what is unfinished. It comes after all numbers.
const openName = "open"

// empty says that there is nothing in it that would be missed.
func (p *TreePart) empty() bool {
	for _, o := range p.Open {
		if !o.empty() {
			return false
		}
	}
	return len(p.Pieces)+len(p.Fresh)+len(p.Files) == 0
}

// store writes the part.
func (p *TreePart) store(ctx context.Context, put storer) (TreeEntry, error) {
	pieces := p.Pieces
	if len(p.Fresh) > 0 {
		e, err := collect(ctx, put, fmt.Sprintf("%010d", len(pieces)), p.Fresh)
		if err != nil {
			return TreeEntry{}, err
		}
		p.Stored(e)
		pieces = append(pieces[:len(pieces):len(pieces)], e)
	}
	var open []TreeEntry
	for _, o := range p.Open {
		if o.empty() {
			continue
		}
		e, err := o.store(ctx, put)
		if err != nil {
			return TreeEntry{}, err
		}
		open = append(open, e)
	}
	for _, f := range p.Files {
		image, err := f.Done.store(ctx, put)
		if err != nil {
			return TreeEntry{}, err
		}
		f.Self.Size = f.Done.Size
		open = append(open, image.Holding(f.Self))
	}
	unfinished, err := collect(ctx, put, openName, open)
	if err != nil {
		return TreeEntry{}, err
	}
	return collect(ctx, put, p.Self.Name, append(pieces[:len(pieces):len(pieces)], unfinished))
}

// collect writes a directory of the part's own.
func collect(ctx context.Context, put storer, name string, entries []TreeEntry) (TreeEntry, error) {
	d := newDirectory(put)
	for _, e := range entries {
		if err := d.Add(ctx, e); err != nil {
			return TreeEntry{}, err
		}
	}
	return d.Finish(ctx, adapters.Entry{Name: name, Type: adapters.Directory})
}

// UnfinishedTree is a tree as a checkpoint has it, open for reading.
type UnfinishedTree struct{ *Tree }

// OpenTreePart opens the tree of a checkpoint.
func (r *Repository) OpenTreePart(c Checkpoint) *UnfinishedTree {
	root := TreeEntry{Entry: adapters.Entry{Type: adapters.Directory}, object: c.Tree.id, summary: &fs.DirectorySummary{}}
	return &UnfinishedTree{&Tree{r: r, contents: r.kopia.ContentReader(), root: root, recent: [2]map[string]TreeEntry{{}, {}}}}
}

// Root is the tree itself: an unfinished directory.
func (t *UnfinishedTree) Root() PartEntry { return PartEntry{t.root, true} }

// Part lists what an unfinished directory has, in the tree's order. Entries that are finished are as they are in the
// backup; of other directories only the name is known, and a file has the size that is done.
func (t *UnfinishedTree) Part(ctx context.Context, dir PartEntry) iter.Seq2[PartEntry, error] {
	return func(yield func(PartEntry, error) bool) {
		for piece, err := range t.Below(ctx, dir.TreeEntry) {
			if err != nil {
				yield(PartEntry{}, err)
				return
			}
			for e, err := range t.Below(ctx, piece) {
				if !yield(PartEntry{e, piece.Name == openName}, err) || err != nil {
					return
				}
			}
		}
	}
}

// PartEntry is an entry of an unfinished tree.
type PartEntry struct {
	TreeEntry
	Unfinished bool // a directory, to be listed by Part, or a file, to be opened by OpenStart
}

// OpenStart opens what there is of an unfinished file: whole segments, or all of it.
func (t *UnfinishedTree) OpenStart(ctx context.Context, e PartEntry) (*Image, error) {
	return t.r.openImage(ctx, t.contents, Backup{Image: ImageID{e.object}, Size: e.Size})
}
