package backup

import (
	"cmp"
	"maps"
	"slices"
	"sync"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/repository"
)

// sofar is how far the backup of a tree came: the directories that are being written, and what in them is finished since the
// last checkpoint. It holds sofarMax entries at most: what is finished beyond that before the next checkpoint is not in it,
// and is done again by who continues.
type sofar struct {
	mu   sync.Mutex
	root *unfinished
	held int
}

const sofarMax = 100_000

// unfinished is a directory that is being written.
type unfinished struct {
	self   adapters.Entry
	pieces []repository.TreeEntry // in checkpoints
	fresh  []repository.TreeEntry // finished since the last, in order
	open   map[string]*unfinished
	files  map[string]repository.FilePart // large ones that are being read
}

// begin notes that a directory is being written, in another one or as the root.
func (s *sofar) begin(in *unfinished, self adapters.Entry) *unfinished {
	u := &unfinished{self: self}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case in == nil:
		s.root = u
	case in.open == nil:
		in.open = map[string]*unfinished{self.Name: u}
	default:
		in.open[self.Name] = u
	}
	return u
}

// add notes that the next entry of a directory is finished.
func (s *sofar) add(u *unfinished, e repository.TreeEntry) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if d := u.open[e.Name]; d != nil && e.Type == adapters.Directory {
		s.held -= len(d.fresh)
		delete(u.open, e.Name)
	}
	if e.Type == adapters.RegularFile {
		delete(u.files, e.Name)
	}
	if s.held < sofarMax {
		s.held++
		u.fresh = append(u.fresh, e)
	}
}

// grow notes that so much of a large file is done.
func (s *sofar) grow(u *unfinished, self adapters.Entry, done repository.Part) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if u.files == nil {
		u.files = map[string]repository.FilePart{}
	}
	u.files[self.Name] = repository.FilePart{Self: self, Done: done}
}

// part gives what a checkpoint stores.
func (s *sofar) part() *repository.TreePart {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.held = 0
	if s.root == nil {
		return &repository.TreePart{}
	}
	return s.partOf(s.root)
}

func (s *sofar) partOf(u *unfinished) *repository.TreePart {
	p := &repository.TreePart{Self: u.self, Pieces: slices.Clone(u.pieces), Fresh: u.fresh}
	u.fresh = nil
	p.Stored = func(e repository.TreeEntry) {
		s.mu.Lock()
		defer s.mu.Unlock()
		u.pieces = append(u.pieces, e)
	}
	for _, o := range u.open {
		p.Open = append(p.Open, s.partOf(o))
	}
	p.Files = slices.SortedFunc(maps.Values(u.files), func(a, b repository.FilePart) int { return cmp.Compare(a.Self.Name, b.Self.Name) })
	slices.SortFunc(p.Open, func(a, b *repository.TreePart) int { return cmp.Compare(a.Self.Name, b.Self.Name) })
	return p
}

// step takes a checkpoint if one is due. Everybody waits when the work is far ahead of the one that is being taken. What an
// interrupted run had done counts, so that its checkpoint is not replaced by one that knows less.
func (g *grower) step() error {
	g.keeperMu.Lock()
	defer g.keeperMu.Unlock()
	work := g.work()
	return g.keeper.step(g.ctx, g.resumed.Load()+work, work)
}

// work is how much this run did, for the pace of checkpoints: bytes, and for each file that was read some more.
func (g *grower) work() int64 {
	const perFile = 1 << 10
	return g.read.Load() + perFile*g.filesRead.Load()
}

// known is a tree in the repository by which what is reused can be read.
func (g *grower) known() *repository.Tree {
	if g.base == nil {
		return g.part.Tree
	}
	return g.base
}
