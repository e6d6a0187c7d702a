package repository

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/kopia/kopia/repo/content"
	"github.com/kopia/kopia/repo/manifest"
	"github.com/kopia/kopia/repo/object"
	"github.com/kopia/kopia/snapshot"
	"golang.org/x/sync/errgroup"

	"stillpoint.io/stillpoint/fault"
)

// references says which snapshots refer to which contents. Every index that snapshots share is read once, so the work
// follows what is stored and not how many backups there are of it; folders of trees are read once for each member.
//
// Memory: 20 bytes for each content in the repository, about 100 bytes for each distinct segment, and members/8 bytes
// for each distinct set of members that share a content. Where backups follow one another those sets are stretches of
// consecutive backups.
type references struct {
	r    *Repository
	from view

	mu      sync.Mutex // of all below
	table   *contentTable
	sets    *memberSets
	objects map[object.ID]setID // by which members indirect objects and folders were found
	nodes   map[object.ID]setID // segments, which are opened when it is known who refers to them
	names   []string            // of the members, for errors
}

// view is one state of a repository, to read from.
type view interface {
	manifests
	objectReader
}

type viewOf struct {
	manifests
	objectReader
}

// snapshots are the manifests that keep contents alive: backups, checkpoints, and what somebody made with kopia itself.
type snapshots struct {
	id       manifest.ID
	labels   map[string]string
	manifest snapshot.Manifest
}

// loadSnapshots loads every snapshot. One that cannot be read is an error: kopia's own garbage collection skips such a
// manifest, and takes its contents for unused.
func (r *Repository) loadSnapshots(ctx context.Context, from manifests) ([]snapshots, error) {
	entries, err := from.FindManifests(ctx, map[string]string{manifest.TypeLabelKey: snapshot.ManifestType})
	if err != nil {
		return nil, r.corrupt(err)
	}
	all := make([]snapshots, len(entries))
	for i, e := range entries {
		all[i].id, all[i].labels = e.ID, e.Labels
		if _, err := from.GetManifest(ctx, e.ID, &all[i].manifest); err != nil {
			return nil, r.corrupt(err)
		}
		if all[i].manifest.RootEntry == nil || all[i].manifest.RootObjectID() == object.EmptyID {
			return nil, fault.Errorf(fault.Corrupt, "repository %s: snapshot manifest %s has no root", r.at, e.ID)
		}
	}
	return all, nil
}

// name is what messages call a snapshot.
func (s snapshots) name() string {
	if id := s.labels[idLabel]; id != "" {
		return "backup " + id
	}
	if id := s.labels[checkpointLabel]; id != "" {
		return "the checkpoint of backup " + id
	}
	return "kopia's snapshot " + string(s.id)
}

// refer finds what the snapshots refer to. member gives each snapshot its number, from 0, below 1<<20. A content that is
// referred to and not there is Corrupt.
func (r *Repository) refer(ctx context.Context, from view, all []snapshots, member func(n int) int) (*references, error) {
	table, err := readContentTable(ctx, from)
	if err != nil {
		return nil, r.corrupt(err)
	}
	f := &references{r: r, from: from, table: table, sets: newMemberSets(), objects: map[object.ID]setID{}, nodes: map[object.ID]setID{}}
	for n, s := range all {
		if m := member(n); m >= len(f.names) {
			f.names = append(f.names, make([]string, m-len(f.names)+1)...)
			f.names[m] = s.name()
		}
	}
	readers, inner := errgroup.WithContext(ctx)
	readers.SetLimit(8) // latency is what reading waits for
	for n, s := range all {
		readers.Go(func() error {
			return f.entry(inner, member(n), s.manifest.RootEntry)
		})
	}
	if err := readers.Wait(); err != nil {
		return nil, err
	}
	readers, inner = errgroup.WithContext(ctx)
	readers.SetLimit(8)
	for id, set := range f.nodes {
		readers.Go(func() error { return f.open(inner, set, id) })
	}
	return f, readers.Wait()
}

