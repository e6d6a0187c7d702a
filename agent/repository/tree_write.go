package repository

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/kopia/kopia/fs"
	"github.com/kopia/kopia/repo/content"
	"github.com/kopia/kopia/repo/object"

	"stillpoint.io/stillpoint/adapters"
)

// DirectoryWriter writes a directory entry by entry. It holds a MiB of it at most. It is not safe in parallel.
type DirectoryWriter struct {
	out     objectWriter
	last    TreeEntry
	count   int
	summary fs.DirectorySummary
	links   int64
}

// NewDirectory begins a directory.
func (w *Writer) NewDirectory() *DirectoryWriter { return newDirectory(w.put) }

func newDirectory(put storer) *DirectoryWriter {
	return &DirectoryWriter{out: objectWriter{put: put, prefix: directoryPrefix, buf: []byte(directoryHead)}}
}

// Add appends an entry. They come in a tree's order: directories first, then everything else, each by name.
func (d *DirectoryWriter) Add(ctx context.Context, e TreeEntry) error {
	if d.count > 0 && !d.last.Before(e.Entry) {
		return fmt.Errorf("the entry %q comes after %q", e.Name, d.last.Name)
	}
	text, err := e.encode()
	if err != nil {
		return err
	}
	if d.count++; d.count > 1 {
		d.out.buf = append(d.out.buf, ',')
	}
	d.out.buf = append(d.out.buf, text...)
	d.last = e
	addSummary(&d.summary, e)
	if d.links += e.links; e.Link != 0 {
		d.links++
	}
	if len(d.out.buf) < objectPiece {
		return nil
	}
	return d.out.flush(ctx)
}

// Finish stores the directory, and gives it as an entry that is described by self.
func (d *DirectoryWriter) Finish(ctx context.Context, self adapters.Entry) (TreeEntry, error) {
	e := TreeEntry{Entry: self, summary: &d.summary, links: d.links}
	d.summary.TotalDirCount++
	if d.count == 0 {
		d.summary.MaxModTime = fs.UTCTimestampFromTime(self.Modified)
	}
	text, err := json.Marshal(&d.summary)
	if err != nil {
		return e, err
	}
	d.out.buf = fmt.Appendf(d.out.buf, "],\"summary\":%s}\n", text)
	e.object, err = d.out.finish(ctx)
	return e, err
}

// addSummary counts an entry as kopia does.
func addSummary(s *fs.DirectorySummary, e TreeEntry) {
	at := fs.UTCTimestampFromTime(e.Modified)
	switch e.Type {
	case adapters.Directory:
		s.TotalFileCount += e.summary.TotalFileCount
		s.TotalFileSize += e.summary.TotalFileSize
		s.TotalSymlinkCount += e.summary.TotalSymlinkCount
		s.TotalDirCount += e.summary.TotalDirCount
		at = max(at, e.summary.MaxModTime)
	case adapters.Symlink:
		s.TotalSymlinkCount++
	default:
		s.TotalFileCount++
		s.TotalFileSize += e.Size
	}
	s.MaxModTime = max(s.MaxModTime, at)
}

// Holding gives an entry that holds the bytes of a file of at most a chunk.
func (c Chunk) Holding(e adapters.Entry) TreeEntry {
	return TreeEntry{Entry: e, object: object.DirectObjectID(c.id)}
}

// Holding gives an entry that holds the bytes of a larger file.
func (i ImageID) Holding(e adapters.Entry) TreeEntry { return TreeEntry{Entry: e, object: i.id} }

// As gives an entry that is described by another one and holds the same bytes.
func (e TreeEntry) As(o adapters.Entry) TreeEntry {
	return TreeEntry{Entry: o, object: e.object, summary: e.summary, links: e.links}
}

// WriteText stores what an entry holds that has no bytes of its own: a link's target for kopia, nothing for a device.
func (w *Writer) WriteText(ctx context.Context, e adapters.Entry) (TreeEntry, error) {
	return writeText(ctx, w.put, e)
}

func writeText(ctx context.Context, put storer, e adapters.Entry) (TreeEntry, error) {
	id, err := put(ctx, []byte(e.Target), "", content.NoCompression)
	return TreeEntry{Entry: e, object: object.DirectObjectID(id)}, err
}

// CommitTree is Commit for a backup of the form tree. sample are paths of files and directories to read back.
func (w *Writer) CommitTree(ctx context.Context, b Backup, root TreeEntry, sample []string) (Backup, error) {
	if root.summary == nil {
		return Backup{}, errors.New("the root of a tree is a directory")
	}
	root.Name = treeName
	b.Form, b.Tree, b.Count = adapters.TreeForm, TreeID{root.object}, root.Count()
	b.Size, b.Data = b.Count.Bytes, b.Count.Bytes
	b.tree = &root
	return w.commit(ctx, b, func(ctx context.Context, back *reader, b Backup) error {
		if err := w.r.checkDescription(ctx, back.contents, b); err != nil {
			return err
		}
		t, err := w.r.openTree(ctx, back.contents, b)
		if err != nil {
			return err
		}
		return t.check(ctx, t.root, sample)
	})
}
