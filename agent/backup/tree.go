package backup

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/repository"
	"stillpoint.io/stillpoint/fault"
)

// The backup of a tree of files walks it, directories in parallel, and writes a directory object for each. An entry that
// the backend calls unchanged since the base, and that is described as the base has it, is reused: a directory with all
// below it, without being opened; a file without being read. Nothing else is ever taken for unchanged: size and time prove
// nothing.
//
// The backend's word is distrusted in three ways. What it calls unchanged and is described otherwise makes the backup a
// full one. Of what is reused some files are read each time, and compared. And every walkEvery-th backup looks at every
// directory and every file's description, and reuses only the bytes of files.
//
// Memory follows the Pool, the number of names in one directory (about 60 bytes each, and the kernel's own), and the depth
// of the tree: each directory that is being walked holds treeWindow entries and a MiB of its object at most. So a directory
// of a million entries takes some 60 MiB here; its object is 250 MB of JSON, which we read and write piece by piece, and
// kopia as a whole.

const (
	// walkEvery is how many backups of a tree there are to one that looks at everything.
	walkEvery = 10
	// treeWindow is how many entries of a directory are worked on at once, or wait for one before them. Of bytes in small files
	// it is a stride of the Pace: a checkpoint knows nothing of what waits.
	treeWindow = 256
)

// TreeReport is what a backup of a tree did. Counts are of names.
type TreeReport struct {
	Entries      int64 `json:"entries"`      // in the tree
	DirsWalked   int64 `json:"dirs_walked"`  // directories that were listed
	DirsReused   int64 `json:"dirs_reused"`  // directories that were not, with all below them: the uppermost of each
	FilesRead    int64 `json:"files_read"`   // regular files
	FilesReused  int64 `json:"files_reused"` // in directories that were listed
	FilesAudited int64 `json:"files_audited"`
	Walked       bool  `json:"walked,omitempty"` // it looked at everything that was called unchanged
}

// runTree makes the backup of a tree as planned. It fails with a distrustError when the base turns out to be worth nothing.
func runTree(ctx context.Context, q Request, p Plan, started time.Time, report *Report) (made repository.Backup, err error) {
	trees, ok := adapters.As[adapters.Trees](q.Adapter)
	if !ok {
		return made, fault.Errorf(fault.Unsupported, "backend %s cannot open snapshots of trees", p.Snapshot.ID.Volume.Backend)
	}
	g := &grower{
		ctx: ctx, r: q.Repository, chunk: q.Repository.ChunkSize(), pool: q.Pool, progress: q.Progress, walk: p.Walk,
		spare: make(chan struct{}, q.Pool.workers()-1), links: map[uint64]*linked{},
	}
	if g.progress == nil {
		g.progress = new(Progress)
	}
	var base *adapters.SnapshotID
	if p.Base != nil {
		base = &p.Base.Snapshot
		if g.base, err = q.Repository.OpenTree(ctx, *p.Base); err != nil {
			return made, baseFault(ctx, err)
		}
	}
	g.source, err = trees.OpenTree(ctx, p.Snapshot.ID, base)
	if k := fault.KindOf(err); base != nil && (k == fault.NotFound || k == fault.Corrupt) {
		return made, &distrustError{why: err.Error()}
	} else if err != nil {
		return made, err
	}
	defer func() { err = errors.Join(err, g.source.Close()) }()
	if g.w, err = q.Repository.NewWriter(ctx); err != nil {
		return made, err
	}
	defer func() { err = errors.Join(err, g.w.Close(context.WithoutCancel(ctx))) }()
	b := repository.Backup{
		ID: p.ID, Volume: p.Snapshot.ID.Volume, Snapshot: p.Snapshot.ID, Kind: p.Kind, Size: p.Snapshot.Size, ChunkSize: g.chunk,
		Created: p.Snapshot.Created, Started: started,
		Cut: p.Snapshot.Notes.Cut, Consistency: p.Snapshot.Notes.Consistency, Unverified: p.Snapshot.Notes.Unverified,
	}
	if p.Base != nil {
		b.Base = p.Base.ID
		if !p.Walk {
			b.Believed = p.Base.Believed + 1
		}
	}
	if p.Unfinished != nil {
		g.w.Resume(*p.Unfinished)
	}
	g.keeper = keeper{pace: q.Pace, capture: func() func(context.Context) error {
		part, bytes := g.sofar.part(), g.resumed.Load()+g.read.Load()
		return func(ctx context.Context) error { return g.w.CheckpointTree(ctx, b, part, bytes) }
	}}
	if p.Resume != nil {
		b.Started = p.Resume.Started
		g.part = q.Repository.OpenTreePart(*p.Resume)
		g.keeper.kept = p.Resume.Done
	}

	root, err := g.root(ctx)
	err = errors.Join(err, g.keeper.wait())
	if _, distrusted := errors.AsType[*distrustError](err); err != nil && !distrusted && fault.KindOf(err) != fault.Corrupt {
		err = errors.Join(err, g.keeper.last(ctx, g.resumed.Load()+g.work()))
	}
	if err == nil {
		err = g.audit(ctx)
	}
	report.BytesResumed += g.resumed.Load()
	report.BytesRead += g.read.Load()
	report.BytesAudited += g.audited.Load()
	report.BytesNew += g.fresh.Load()
	report.Tree = g.report(root)
	if err != nil {
		return made, err
	}
	b.Finished = time.Now()
	if err := sameSnapshots(ctx, q.Adapter, p); err != nil {
		return made, err
	}
	made, err = g.w.CommitTree(ctx, b, root, g.written.chosen)
	report.BytesStored += g.w.Stored()
	return made, err
}

