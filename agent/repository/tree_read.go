package repository

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"iter"
	"math/rand/v2"
	"strings"
	"sync"

	"github.com/kopia/kopia/repo/content"
	"github.com/kopia/kopia/repo/object"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/cbt"
	"stillpoint.io/stillpoint/fault"
)

// Tree is a backup of the form tree, open for reading. It is an adapters.Tree, in which nothing is called unchanged.
// Everything that is read is decrypted, hashed and compared with its id; what is not right, or not there, is Corrupt.
//
// It finds what is at a path by reading the directories on the way, unless it was listed lately: whoever lists a directory
// and then opens what is in it reads nothing twice.
type Tree struct {
	r        *Repository
	contents content.Reader
	root     TreeEntry

	mu     sync.Mutex
	recent [2]map[string]TreeEntry // by path; the second is the older, and goes when the first is full
}

// recentMax is how many entries of each are remembered.
const recentMax = 8 << 10

// OpenTree opens the tree of a backup.
func (r *Repository) OpenTree(ctx context.Context, b Backup) (*Tree, error) {
	return r.openTree(ctx, r.kopia.ContentReader(), b)
}

func (r *Repository) openTree(ctx context.Context, from content.Reader, b Backup) (*Tree, error) {
	if b.Form != adapters.TreeForm {
		return nil, fault.Errorf(fault.Invalid, "backup %s is of a disk image and holds no tree of files", b.ID)
	}
	for e, err := range r.directoryAt(ctx, from, b.root) {
		if err != nil {
			return nil, err
		}
		if e.Name == treeName && e.Type == adapters.Directory && e.object == b.Tree.id {
			e.Name = ""
			return &Tree{r: r, contents: from, root: e, recent: [2]map[string]TreeEntry{{}, {}}}, nil
		}
	}
	return nil, fault.Errorf(fault.Corrupt, "backup %s: its directory does not hold the tree %s", b.ID, b.Tree)
}

// directoryAt reads a directory, an entry at a time, and makes sure of its order: there are no two of one name.
func (r *Repository) directoryAt(ctx context.Context, from content.Reader, id object.ID) iter.Seq2[TreeEntry, error] {
	return func(yield func(TreeEntry, error) bool) {
		in, err := r.objectAt(ctx, from, id)
		if err != nil {
			yield(TreeEntry{}, err)
			return
		}
		defer in.Close()
		var last TreeEntry
		for e, err := range scanDirectory(in) {
			if err == nil && last.Name != "" && !last.Before(e.Entry) {
				err = fmt.Errorf("%q comes after %q", e.Name, last.Name)
			}
			if err != nil {
				if err = r.corrupt(err); ctx.Err() != nil {
					err = ctx.Err()
				}
				yield(TreeEntry{}, fmt.Errorf("directory %s: %w", id, err))
				return
			}
			if !yield(e, nil) {
				return
			}
			last = e
		}
	}
}

// objectAt opens an object that is one content, or several with an index of kopia's.
func (r *Repository) objectAt(ctx context.Context, from content.Reader, id object.ID) (io.ReadCloser, error) {
	if cid, compressed, ok := id.ContentID(); ok && !compressed {
		p, err := r.read(ctx, from, cid)
		return io.NopCloser(bytes.NewReader(p)), err
	}
	in, err := object.Open(ctx, from.(objectReader), id)
	if err != nil {
		return nil, r.corrupt(err)
	}
	return in, nil
}

// scanDirectory reads a directory's JSON without holding more than an entry of it.
func scanDirectory(in io.Reader) iter.Seq2[TreeEntry, error] {
	return func(yield func(TreeEntry, error) bool) {
		head := make([]byte, len(directoryHead))
		if _, err := io.ReadFull(in, head); err != nil || string(head) != directoryHead {
			yield(TreeEntry{}, fault.Errorf(fault.Corrupt, "it begins with %q", head))
			return
		}
		d := json.NewDecoder(io.MultiReader(strings.NewReader("["), in))
		_, err := d.Token()
		for err == nil && d.More() {
			var j treeEntry
			var e TreeEntry
			if err = d.Decode(&j); err == nil {
				e, err = j.entry()
			}
			if err == nil && (e.Type == adapters.Directory) != (e.summary != nil) {
				err = fmt.Errorf("%q is a %s with the summary %v", e.Name, e.Type, e.summary)
			}
			if err == nil && !yield(e, nil) {
				return
			}
		}
		if err == nil {
			_, err = d.Token() // the end of the entries: without it, the rest is missing
		}
		if err != nil {
			yield(TreeEntry{}, fault.Errorf(fault.Corrupt, "%w", err))
		}
	}
}

