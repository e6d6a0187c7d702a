package backup

import (
	"context"
	"errors"
	"fmt"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/repository"
	"stillpoint.io/stillpoint/fault"
)

// grown makes what is hurt of a tree again, from what snapshots have at the same path: of a large file only what is bad, and
// of a directory all directories below it that are. What is below a directory shows when that is whole.
func (h *healing) grown(ctx context.Context, b repository.Backup, hurt Hurt) (ok bool, why string, err error) {
	key := hurt.entry.Content()
	if h.whole[key] {
		return true, "", nil
	}
	switch hurt.entry.Type {
	case adapters.RegularFile:
		ok, why, err = h.file(ctx, b, hurt)
	case adapters.Directory:
		ok, why, err = h.directory(ctx, b, hurt)
	default: // its directory has what it holds
		var is remade
		is, err = h.remake(hurt, func(k *repository.Remake) (repository.TreeEntry, error) { return k.Text(ctx, hurt.entry.Entry) })
		if ok = is == remadeAsItWas; !ok {
			why = fmt.Sprintf("%q: its entry in the directory says something else", hurt.path)
		}
	}
	if ok && err == nil {
		h.whole[key] = true
	}
	return ok, why, err
}

// remade is what came of making something again.
type remade int

const (
	remadeOtherwise  remade = iota // something else came out
	remadeForNothing               // it came out as it was, and nothing that it consists of is lost
	remadeAsItWas                  // and what was lost is stored, or could be
)

// remake has grow make what is hurt again, and once more to store it when the same came out.
func (h *healing) remake(hurt Hurt, grow func(*repository.Remake) (repository.TreeEntry, error)) (remade, error) {
	k := h.m.NewRemake()
	made, err := grow(k)
	switch {
	case err != nil || !made.Holds(hurt.entry):
		return remadeOtherwise, err
	case k.Lost() == 0:
		return remadeForNothing, nil
	case h.to == nil:
		h.count += k.Lost()
		return remadeAsItWas, nil
	}
	before := h.to.Stored
	_, err = grow(h.to.NewRemake())
	h.count += h.to.Stored - before
	return remadeAsItWas, err
}

// file makes what is bad of a file again.
func (h *healing) file(ctx context.Context, b repository.Backup, hurt Hurt) (ok bool, why string, err error) {
	needs, err := h.needs(ctx, hurt.entry)
	if err != nil {
		return false, "", err
	}
	if len(needs) == 0 {
		return false, "what is there does not fit together: " + hurt.String(), nil
	}
	all, why, err := h.sources.of(ctx, b)
	if err != nil {
		return false, "", err
	}
	if len(all) > 0 && why == "" {
		why = fmt.Sprintf("no snapshot of %s has the bytes that were in %q", b.Volume, hurt.path)
	}
	for _, from := range all {
		left, err := h.fromFile(ctx, from, hurt, needs)
		if unread := (*sourceError)(nil); errors.As(err, &unread) && ctx.Err() == nil {
			if kind := fault.KindOf(err); kind != fault.NotFound && kind != fault.Invalid { // else there is no such file
				why = fmt.Sprintf("snapshot %s: %v", from.id, err)
			}
		} else if err != nil {
			return false, "", err
		}
		if needs = left; len(needs) == 0 {
			return true, "", nil
		}
	}
	return false, why, nil
}

// need is a content of a file that is bad.
type need struct {
	name repository.Chunk
	s    repository.Segment // of which it is the index; zero for a chunk
	Hurt                    // where in the file
	top  bool               // the top level of the file
}

// needs looks at everything that holds a file. What is below a bad index is not known yet.
func (h *healing) needs(ctx context.Context, e repository.TreeEntry) (needs []need, err error) {
	look := func(name repository.Chunk, s repository.Segment, off, length int64) (bool, error) {
		_, err := h.m.Check(ctx, name, false)
		if fault.KindOf(err) != fault.Corrupt {
			return false, err
		}
		needs = append(needs, need{name: name, s: s, Hurt: Hurt{Offset: off, Length: length}})
		return true, nil
	}
	if e.Size <= h.r.ChunkSize() {
		if name, ok := e.Chunk(); ok {
			_, err = look(name, repository.Segment{}, 0, e.Size)
		}
		return needs, err
	}
	image, err := h.m.OpenImage(ctx, e.AsImage())
	if fault.KindOf(err) == fault.Corrupt {
		return []need{{Hurt: Hurt{Length: e.Size}, top: true}}, nil
	} else if err != nil {
		return nil, err
	}
	defer image.Close()
	looked := map[repository.Chunk]bool{}
	for n := range image.Segments() {
		s, _ := image.Segment(n)
		start := int64(n) * repository.SegmentSize
		if bad, err := look(s.Index(), s, start, s.Length); err != nil {
			return nil, err
		} else if bad {
			continue
		}
		chunks, err := image.Chunks(ctx, n)
		if fault.KindOf(err) == fault.Corrupt {
			continue
		} else if err != nil {
			return nil, err
		}
		for i, name := range chunks {
			if looked[name] {
				continue
			}
			looked[name] = true
			off := int64(i) * h.r.ChunkSize()
			if _, err := look(name, repository.Segment{}, start+off, min(h.r.ChunkSize(), s.Length-off)); err != nil {
				return nil, err
			}
		}
	}
	return needs, nil
}

