package backup

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/adapters/treefs"
	"stillpoint.io/stillpoint/agent/repository"
	"stillpoint.io/stillpoint/cbt"
	"stillpoint.io/stillpoint/fault"
)

// isTree reports whether the source is a tree of files.
func (s Source) isTree(ctx context.Context) (bool, error) {
	if s.repository != nil {
		b, err := s.repository.Backup(ctx, s.backup)
		return b.Form == adapters.TreeForm, err
	}
	found, err := s.adapter.Snapshot(ctx, s.snapshot)
	return found.Form == adapters.TreeForm, err
}

// openTree opens a source that is one, and says how it is called, and what a restore of it is named by.
func (s Source) openTree(ctx context.Context, insist bool) (t adapters.Tree, handle, token string, err error) {
	if s.repository != nil {
		b, err := s.repository.Backup(ctx, s.backup)
		if err != nil {
			return nil, "", "", err
		}
		if err := suspected(b.Suspect, insist); err != nil {
			return nil, "", "", fmt.Errorf("restoring %s: %w", b.Handle, err)
		}
		t, err := s.repository.OpenTree(ctx, b)
		if err != nil {
			return nil, "", "", fmt.Errorf("backup %s: %w", b.Handle, err)
		}
		return t, b.Handle.String(), b.Handle.String() + " " + b.Tree.String(), nil
	}
	trees, ok := adapters.As[adapters.Trees](s.adapter)
	if !ok {
		return nil, "", "", fault.Errorf(fault.Unsupported, "backend %s cannot open snapshots of trees", s.snapshot.Volume.Backend)
	}
	t, err = trees.OpenTree(ctx, s.snapshot, nil)
	return t, s.snapshot.String(), s.snapshot.Full(), err
}

// restoreTree makes a tree into a new volume or a new directory. Everything is made anew also after an interruption, but
// for the bytes of regular files: what was left of a file at the same path and of the same size is compared with the
// backup's digests, and what is right stays. What Only names becomes the root, if it is a directory, and otherwise what
// is in it.
func restoreTree(ctx context.Context, q RestoreRequest) (report RestoreReport, err error) {
	if q.Overwrite || q.Size != 0 {
		return report, fault.Errorf(fault.Invalid, "a tree of files is not written over a volume, and has no size: choose a new volume or directory")
	}
	from, handle, token, err := q.Source.openTree(ctx, q.Suspect || q.GiveUp)
	if err != nil {
		return report, err
	}
	defer func() {
		if err = errors.Join(err, from.Close()); err != nil {
			report, err = RestoreReport{}, fmt.Errorf("restoring %s to %s: %w", handle, q.place(), err)
		}
	}()
	e, err := from.Stat(ctx, q.Only)
	if err != nil {
		return report, err
	}
	to, err := q.begin(ctx, adapters.ShortName(token+" "+q.Only))
	if err != nil {
		return report, err
	}
	if q.GiveUp {
		return RestoreReport{Source: handle, Volume: q.place()}, to.Abort(ctx)
	}
	p := &planter{from: from, to: to, digests: q.Source.repository, progress: q.Progress, chunk: chunkOf(q.Source), links: map[uint64]string{}}
	p.pool = q.Source.pool(q.Budget)
	defer p.pool.Close()
	p.spare = make(chan struct{}, p.pool.workers()-1)
	if p.progress == nil {
		p.progress = new(Progress)
	}
	if e.Type == adapters.Directory {
		err = p.directory(ctx, q.Only, "", e)
	} else if err = p.entry(ctx, q.Only, e.Name, e); err == nil {
		err = to.Describe(ctx, "", adapters.Entry{Type: adapters.Directory, Mode: 0o700, Modified: e.Modified, UID: uint32(os.Geteuid()), GID: uint32(os.Getegid())})
	}
	if fault.KindOf(err) == fault.Corrupt {
		return report, errors.Join(err, to.Abort(context.WithoutCancel(ctx)))
	} else if err != nil {
		return report, errors.Join(err, to.Close())
	}
	v, err := to.Commit(ctx)
	if err != nil {
		return report, err
	}
	report = RestoreReport{Source: handle, Volume: q.place(), Path: v.Path, Size: p.size.Load(), BytesWritten: p.written.Load(), BytesFound: p.found.Load(), Entries: p.entries.Load()}
	if q.Directory == "" {
		report.Volume = v.ID.String()
	}
	return report, nil
}

func (s Source) pool(b Budget) *Pool {
	if s.repository != nil {
		return readPool(b, s.repository)
	}
	return newPool(b, chunkOf(s), chunkOf(s)+checkMemory(chunkOf(s)), 1)
}