// entry finds what an entry of a folder refers to.
func (f *references) entry(ctx context.Context, member int, e *snapshot.DirEntry) error {
	if e.ObjectID == object.EmptyID {
		return nil
	}
	folder := e.Type == snapshot.EntryTypeDirectory
	set, known := f.found(member, e.ObjectID, folder)
	if known {
		return nil
	}
	if !folder {
		return f.object(ctx, set, e.ObjectID, func(part object.ID) error {
			f.mu.Lock()
			defer f.mu.Unlock()
			f.nodes[part] = f.sets.union(f.nodes[part], set)
			return nil
		})
	}
	if err := f.pieces(ctx, set, e.ObjectID); err != nil {
		return err
	}
	children, err := f.folder(ctx, e.ObjectID)
	if err != nil {
		return fmt.Errorf("%s: %w", f.names[member], err)
	}
	for _, child := range children {
		if err := f.entry(ctx, member, child); err != nil {
			return err
		}
	}
	return nil
}

// pieces notes the contents of a folder, of which a large one has several, and an index of kopia's.
func (f *references) pieces(ctx context.Context, set setID, folder object.ID) error {
	ids, err := object.VerifyObject(ctx, f.from, folder)
	if err != nil {
		return fmt.Errorf("%s: %w", f.some(set), f.r.corrupt(err))
	}
	own := make([]object.ID, len(ids))
	for i, id := range ids {
		own[i] = object.DirectObjectID(id)
	}
	return f.contents(set, own...)
}

// found notes an object of a member, and says whether it was known as such before. Of direct objects, which are cheap,
// nothing is remembered.
func (f *references) found(member int, id object.ID, folder bool) (set setID, known bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	set = f.sets.single(member)
	if _, indirect := id.IndexObjectID(); !folder && !indirect {
		return set, false
	}
	before := f.objects[id]
	now := f.sets.union(before, set)
	f.objects[id] = now
	return set, now == before
}

func (f *references) folder(ctx context.Context, id object.ID) ([]*snapshot.DirEntry, error) {
	in, err := object.Open(ctx, f.from, id)
	if err != nil {
		return nil, f.r.corrupt(err)
	}
	defer in.Close()
	var d snapshot.DirManifest
	if err := json.NewDecoder(in).Decode(&d); err != nil {
		return nil, f.r.corrupt(fmt.Errorf("directory %s: %w", id, err))
	}
	if d.StreamType != "kopia:directory" {
		return nil, fault.Errorf(fault.Corrupt, "repository %s: object %s is no directory", f.r.at, id)
	}
	return d.Entries, nil
}

// open finds what an indirect object refers to, down to the last content.
func (f *references) open(ctx context.Context, set setID, id object.ID) error {
	return f.object(ctx, set, id, func(part object.ID) error { return f.open(ctx, set, part) })
}

// object notes the contents of an object, and calls part for those of its parts that are indirect objects themselves.
func (f *references) object(ctx context.Context, set setID, id object.ID, part func(object.ID) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	index, indirect := id.IndexObjectID()
	if !indirect {
		return f.contents(set, id)
	}
	own := []object.ID{index}
	if _, deeper := index.IndexObjectID(); deeper { // a top level of many contents
		ids, err := object.VerifyObject(ctx, f.from, index)
		if err != nil {
			return fmt.Errorf("%s: %w", f.some(set), f.r.corrupt(err))
		}
		own = own[:0]
		for _, c := range ids {
			own = append(own, object.DirectObjectID(c))
		}
	}
	if err := f.contents(set, own...); err != nil {
		return err
	}
	parts, err := f.r.parts(ctx, f.from, index)
	if err != nil {
		return fmt.Errorf("%s: %w", f.some(set), err)
	}
	direct := parts[:0]
	for _, p := range parts {
		if _, deeper := p.IndexObjectID(); !deeper {
			direct = append(direct, p)
		} else if err := part(p); err != nil {
			return err
		}
	}
	return f.contents(set, direct...)
}

