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
	w       *Writer
	only    *session // to be written through; nil: the writer's of the moment
	session *session // once something is written
	out     object.Writer
	all     []byte // of a large directory, while something may have to be stored anew
	directoryText
}

// directoryText is a directory's JSON as it grows.
type directoryText struct {
	buf     []byte
	last    TreeEntry
	count   int
	summary fs.DirectorySummary
}

// directoryBuffer is how much of a directory is held before it is written, in bytes: one content's.
const directoryBuffer = 1 << 20

// NewDirectory begins a directory. Close it.
func (w *Writer) NewDirectory() *DirectoryWriter {
	return &DirectoryWriter{w: w, directoryText: newDirectoryText()}
}

// Add appends an entry. They come in a tree's order: directories first, then everything else, each by name.
func (d *DirectoryWriter) Add(ctx context.Context, e TreeEntry) error {
	if err := d.add(e); err != nil || len(d.buf) < directoryBuffer {
		return err
	}
	return d.flush(ctx)
}

func newDirectoryText() directoryText { return directoryText{buf: []byte(directoryHead)} }

func (d *directoryText) add(e TreeEntry) error {
	if d.count > 0 && !d.last.Before(e.Entry) {
		return fmt.Errorf("the entry %q comes after %q", e.Name, d.last.Name)
	}
	text, err := e.encode()
	if err != nil {
		return err
	}
	if d.count++; d.count > 1 {
		d.buf = append(d.buf, ',')
	}
	d.buf = append(d.buf, text...)
	d.last = e
	addSummary(&d.summary, e)
	return nil
}

// end closes the directory that self describes.
func (d *directoryText) end(self adapters.Entry) error {
	d.summary.TotalDirCount++
	if d.count == 0 {
		d.summary.MaxModTime = fs.UTCTimestampFromTime(self.Modified)
	}
	text, err := json.Marshal(&d.summary)
	d.buf = fmt.Appendf(d.buf, "],\"summary\":%s}\n", text)
	return err
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

// flush writes what is held. A large directory is written through one session, which no checkpoint ends meanwhile.
func (d *DirectoryWriter) flush(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if d.out == nil {
		if d.session = d.only; d.only != nil {
			d.only.users.Add(1)
		} else {
			d.session = d.w.use()
		}
		d.out = d.session.kopia.NewObjectWriter(ctx, object.WriterOptions{Description: "directory", Prefix: directoryPrefix, Compressor: "zstd-fastest", MetadataCompressor: "zstd-fastest"})
	}
	_, err := d.out.Write(d.buf)
	if d.session.renewal.any() {
		d.all = append(d.all, d.buf...)
	}
	d.buf = d.buf[:0]
	return d.w.r.at.fault("writing to", err)
}

// Finish stores the directory, and gives it as an entry that is described by self.
func (d *DirectoryWriter) Finish(ctx context.Context, self adapters.Entry) (TreeEntry, error) {
	e := TreeEntry{Entry: self, summary: &d.summary}
	err := d.end(self)
	if err != nil {
		return e, err
	}
	if d.out == nil {
		put := d.w.put
		if d.only != nil {
			put = d.only.put
		}
		id, err := put(ctx, d.buf, directoryPrefix, indexCompressor)
		e.object = object.DirectObjectID(id)
		return e, err
	}
	if err := d.flush(ctx); err != nil {
		return e, err
	}
	if e.object, err = d.out.Result(); err != nil {
		return e, d.w.r.at.fault("writing to", err)
	}
	return e, d.renew(ctx)
}

// renew stores anew what of a large directory is damaged.
func (d *DirectoryWriter) renew(ctx context.Context) error {
	if len(d.all) == 0 {
		return nil
	}
	parts, err := d.w.r.cut(d.all, directoryPrefix)
	if err != nil {
		return err
	}
	return d.session.renew(ctx, parts)
}

// Close releases the directory, finished or not.
func (d *DirectoryWriter) Close() error {
	if d.out == nil {
		return nil
	}
	err := d.out.Close()
	d.session.users.Done()
	d.out, d.session = nil, nil
	return d.w.r.at.fault("closing", err)
}

// Holding gives an entry that holds the bytes of a file of at most a chunk.
func (c Chunk) Holding(e adapters.Entry) TreeEntry {
	return TreeEntry{Entry: e, object: object.DirectObjectID(c.id)}
}

// Holding gives an entry that holds the bytes of a larger file.
func (i ImageID) Holding(e adapters.Entry) TreeEntry { return TreeEntry{Entry: e, object: i.id} }

// As gives an entry that is described by another one and holds the same bytes.
func (e TreeEntry) As(o adapters.Entry) TreeEntry {
	return TreeEntry{Entry: o, object: e.object, summary: e.summary}
}

// WriteText stores what an entry holds that has no bytes of its own: a link's target for kopia, nothing for a device.
func (w *Writer) WriteText(ctx context.Context, e adapters.Entry) (TreeEntry, error) {
	id, err := w.put(ctx, []byte(e.Target), "", content.NoCompression)
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
