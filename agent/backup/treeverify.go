package backup

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/repository"
	"stillpoint.io/stillpoint/fault"
)

// verifyTree is Verify for a tree: it reads every directory and every file. A directory that cannot be read counts with
// all below it.
func verifyTree(ctx context.Context, q VerifyRequest, b repository.Backup) (VerifyReport, error) {
	started := time.Now()
	c := &treeVerifier{r: q.Repository, progress: q.Progress, pool: readPool(q.Budget, q.Repository.ChunkSize()), report: VerifyReport{Backup: b.Handle.String(), Size: b.Size}}
	defer c.pool.Close()
	c.spare = make(chan struct{}, c.pool.workers()-1)
	if c.progress == nil {
		c.progress = new(Progress)
	}
	if err := c.run(ctx, b); err != nil {
		return VerifyReport{}, fmt.Errorf("verifying %s: %w", b.Handle, err)
	}
	c.report.BytesVerified, c.report.Seconds = c.verified.Load(), time.Since(started).Seconds()
	if c.wrong > 0 {
		return c.report, fault.Errorf(fault.Corrupt, "backup %s is damaged: %s (%d faults, %d bytes cannot be restored); back the volume up again", b.Handle, c.report.Bad[0], c.wrong, c.report.BytesBad)
	}
	return c.report, nil
}

type treeVerifier struct {
	r        *repository.Repository
	tree     *repository.Tree
	pool     *Pool
	spare    chan struct{} // of goroutines that may be started
	progress *Progress
	verified atomic.Int64

	mu     sync.Mutex
	report VerifyReport
	wrong  int
}

// run returns an error only if the verification could not be done.
func (c *treeVerifier) run(ctx context.Context, b repository.Backup) (err error) {
	if err := c.bad(c.r.CheckDescription(ctx, b), "", 0); err != nil {
		return err
	}
	if c.tree, err = c.r.OpenTree(ctx, b); err != nil {
		return c.bad(err, "", b.Size)
	}
	c.progress.Total.Store(b.Size)
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
	return c.wrong == 0
}

// bad notes a fault of the backup, and returns an error that is not one. Length is what cannot be restored because of it.
func (c *treeVerifier) bad(err error, path string, length int64) error {
	if err == nil || fault.KindOf(err) != fault.Corrupt {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.wrong++
	c.report.BytesBad += length
	if len(c.report.Bad) < badMax {
		c.report.Bad = append(c.report.Bad, fmt.Sprintf("%d bytes of %q: %v", length, path, err))
	}
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
	chunk := c.r.ChunkSize()
	defer c.progress.Done.Add(e.Size)
	for x, err := range f.Extents(ctx) {
		if err != nil {
			return err
		}
		for off := x.Offset; !x.Zero && off < x.End(); off += chunk {
			n := min(chunk, x.End()-off)
			if err := c.pool.throttle(ctx, n); err != nil {
				return err
			}
			if _, err := f.ReadAt(ctx, b.p[:n], off); err != nil {
				return err
			}
			c.verified.Add(n)
		}
	}
	return nil
}