// contents notes that the members of a set refer to the contents of direct objects.
func (f *references) contents(set setID, all ...object.ID) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, id := range all {
		c, _, ok := id.ContentID()
		s := f.table.find(c)
		if !ok || s == nil {
			return fault.Errorf(fault.Corrupt, "repository %s: %s refers to object %s, which is not there; `stillpoint verify` says what is hurt", f.r.at, f.names[f.sets.first(set)], id)
		}
		s.set = f.sets.union(s.set, set)
	}
	return nil
}

// some names one of the members that refer to something.
func (f *references) some(set setID) string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.names[f.sets.first(set)]
}

// parts lists the parts of an indirect object whose index is given.
func (r *Repository) parts(ctx context.Context, from objectReader, index object.ID) ([]object.ID, error) {
	in, err := object.Open(ctx, from, index)
	if err != nil {
		return nil, r.corrupt(err)
	}
	defer in.Close()
	var all []object.ID
	s, err := newScanner(in)
	for err == nil {
		var e entry
		if e, err = s.entry(); err != nil {
			break
		}
		id := object.DirectObjectID(e.id)
		if e.id.HasPrefix() {
			if id, err = object.ParseID("I" + e.id.String()); err != nil {
				break
			}
		}
		all = append(all, id)
	}
	if errors.Is(err, io.EOF) {
		return all, nil
	}
	entries, err := object.LoadIndexObject(ctx, from, index) // one that kopia wrote, of another kind of objects
	if err != nil {
		return nil, r.corrupt(err)
	}
	all = all[:0]
	for _, e := range entries {
		all = append(all, e.Object)
	}
	return all, nil
}

// contentTable has every content in kopia's index: open addressing, four slots of five in use.
type contentTable struct {
	slots []contentSlot
}

type contentSlot struct {
	key    uint64 // the first 8 bytes of the hash; 0: free
	length uint32 // packed, bytes
	set    setID
}

// readContentTable takes all contents that are there, also those that are marked as deleted, except of manifests.
func readContentTable(ctx context.Context, from objectReader) (*contentTable, error) {
	n := 0
	err := from.IterateContents(ctx, content.IterateOptions{IncludeDeleted: true}, func(content.Info) error {
		n++
		return ctx.Err()
	})
	if err != nil {
		return nil, err
	}
	t := &contentTable{make([]contentSlot, n+n/4+16)}
	used := 0
	return t, from.IterateContents(ctx, content.IterateOptions{IncludeDeleted: true}, func(c content.Info) error {
		if c.ContentID.Prefix() == manifest.ContentPrefix {
			return ctx.Err()
		}
		if used++; used == len(t.slots)-1 { // somebody stored a quarter as much again meanwhile
			return fault.Errorf(fault.Unavailable, "the index grew while it was read; try again")
		}
		t.slot(c.ContentID).length = c.PackedLength
		return ctx.Err()
	})
}

// slot finds a content's slot, or takes a free one for it. Two contents whose hashes begin with the same 8 bytes, of
// which there is one pair in a repository of ten million with a probability of 3 in a million, share one: both are kept
// when one is.
func (t *contentTable) slot(id content.ID) *contentSlot {
	key := max(1, binary.LittleEndian.Uint64(id.Hash()))
	for i := key % uint64(len(t.slots)); ; i = (i + 1) % uint64(len(t.slots)) {
		if s := &t.slots[i]; s.key == key || s.key == 0 {
			s.key = key
			return s
		}
	}
}

// find is nil if the content is not there.
func (t *contentTable) find(id content.ID) *contentSlot {
	if len(id.Hash()) < 8 {
		return nil
	}
	key := max(1, binary.LittleEndian.Uint64(id.Hash()))
	for i := key % uint64(len(t.slots)); t.slots[i].key != 0; i = (i + 1) % uint64(len(t.slots)) {
		if t.slots[i].key == key {
			return &t.slots[i]
		}
	}
	return nil
}