func chunkOf(s Source) int64 {
	if s.repository != nil {
		return s.repository.ChunkSize()
	}
	return 1 << 20
}

func (q RestoreRequest) place() string {
	if q.Directory != "" {
		return q.Directory
	}
	return q.Volume.String()
}

// begin makes the target.
func (q RestoreRequest) begin(ctx context.Context, token string) (adapters.TreeTarget, error) {
	if q.Directory == "" {
		restorer, ok := adapters.As[adapters.TreeRestorer](q.Target)
		if !ok {
			return nil, fault.Errorf(fault.Unsupported, "backend %s cannot make volumes that are trees of files; restore into a directory", q.Volume.Backend)
		}
		return restorer.BeginTree(ctx, adapters.TreeSpec{ID: q.Volume, Token: token})
	}
	path, err := filepath.Abs(q.Directory)
	if err != nil {
		return nil, err
	}
	parent, err := os.Open(filepath.Dir(path))
	if errors.Is(err, os.ErrNotExist) {
		return nil, fault.Errorf(fault.NotFound, "%w: make the directory that %s is to be in", err, filepath.Base(path))
	} else if err != nil {
		return nil, fault.Errorf(fault.Invalid, "%w", err)
	}
	t, err := treefs.Begin(treefs.Directory(path, parent, filepath.Base(path), ".stillpoint-restore-"+adapters.ShortName(path)))
	if err != nil {
		return nil, err
	}
	return directoryTarget{t, path}, nil
}

// directoryTarget is a directory of this machine that is being made.
type directoryTarget struct {
	*treefs.Target
	path string
}

func (t directoryTarget) Commit(ctx context.Context) (adapters.Volume, error) {
	return adapters.Volume{Form: adapters.TreeForm, Path: t.path}, t.Finish(ctx)
}

// planter copies a tree into a target.
type planter struct {
	from     adapters.Tree
	to       adapters.TreeTarget
	digests  *repository.Repository // nil: of a snapshot there are none
	progress *Progress
	pool     *Pool
	spare    chan struct{} // of goroutines that may be started
	chunk    int64

	mu    sync.Mutex
	links map[uint64]string // where a file of several names was made

	entries, written, found, size atomic.Int64
}

// directory makes what is in a directory, and describes it at last: to make something in it changes its time.
func (p *planter) directory(ctx context.Context, from, to string, self adapters.Entry) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var jobs work
	var listing error
	for e, err := range p.from.Entries(ctx, from) {
		if listing = err; err != nil {
			break
		}
		a, b := join(from, e.Name), join(to, e.Name)
		job := func() error { return p.entry(ctx, a, b, e) }
		if e.Link != 0 { // in this order, so that a repetition makes the same name first, and finds what was left there
			file, another, err := p.make(ctx, b, e)
			job = func() error { return p.finish(ctx, a, b, e, file, another, err) }
		}
		jobs.do(p.spare, func() error {
			err := job()
			if err != nil {
				cancel()
			}
			return err
		})
	}
	if err := jobs.wait(); err != nil { // an error of the listing may only say that another one cancelled it
		return err
	}
	if listing != nil {
		return listing
	}
	p.entries.Add(1)
	return p.to.Describe(ctx, to, self)
}

// entry makes an entry, with all below it.
func (p *planter) entry(ctx context.Context, from, to string, e adapters.Entry) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if e.Type == adapters.Directory {
		if err := p.to.Mkdir(ctx, to); err != nil {
			return err
		}
		return p.directory(ctx, from, to, e)
	}
	file, another, err := p.make(ctx, to, e)
	return p.finish(ctx, from, to, e, file, another, err)
}

// finish fills and describes what make made.
func (p *planter) finish(ctx context.Context, from, to string, e adapters.Entry, file adapters.FileTarget, another bool, err error) error {
	p.entries.Add(1)
	if err != nil || another {
		return err
	}
	if file != nil {
		if err := errors.Join(p.fill(ctx, from, file, e.Size), file.Close()); err != nil {
			return err
		}
	}
	return p.to.Describe(ctx, to, e)
}

// make makes what has no bytes yet, or another name of what is there. Who makes the first name also fills and describes it.
func (p *planter) make(ctx context.Context, to string, e adapters.Entry) (file adapters.FileTarget, another bool, err error) {
	if e.Link != 0 {
		p.mu.Lock()
		defer p.mu.Unlock()
		if first, ok := p.links[e.Link]; ok {
			return nil, true, p.to.Link(ctx, first, to)
		}
		defer func() {
			if err == nil {
				p.links[e.Link] = to
			}
		}()
	}
	switch e.Type {
	case adapters.RegularFile:
		file, err = p.to.Create(ctx, to, e.Size)
	case adapters.Symlink:
		err = p.to.Symlink(ctx, to, e.Target)
	default:
		err = p.to.Special(ctx, to, e.Type, e.Device)
	}
	return file, false, err
}