// grower makes the tree of a backup.
type grower struct {
	r        *repository.Repository
	w        *repository.Writer
	source   adapters.Tree
	base     *repository.Tree           // nil: nothing is reused
	part     *repository.UnfinishedTree // what an interrupted run had done; nil: nothing
	walk     bool
	chunk    int64
	pool     *Pool
	spare    chan struct{} // of goroutines that may be started: whoever finds none works himself
	progress *Progress

	linksMu sync.Mutex
	links   map[uint64]*linked // files of several names

	written choice[string] // paths of what to read back
	reused  choice[placed] // of what to audit

	ctx      context.Context // of the whole backup: a checkpoint outlives the directory whose entry was the occasion for it
	sofar    sofar
	keeper   keeper
	keeperMu sync.Mutex

	dirsWalked, dirsReused, filesRead, filesReused, filesAudited atomic.Int64 // names
	read, fresh, audited, resumed                                atomic.Int64 // bytes
}

func (g *grower) report(root repository.TreeEntry) *TreeReport {
	return &TreeReport{
		Entries: root.Count().Entries, DirsWalked: g.dirsWalked.Load(), DirsReused: g.dirsReused.Load(),
		FilesRead: g.filesRead.Load(), FilesReused: g.filesReused.Load(), FilesAudited: g.filesAudited.Load(), Walked: g.walk,
	}
}

// root walks the whole tree.
func (g *grower) root(ctx context.Context) (repository.TreeEntry, error) {
	e, err := g.source.Stat(ctx, "")
	if err != nil {
		return repository.TreeEntry{}, err
	}
	var was *repository.TreeEntry
	if g.base != nil {
		root := g.base.Root()
		was = &root
	}
	var part *repository.PartEntry
	if g.part != nil {
		root := g.part.Root()
		part = &root
	}
	return g.entry(ctx, nil, "", e, was, part)
}

// placed is an entry of the base and its path.
type placed struct {
	path string
	repository.TreeEntry
}

// linked is a file of several names: the first that is met reads it.
type linked struct {
	done chan struct{}
	made repository.TreeEntry
	err  error
}