// fromFile takes from a snapshot's file what it has of the needs, and returns the others.
func (h *healing) fromFile(ctx context.Context, from source, hurt Hurt, needs []need) (left []need, err error) {
	f, err := from.tree.OpenFile(ctx, hurt.path)
	if err != nil {
		return needs, &sourceError{err}
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	for i, n := range needs {
		ok := h.done[n.name]
		if !ok && n.Offset+n.Length <= f.Size() {
			if n.top {
				ok, err = h.fileTop(ctx, f, hurt.entry)
			} else {
				ok, err = h.try(ctx, f, n.name, n.s, n.Hurt)
			}
			if err != nil {
				return append(left, needs[i:]...), err
			}
			if ok {
				h.count++
			}
		}
		if !ok {
			left = append(left, n)
		} else if !n.top {
			h.done[n.name] = true
		}
	}
	return left, nil
}

// fileTop makes the top level of a large file again, for which all of it is read.
func (h *healing) fileTop(ctx context.Context, f adapters.File, e repository.TreeEntry) (bool, error) {
	if f.Size() != e.Size {
		return false, nil
	}
	segments, err := h.fileSegments(ctx, f)
	if err != nil || !h.r.IsTop(e.AsImage(), segments) {
		return false, err
	}
	if h.to == nil {
		return true, nil
	}
	return true, h.to.Top(ctx, e.AsImage(), segments)
}

// fileSegments names the segments of a file.
func (h *healing) fileSegments(ctx context.Context, f adapters.File) ([]repository.Segment, error) {
	var segments []repository.Segment
	for start := int64(0); start < f.Size(); start += repository.SegmentSize {
		length := min(repository.SegmentSize, f.Size()-start)
		chunks, err := h.chunks(ctx, f, start, length)
		if err != nil {
			return nil, err
		}
		segments = append(segments, h.r.SegmentOf(chunks, length))
	}
	return segments, nil
}

// directory makes a directory again, and those below it, for which everything in it is read, and again to be stored.
func (h *healing) directory(ctx context.Context, b repository.Backup, hurt Hurt) (ok bool, why string, err error) {
	all, why, err := h.sources.of(ctx, b)
	if err != nil {
		return false, "", err
	}
	for _, from := range all {
		is, err := h.remake(hurt, func(k *repository.Remake) (repository.TreeEntry, error) {
			return h.regrow(ctx, k, from.tree, hurt.path)
		})
		if unread := (*sourceError)(nil); errors.As(err, &unread) && ctx.Err() == nil {
			why = fmt.Sprintf("snapshot %s: %v", from.id, err)
			continue
		} else if err != nil {
			return false, "", err
		}
		switch is {
		case remadeAsItWas:
			return true, "", nil
		case remadeForNothing:
			return false, "what is there does not fit together: " + hurt.String(), nil
		case remadeOtherwise:
			why = fmt.Sprintf("no snapshot of %s has the directory %q as it was", b.Volume, hurt.path)
		}
	}
	return false, why, nil
}

// regrow makes the entry at a path again as a backup of the snapshot would, and all below it.
func (h *healing) regrow(ctx context.Context, k *repository.Remake, from adapters.Tree, path string) (repository.TreeEntry, error) {
	e, err := from.Stat(ctx, path)
	if err != nil {
		return repository.TreeEntry{}, &sourceError{err}
	}
	return h.regrowEntry(ctx, k, from, path, e)
}

func (h *healing) regrowEntry(ctx context.Context, k *repository.Remake, from adapters.Tree, path string, e adapters.Entry) (repository.TreeEntry, error) {
	switch e.Type {
	case adapters.Directory:
	case adapters.RegularFile:
		return h.name(ctx, from, path, e)
	default:
		return k.Text(ctx, e)
	}
	d := k.Directory()
	for below, err := range from.Entries(ctx, path) {
		if err != nil {
			return repository.TreeEntry{}, &sourceError{err}
		}
		made, err := h.regrowEntry(ctx, k, from, join(path, below.Name), below)
		if err == nil {
			err = d.Add(ctx, made)
		}
		if err != nil {
			return made, err
		}
	}
	return d.Finish(ctx, e)
}

// name names what holds a file of a snapshot.
func (h *healing) name(ctx context.Context, from adapters.Tree, path string, e adapters.Entry) (made repository.TreeEntry, err error) {
	f, err := from.OpenFile(ctx, path)
	if err != nil {
		return made, &sourceError{err}
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if f.Size() != e.Size {
		return made, &sourceError{fault.Errorf(fault.Corrupt, "%q opens with %d bytes and is listed with %d", path, f.Size(), e.Size)}
	}
	if e.Size <= h.r.ChunkSize() {
		if err := readFull(ctx, f, h.chunk.p, 0, e.Size); err != nil {
			return made, &sourceError{err}
		}
		return h.r.ChunkOf(h.chunk.p[:e.Size]).Holding(e), nil
	}
	segments, err := h.fileSegments(ctx, f)
	if err != nil {
		return made, err
	}
	image, err := h.r.ImageOf(segments)
	return image.Holding(e), err
}