// Root is the entry of the tree itself.
func (t *Tree) Root() TreeEntry { return t.root }

// Below lists what is in a directory, which is an entry of this tree.
func (t *Tree) Below(ctx context.Context, dir TreeEntry) iter.Seq2[TreeEntry, error] {
	return t.r.directoryAt(ctx, t.contents, dir.object)
}

// Find finds what is at a path.
func (t *Tree) Find(ctx context.Context, path string) (TreeEntry, error) {
	if path == "" {
		return t.root, nil
	}
	t.mu.Lock()
	e, ok := t.recent[0][path]
	if !ok {
		e, ok = t.recent[1][path]
	}
	t.mu.Unlock()
	if ok {
		return e, nil
	}
	i := strings.LastIndexByte(path, '/')
	dir, err := t.Find(ctx, path[:max(i, 0)])
	if err != nil && fault.KindOf(err) != fault.NotFound {
		return dir, err
	}
	if err == nil && dir.Type == adapters.Directory {
		for e, err := range t.Below(ctx, dir) {
			if err != nil {
				return e, err
			}
			if e.Name == path[i+1:] {
				t.remember(path, e)
				return e, nil
			}
		}
	}
	return TreeEntry{}, fault.Errorf(fault.NotFound, "path %q: not in the backup", path)
}

func (t *Tree) remember(path string, e TreeEntry) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.recent[0]) >= recentMax {
		t.recent = [2]map[string]TreeEntry{{}, t.recent[0]}
	}
	t.recent[0][path] = e
}

// Stat describes what is at a path.
func (t *Tree) Stat(ctx context.Context, path string) (adapters.Entry, error) {
	if err := ctx.Err(); err != nil {
		return adapters.Entry{}, err
	}
	e, err := t.Find(ctx, path)
	return e.Entry, err
}

// Entries lists a directory.
func (t *Tree) Entries(ctx context.Context, dir string) iter.Seq2[adapters.Entry, error] {
	return func(yield func(adapters.Entry, error) bool) {
		d, err := t.Find(ctx, dir)
		if err == nil {
			err = ctx.Err()
		}
		if err == nil && d.Type != adapters.Directory {
			err = fault.Errorf(fault.NotFound, "path %q: a %s, not a directory", dir, d.Type)
		}
		if err != nil {
			yield(adapters.Entry{}, err)
			return
		}
		for e, err := range t.Below(ctx, d) {
			if err == nil {
				t.remember(strings.TrimPrefix(dir+"/"+e.Name, "/"), e)
			}
			if !yield(e.Entry, err) || err != nil {
				return
			}
		}
	}
}

// OpenFile opens a regular file.
func (t *Tree) OpenFile(ctx context.Context, path string) (adapters.File, error) {
	e, err := t.Find(ctx, path)
	if err == nil {
		err = ctx.Err()
	}
	if err != nil {
		return nil, err
	}
	if e.Type != adapters.RegularFile {
		return nil, fault.Errorf(fault.Invalid, "path %q: a %s, not a regular file", path, e.Type)
	}
	f, err := t.Open(ctx, e)
	if err != nil {
		return nil, fmt.Errorf("path %q: %w", path, err)
	}
	return f, nil
}

// Open opens the file that an entry of this tree is.
func (t *Tree) Open(ctx context.Context, e TreeEntry) (adapters.File, error) {
	if _, ok := e.object.IndexObjectID(); ok {
		i, err := t.r.openImage(ctx, t.contents, e.AsImage())
		if err != nil {
			return nil, err
		}
		return largeFile{i}, nil
	}
	id, compressed, ok := e.object.ContentID()
	if !ok || compressed || e.Size > t.r.ChunkSize() {
		return nil, fault.Errorf(fault.Corrupt, "object %s is not what Stillpoint writes for a file of %d bytes", e.object, e.Size)
	}
	return &smallFile{t: t, id: id, size: e.Size}, nil
}

// Close releases the tree.
func (t *Tree) Close() error { return nil }

// check reads back what is at some paths below an entry: the directories on the way, and a random chunk of a file.
func (t *Tree) check(ctx context.Context, e TreeEntry, paths []string) error {
	if e.Type == adapters.Directory {
		return t.checkDirectory(ctx, e, paths)
	}
	if e.Type != adapters.RegularFile || e.Size == 0 {
		return nil
	}
	f, err := t.Open(ctx, e)
	if err != nil {
		return err
	}
	defer f.Close()
	size := t.r.ChunkSize()
	off := rand.Int64N(e.Size) / size * size
	_, err = f.ReadAt(ctx, make([]byte, min(size, e.Size-off)), off)
	return err
}

