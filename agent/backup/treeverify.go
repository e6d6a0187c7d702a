package backup

import (
	"context"
	"fmt"
	"math"
	"sync"
	"sync/atomic"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/repository"
	"stillpoint.io/stillpoint/fault"
)

// tree is checker.backup for a tree: it reads every directory and every file. A directory that cannot be read counts with
// all below it.
func (c *checker) tree(ctx context.Context, b repository.Backup, f finding) (finding, error) {
	v := &treeVerifier{checker: c, pool: newPool(Budget{Workers: c.workers, Memory: math.MaxInt64}, c.m.Repository().ChunkSize(), 1)}
	defer v.pool.Close()
	v.spare = make(chan struct{}, v.pool.workers()-1)
	if err := v.run(ctx, b); err != nil {
		return f, err
	}
	f.data, f.read = v.verified.Load(), v.verified.Load()
	f.hurts = append(v.hurts, f.hurts...)
	return f, nil
}

type treeVerifier struct {
	*checker
	tree     *repository.Tree
	pool     *Pool
	spare    chan struct{} // of goroutines that may be started
	verified atomic.Int64

	mu    sync.Mutex
	hurts []Hurt
}

// run returns an error only if the verification could not be done.
func (c *treeVerifier) run(ctx context.Context, b repository.Backup) (err error) {
	if c.tree, err = c.m.OpenTree(ctx, b); err != nil {
		return c.bad(err, "", b.Size)
	}
	counted, err := c.directory(ctx, "", c.tree.Root())
	if err == nil && counted != b.Count && c.clean() {
		err = c.bad(fault.Errorf(fault.Corrupt, "the tree has %+v, its description says %+v", counted, b.Count), "", 0)
	}
	return err
}

// directory verifies what is in a directory, and counts it.
func (c *treeVerifier) directory(ctx context.Context, path string, dir repository.TreeEntry) (repository.Count, error) {
	counted := repository.Count{Entries: 1}
	var jobs work
	for e, err := range c.tree.Below(ctx, dir) {
		if err != nil {
			if err = c.bad(err, path, dir.Count().Bytes-counted.Bytes); err != nil {
				return counted, err
			}
			break
		}
		at := join(path, e.Name)
		n := e.Count()
		counted = repository.Count{Entries: counted.Entries + n.Entries, Files: counted.Files + n.Files, Bytes: counted.Bytes + n.Bytes}
		jobs.do(c.spare, func() error { return c.entry(ctx, at, e) })
	}
	if err := jobs.wait(); err != nil {
		return counted, err
	}
	return counted, nil
}

func (c *treeVerifier) entry(ctx context.Context, path string, e repository.TreeEntry) error {
	switch e.Type {
	case adapters.Directory:
		counted, err := c.directory(ctx, path, e)
		if err == nil && counted != e.Count() && c.clean() {
			err = c.bad(fault.Errorf(fault.Corrupt, "it has %+v, its entry says %+v", counted, e.Count()), path, 0)
		}
		return err
	case adapters.RegularFile:
		return c.bad(c.file(ctx, e), path, e.Size)
	case adapters.Symlink:
		text, err := c.tree.Text(ctx, e)
		if err == nil && text != e.Target {
			err = fault.Errorf(fault.Corrupt, "it leads to %q for kopia, and to %q", text, e.Target)
		}
		return c.bad(err, path, 0)
	}
	return nil
}

// clean says that nothing wrong was found so far: counts that differ because of it are not another fault.
func (c *treeVerifier) clean() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.hurts) == 0
}

// bad notes a fault of the backup, and returns an error that is not one. Length is what cannot be restored because of it.
func (c *treeVerifier) bad(err error, path string, length int64) error {
	if err == nil || fault.KindOf(err) != fault.Corrupt {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.hurts = append(c.hurts, Hurt{Part: FilePart, Length: length, Why: fmt.Sprintf("%q: %v", path, err)})
	return nil
}

// file reads every chunk of a file.
func (c *treeVerifier) file(ctx context.Context, e repository.TreeEntry) error {
	f, err := c.tree.Open(ctx, e)
	if err != nil {
		return err
	}
	defer f.Close()
	b, err := c.pool.take(ctx)
	if err != nil {
		return err
	}
	defer c.pool.give(b)
	chunk := c.m.Repository().ChunkSize()
	defer c.progress.Done.Add(e.Size)
	for x, err := range f.Extents(ctx) {
		if err != nil {
			return err
		}
		for off := x.Offset; !x.Zero && off < x.End(); off += chunk {
			n := min(chunk, x.End()-off)
			if c.quick {
				k, err := repository.ChunkAt(ctx, f, off)
				if err == nil {
					err = c.m.Locate(ctx, k)
				}
				if err != nil {
					return err
				}
			} else if _, err := f.ReadAt(ctx, b.p[:n], off); err != nil {
				return err
			}
			c.verified.Add(n)
		}
	}
	return nil
}
