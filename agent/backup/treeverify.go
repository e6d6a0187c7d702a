package backup

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/repository"
	"stillpoint.io/stillpoint/fault"
)

// Parts of a tree that may be hurt.
const (
	FilePart      Part = "file"
	DirectoryPart Part = "directory" // with all below it
)

// tree looks at every directory and every file of a tree: at contents that were not looked at before first, and if
// anything is bad by now, once more at what it is part of.
func (c *checker) tree(ctx context.Context, b repository.Backup) (f finding, err error) {
	t, err := c.m.OpenTree(ctx, b)
	if fault.KindOf(err) == fault.Corrupt {
		c.progress.Done.Add(b.Data)
		return finding{hurts: []Hurt{{Part: TopPart, Length: b.Size, Why: err.Error()}}}, nil
	} else if err != nil {
		return f, err
	}
	first := c.walker(t)
	if _, err := first.directory(ctx, "", t.Root()); err != nil {
		return f, err
	}
	f.data, f.read = b.Data, first.read.Load()
	if len(first.hurts) > 0 || len(c.bad) > 0 {
		f.hurts, err = c.treeHurts(ctx, t)
	}
	return f, err
}

// treeHurts finds what in a tree is hurt by what is known to be bad. It reads directories only.
func (c *checker) treeHurts(ctx context.Context, t *repository.Tree) ([]Hurt, error) {
	second := c.walker(t)
	second.known = true
	_, err := second.directory(ctx, "", t.Root())
	return second.hurts, err
}

func (c *checker) walker(t *repository.Tree) *treeWalker {
	return &treeWalker{checker: c, t: t, spare: make(chan struct{}, max(0, c.workers-1))}
}

// treeWalker is one look at a tree.
type treeWalker struct {
	*checker
	t     *repository.Tree
	spare chan struct{} // of goroutines that may be started
	known bool          // read no contents, tell what is known
	read  atomic.Int64

	hurtsMu sync.Mutex
	hurts   []Hurt
}

// hurt notes a fault of the backup, and returns an error that is not one.
func (w *treeWalker) hurt(err error, part Part, path string, e repository.TreeEntry, length int64) error {
	if err == nil || fault.KindOf(err) != fault.Corrupt {
		return err
	}
	w.hurtsMu.Lock()
	defer w.hurtsMu.Unlock()
	w.hurts = append(w.hurts, Hurt{Part: part, Length: length, Why: fmt.Sprintf("%q: %v", path, err), data: length, path: path, entry: e})
	return nil
}

// directory looks at a directory and all below it, and counts it.
func (w *treeWalker) directory(ctx context.Context, path string, dir repository.TreeEntry) (repository.Count, error) {
	counted := repository.Count{Entries: 1}
	if err := w.contents(ctx, dir); err != nil {
		return dir.Count(), w.hurt(err, DirectoryPart, path, dir, dir.Count().Bytes)
	}
	var jobs work
	var whole error
	for e, err := range w.t.Below(ctx, dir) {
		if err != nil {
			whole = w.hurt(err, DirectoryPart, path, dir, dir.Count().Bytes-counted.Bytes)
			counted = dir.Count() // one fault is enough
			break
		}
		at, n := join(path, e.Name), e.Count()
		counted = repository.Count{Entries: counted.Entries + n.Entries, Files: counted.Files + n.Files, Bytes: counted.Bytes + n.Bytes}
		jobs.do(w.spare, func() error { return w.entry(ctx, at, e) })
	}
	return counted, errors.Join(jobs.wait(), whole)
}

func (w *treeWalker) entry(ctx context.Context, path string, e repository.TreeEntry) error {
	switch e.Type {
	case adapters.Directory:
		counted, err := w.directory(ctx, path, e)
		if err == nil && counted != e.Count() {
			err = w.hurt(fault.Errorf(fault.Corrupt, "it has %+v, its entry says %+v", counted, e.Count()), DirectoryPart, path, e, 0)
		}
		return err
	case adapters.RegularFile:
		err := w.contents(ctx, e)
		if err == nil && !w.known {
			err = w.t.Fits(ctx, e)
		}
		if !w.known {
			w.progress.Done.Add(e.Size)
		}
		return w.hurt(err, FilePart, path, e, e.Size)
	case adapters.Symlink:
		err := w.contents(ctx, e)
		if err == nil && !w.quick {
			var text string
			if text, err = w.t.Text(ctx, e); err == nil && text != e.Target {
				err = fault.Errorf(fault.Corrupt, "it leads to %q for kopia, and to %q", text, e.Target)
			}
		}
		return w.hurt(err, FilePart, path, e, 0)
	}
	return w.hurt(w.contents(ctx, e), FilePart, path, e, 0)
}

// contents looks at all contents that hold an entry, as far as nobody did before, and says what is wrong with the first that
// is bad.
func (w *treeWalker) contents(ctx context.Context, e repository.TreeEntry) error {
	all, err := w.t.Contents(ctx, e)
	if err != nil {
		return err
	}
	var first error
	for _, k := range all {
		w.mu.Lock()
		why, bad := w.bad[k]
		fresh := !w.known && w.seen.Add(k)
		w.mu.Unlock()
		switch {
		case fresh:
			n, err := w.m.Check(ctx, k, w.quick)
			if err != nil && fault.KindOf(err) != fault.Corrupt {
				return err
			}
			if err != nil {
				w.spoilt(k, err)
				first = cmp.Or(first, err)
			}
			w.read.Add(n)
		case bad:
			first = cmp.Or(first, fault.Errorf(fault.Corrupt, "%s", why))
		}
	}
	return first
}