// entry makes an entry of the backup, in a directory that is being written. was is what the base has at the path, part what
// an interrupted run of this backup had of it; nil for nothing.
func (g *grower) entry(ctx context.Context, in *unfinished, path string, e adapters.Entry, was *repository.TreeEntry, part *repository.PartEntry) (repository.TreeEntry, error) {
	if err := ctx.Err(); err != nil {
		return repository.TreeEntry{}, err
	}
	if e.Type == adapters.Directory && isDone(part, e) {
		return g.takeOver(path, part.TreeEntry), nil
	}
	if e.Unchanged && g.base != nil {
		if was == nil || !was.Same(e) {
			return repository.TreeEntry{}, &distrustError{why: fmt.Sprintf("%q is called unchanged and is not what it was", path)}
		}
		switch {
		case e.Type != adapters.Directory:
			if e.Type == adapters.RegularFile {
				g.filesReused.Add(1)
				g.reused.offer(placed{path, *was})
			}
			return *was, nil
		case !g.walk && !(e.ButLinks && was.HasLinks()):
			g.dirsReused.Add(1)
			g.reused.offer(placed{path, *was})
			return *was, nil
		}
	}
	switch e.Type {
	case adapters.Directory:
		if was != nil && was.Type != adapters.Directory {
			was = nil
		}
		return g.directory(ctx, in, path, e, was, part)
	case adapters.RegularFile:
		return g.file(ctx, in, path, e, part)
	}
	return g.w.WriteText(ctx, e)
}

// isDone says that an interrupted run had finished an entry: of this very snapshot, in which nothing changes.
func isDone(part *repository.PartEntry, e adapters.Entry) bool {
	return part != nil && !part.Unfinished && part.Same(e)
}

// takeOver makes what an interrupted run had finished part of this one. It is audited like what is reused of the base.
func (g *grower) takeOver(path string, done repository.TreeEntry) repository.TreeEntry {
	n := done.Count().Bytes
	g.resumed.Add(n)
	g.progress.Total.Add(n)
	g.progress.Done.Add(n)
	g.reused.offer(placed{path, done})
	return done
}

// file reads a file unless an interrupted run had, or waits for who reads it under another name.
func (g *grower) file(ctx context.Context, in *unfinished, path string, e adapters.Entry, part *repository.PartEntry) (repository.TreeEntry, error) {
	read := func() (repository.TreeEntry, error) {
		if isDone(part, e) {
			return g.takeOver(path, part.TreeEntry), nil
		}
		return g.readFile(ctx, in, path, e, part)
	}
	if e.Link == 0 {
		return read()
	}
	g.linksMu.Lock()
	l, met := g.links[e.Link]
	if !met {
		l = &linked{done: make(chan struct{})}
		g.links[e.Link] = l
	}
	g.linksMu.Unlock()
	if !met {
		l.made, l.err = read()
		close(l.done)
		return l.made, l.err
	}
	select {
	case <-l.done:
	case <-ctx.Done():
		return repository.TreeEntry{}, ctx.Err()
	}
	return l.made.As(e), l.err
}

// do runs work in another goroutine if one is to be had, and itself if not. done is called at its end.
func (g *grower) do(work, done func()) {
	select {
	case g.spare <- struct{}{}:
		go func() {
			defer done()
			defer func() { <-g.spare }()
			work()
		}()
	default:
		defer done()
		work()
	}
}

// directory walks a directory. was is the base's, part an interrupted run's, nil for none.
func (g *grower) directory(ctx context.Context, in *unfinished, path string, self adapters.Entry, was *repository.TreeEntry, part *repository.PartEntry) (repository.TreeEntry, error) {
	g.dirsWalked.Add(1)
	made, err := g.fill(ctx, g.w.NewDirectory(), g.sofar.begin(in, self), path, self, was, part)
	if err == nil {
		g.written.offer(path)
	}
	return made, err
}

// slot is an entry that is being made.
type slot struct {
	size int64 // in bytes, of a file that no checkpoint knows before it is whole
	done chan struct{}
	made repository.TreeEntry
	err  error
}