// fill copies a file's bytes, chunk by chunk in parallel. What is zero is left out if the target reads as zeros.
func (p *planter) fill(ctx context.Context, path string, to adapters.FileTarget, size int64) (err error) {
	p.size.Add(size)
	p.progress.Total.Add(size)
	from, err := p.from.OpenFile(ctx, path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, from.Close()) }()
	if from.Size() != size {
		return fault.Errorf(fault.Corrupt, "%q opens with %d bytes and is listed with %d", path, from.Size(), size)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var jobs work
	for e, err := range cbt.Check(from.Extents(ctx), 0, size) {
		if err != nil {
			return errors.Join(jobs.wait(), err)
		}
		if e.Zero {
			if err := zero(ctx, to, e.Offset, e.Length); err != nil {
				return errors.Join(jobs.wait(), err)
			}
			p.progress.Done.Add(e.Length)
			continue
		}
		for e.Length > 0 {
			off, length := e.Offset, min(e.Length, p.chunk-e.Offset%p.chunk)
			jobs.do(p.spare, func() error {
				err := p.copy(ctx, from, to, off, length)
				if err != nil {
					cancel()
				}
				return err
			})
			e.Offset, e.Length = off+length, e.Length-length
		}
	}
	return jobs.wait()
}

// holeSize is the unit, in bytes, in which zeros are left out of a file.
const holeSize = 4096

func (p *planter) copy(ctx context.Context, from adapters.File, to adapters.FileTarget, off, length int64) error {
	b, err := p.pool.take(ctx)
	if err != nil {
		return err
	}
	defer p.pool.give(b)
	held, err := p.held(ctx, from, to, b.p[:length], off)
	if err != nil {
		return err
	}
	if !held {
		if err := p.pool.throttle(ctx, length); err != nil {
			return err
		}
		if err := readFull(ctx, from, b.p, off, length); err != nil {
			return err
		}
	}
	defer p.progress.Done.Add(length)
	for data := b.p[:length]; len(data) > 0; {
		n := holeSize - off%holeSize // to the end of a block, then all blocks of the same kind
		empty := isZero(data[:min(n, int64(len(data)))])
		for n < int64(len(data)) && isZero(data[n:min(n+holeSize, int64(len(data)))]) == empty {
			n += holeSize
		}
		n = min(n, int64(len(data)))
		switch {
		case empty: // also where it is held: it may be zeros that take room
			err = zero(ctx, to, off, n)
		case held:
			p.found.Add(n)
		default:
			err = to.WriteAt(ctx, data[:n], off)
			p.written.Add(n)
		}
		if err != nil {
			return err
		}
		data, off = data[n:], off+n
	}
	return nil
}

// held says that the target holds a chunk already, and reads it into b.
func (p *planter) held(ctx context.Context, from adapters.File, to adapters.FileTarget, b []byte, off int64) (bool, error) {
	if to.Fresh() || p.digests == nil {
		return false, nil
	}
	c, err := repository.ChunkAt(ctx, from, off)
	if err != nil {
		return false, err
	}
	if err := to.ReadAt(ctx, b, off); err != nil {
		return false, err
	}
	return p.digests.ChunkOf(b) == c, nil
}

// zero makes a hole, unless there is one.
func zero(ctx context.Context, to adapters.FileTarget, off, length int64) error {
	if to.Fresh() {
		return nil
	}
	return to.Zero(ctx, off, length)
}

var zeroBlock [holeSize]byte

func isZero(p []byte) bool { return bytes.Equal(p, zeroBlock[:len(p)]) }

// work is jobs that are done here or in goroutines, and waited for.
type work struct {
	wg   sync.WaitGroup
	mu   sync.Mutex
	errs []error
}

// do does a job in another goroutine if a place is spare, and itself if not.
func (w *work) do(spare chan struct{}, job func() error) {
	run := func() {
		if err := job(); err != nil {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.errs = append(w.errs, err)
		}
	}
	select {
	case spare <- struct{}{}:
		w.wg.Go(func() {
			defer func() { <-spare }()
			run()
		})
	default:
		run()
	}
}

// wait returns the first error that is not a consequence of another: a context that was cancelled because of it.
func (w *work) wait() error {
	w.wg.Wait()
	var cancelled error
	for _, err := range w.errs {
		if !errors.Is(err, context.Canceled) {
			return err
		}
		cancelled = err
	}
	return cancelled
}