func (t *Tree) checkDirectory(ctx context.Context, dir TreeEntry, paths []string) error {
	wanted := map[string][]string{} // by name, what is below it
	for _, p := range paths {
		if name, rest, _ := strings.Cut(p, "/"); name != "" {
			wanted[name] = append(wanted[name], rest)
		}
	}
	for e, err := range t.Below(ctx, dir) {
		if below, ok := wanted[e.Name]; ok && err == nil {
			delete(wanted, e.Name)
			err = t.check(ctx, e, below)
		}
		if err != nil {
			return err
		}
	}
	for name := range wanted {
		return fault.Errorf(fault.Corrupt, "%q is not in its directory", name)
	}
	return nil
}

// largeFile is a file that lies in the repository as a disk image does.
type largeFile struct{ *Image }

func (f largeFile) Extents(ctx context.Context) cbt.Seq { return f.Image.Extents(ctx) }

// smallFile is a file of one content, read when it is first needed.
type smallFile struct {
	t    *Tree
	id   content.ID
	size int64

	mu   sync.Mutex
	data []byte
}

func (f *smallFile) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fault.Errorf(fault.Invalid, "reading at the negative offset %d", off)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.data == nil {
		data, err := f.t.r.read(ctx, f.t.contents, f.id)
		if err != nil {
			return 0, err
		}
		if int64(len(data)) != f.size {
			return 0, fault.Errorf(fault.Corrupt, "content %s: %d bytes long, the directory says %d", f.id, len(data), f.size)
		}
		f.data = append(make([]byte, 0, len(data)), data...)
	}
	n := copy(p, f.data[min(off, f.size):])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (f *smallFile) Size() int64  { return f.size }
func (f *smallFile) Close() error { return nil }

func (f *smallFile) Extents(context.Context) cbt.Seq {
	if f.size == 0 {
		return cbt.Of()
	}
	return cbt.Of(cbt.Extent{Length: f.size, Zero: Chunk{f.id} == f.t.r.ZeroChunk(f.size)})
}

// ChunkAt names the chunk at an offset, a multiple of the chunk size, of a file that a Tree opened: a digest of its bytes.
func ChunkAt(ctx context.Context, f adapters.File, off int64) (Chunk, error) {
	switch f := f.(type) {
	case *smallFile:
		return Chunk{f.id}, nil
	case largeFile:
		chunks, err := f.Chunks(ctx, int(off/SegmentSize))
		if err != nil {
			return Chunk{}, err
		}
		return chunks[off%SegmentSize/f.r.ChunkSize()], nil
	}
	return Chunk{}, fault.Errorf(fault.Invalid, "a %T is no file of a backup", f)
}

// Text reads what an entry holds for kopia that is neither a file nor a directory: of a symbolic link its target.
func (t *Tree) Text(ctx context.Context, e TreeEntry) (string, error) {
	in, err := t.r.objectAt(ctx, t.contents, e.object)
	if err != nil {
		return "", err
	}
	defer in.Close()
	p, err := io.ReadAll(in)
	return string(p), err
}

// Contents names the contents that hold an entry: of a large file and a large directory there are several, with their
// indexes. What is below a directory is not among them. A content that is in no index is Corrupt.
func (t *Tree) Contents(ctx context.Context, e TreeEntry) ([]Chunk, error) {
	if id, _, ok := e.object.ContentID(); ok {
		return []Chunk{{id}}, nil
	}
	ids, err := object.VerifyObject(ctx, t.contents.(objectReader), e.object)
	if err != nil {
		return nil, t.r.corrupt(err)
	}
	all := make([]Chunk, len(ids))
	for i, id := range ids {
		all[i] = Chunk{id}
	}
	return all, nil
}

// Fits makes sure that what holds a file makes up as many bytes as the entry says. It reads indexes only, and no data of
// a large file. What does not fit is Corrupt.
func (t *Tree) Fits(ctx context.Context, e TreeEntry) error {
	f, err := t.Open(ctx, e)
	if err != nil {
		return err
	}
	defer f.Close()
	small, ok := f.(*smallFile)
	if !ok {
		for _, err := range f.Extents(ctx) {
			if err != nil {
				return err
			}
		}
		return nil
	}
	_, err = small.ReadAt(ctx, nil, 0)
	return err
}