// ended says that nothing is done about the slot any more.
func (s *slot) ended() bool {
	select {
	case <-s.done:
		return true
	default:
		return false
	}
}

func (g *grower) fill(ctx context.Context, d *repository.DirectoryWriter, u *unfinished, path string, self adapters.Entry, was *repository.TreeEntry, part *repository.PartEntry) (made repository.TreeEntry, err error) {
	ctx, cancel := context.WithCancel(ctx)
	var failed firstError
	var pending []*slot
	var waiting int64 // bytes of theirs
	window := g.keeper.pace.stride(0)
	next := func() error {
		s := pending[0]
		pending, waiting = pending[1:], waiting-s.size
		<-s.done
		if s.err != nil {
			return s.err
		}
		if err := d.Add(ctx, s.made); err != nil {
			return err
		}
		g.sofar.add(u, s.made)
		return g.step()
	}
	defer func() { // whatever was started is waited for
		cancel()
		for _, s := range pending {
			if <-s.done; s.err == nil {
				g.sofar.add(u, s.made)
			}
		}
		if errors.Is(err, context.Canceled) {
			err = failed.or(err)
		}
	}()
	old := newCursor(ctx, g.base, was)
	defer old.stop()
	done := newPartCursor(ctx, g.part, part)
	defer done.stop()
	strict := g.walk && self.Unchanged // what is in it must be what was in it
	for e, err := range g.source.Entries(ctx, path) {
		if err != nil {
			return made, err
		}
		known, skipped, err := old.find(e)
		part, _, unread := done.find(e)
		if err = errors.Join(err, unread); err != nil {
			return made, baseFault(ctx, err)
		}
		var was *repository.TreeEntry
		if known != nil {
			was = &known.TreeEntry
		}
		linked := was != nil && was.Link != 0 && self.ButLinks
		if at := join(path, e.Name); strict && (skipped != "" || was == nil || !was.Same(e) && !linked) {
			return made, &distrustError{why: fmt.Sprintf("%q is called unchanged, and %q is not what it was", path, join(path, skipped+e.Name))}
		} else {
			s := &slot{done: make(chan struct{})}
			if e.Type == adapters.RegularFile && e.Size <= g.chunk && !e.Unchanged {
				s.size = e.Size
			}
			pending, waiting = append(pending, s), waiting+s.size
			g.do(func() {
				if s.made, s.err = g.entry(ctx, u, at, e, was, part); s.err != nil {
					failed.set(s.err)
					cancel()
				}
			}, func() { close(s.done) })
		}
		for len(pending) >= treeWindow || waiting > window || len(pending) > 0 && pending[0].ended() {
			if err := next(); err != nil {
				return made, err
			}
		}
	}
	if gone, err := old.rest(); strict && (err != nil || gone != "") {
		return made, &distrustError{why: fmt.Sprintf("%q is called unchanged, and %q is not in it any more: %v", path, gone, err)}
	}
	for len(pending) > 0 {
		if err := next(); err != nil {
			return made, err
		}
	}
	return d.Finish(ctx, self)
}

// firstError is the error for which the others were cancelled.
type firstError struct {
	mu  sync.Mutex
	err error
}

func (f *firstError) set(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err == nil {
		f.err = err
	}
}

func (f *firstError) or(err error) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err != nil {
		return f.err
	}
	return err
}

func join(dir, name string) string { return strings.TrimPrefix(dir+"/"+name, "/") }

// choice is a random choice of what it is offered: everything has the same chance.
type choice[T any] struct {
	mu      sync.Mutex
	chosen  []T
	offered int
}

func (c *choice[T]) offer(v T) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.offered++
	if len(c.chosen) < sampleSize {
		c.chosen = append(c.chosen, v)
	} else if i := rand.IntN(c.offered); i < sampleSize {
		c.chosen[i] = v
	}
}
