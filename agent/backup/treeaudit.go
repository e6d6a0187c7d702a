package backup

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/repository"
	"stillpoint.io/stillpoint/fault"
)

// The audit of a tree reads some of the files that were reused, and compares them with the base: from each of some reused
// directories, a random choice, it goes down at random, and takes a few files of the directory in which it ends. It reads
// at most treeAuditBytes.
const (
	treeAuditFiles = 4        // of a directory
	treeAuditBytes = 64 << 20 // of a backup; of one file no more than a part of it
)

// audit reads some of what was reused. A difference is a distrustError.
func (g *grower) audit(ctx context.Context) error {
	left := int64(treeAuditBytes)
	for _, p := range g.reused.chosen {
		files, err := g.descend(ctx, p)
		if err != nil {
			return err
		}
		for _, f := range files {
			if left <= 0 {
				return nil
			}
			n, err := g.auditFile(ctx, f, left)
			if err != nil {
				return err
			}
			left -= n
		}
	}
	return nil
}

// descend goes from a reused entry down to some files.
func (g *grower) descend(ctx context.Context, at placed) ([]placed, error) {
	for at.Type == adapters.Directory {
		var dirs, files choice[placed]
		for e, err := range g.known().Below(ctx, at.TreeEntry) {
			if err != nil {
				return nil, baseFault(ctx, err)
			}
			switch e.Type {
			case adapters.Directory:
				dirs.offer(placed{join(at.path, e.Name), e})
			case adapters.RegularFile:
				files.offer(placed{join(at.path, e.Name), e})
			}
		}
		if len(files.chosen) > 0 && (len(dirs.chosen) == 0 || rand.IntN(2) == 0) {
			return files.chosen[:min(len(files.chosen), treeAuditFiles)], nil
		}
		if len(dirs.chosen) == 0 {
			return nil, nil
		}
		at = dirs.chosen[rand.IntN(len(dirs.chosen))]
	}
	return []placed{at}, nil
}

// auditFile compares a file's description and bytes, some chunks of a large one, with the base. It returns how many it
// read.
func (g *grower) auditFile(ctx context.Context, was placed, most int64) (read int64, err error) {
	changed := &distrustError{why: fmt.Sprintf("the file %q is called unchanged and is not what it was", was.path)}
	e, err := g.source.Stat(ctx, was.path)
	if fault.KindOf(err) == fault.NotFound || err == nil && !was.Same(e) {
		return 0, changed
	} else if err != nil {
		return 0, err
	}
	if e.Type != adapters.RegularFile {
		return 0, nil
	}
	f, err := g.source.OpenFile(ctx, was.path)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	old, err := g.known().Open(ctx, was.TreeEntry)
	if err != nil {
		return 0, baseFault(ctx, err)
	}
	defer old.Close()
	if f.Size() != e.Size {
		return 0, changed
	}
	g.filesAudited.Add(1)
	b, err := g.pool.take(ctx)
	if err != nil {
		return 0, err
	}
	defer g.pool.give(b)
	chunks := (e.Size + g.chunk - 1) / g.chunk
	for i := range min(chunks, max(1, most/4/g.chunk)) {
		off := i * g.chunk
		if chunks > most/4/g.chunk {
			off = rand.Int64N(chunks) * g.chunk
		}
		length := min(g.chunk, e.Size-off)
		if err := g.pool.throttle(ctx, length); err != nil {
			return read, err
		}
		if err := readFull(ctx, f, b.p, off, length); err != nil {
			return read, err
		}
		read += length
		g.audited.Add(length)
		same, err := sameChunk(ctx, old, g.r, b.p[:length], off)
		if err != nil {
			return read, baseFault(ctx, err)
		}
		if !same {
			return read, changed
		}
	}
	return read, nil
}

// sameChunk reports whether a file in the repository has these bytes, a chunk's, at an offset. Nothing but indexes is read for
// it: a chunk's name is its digest.
func sameChunk(ctx context.Context, f adapters.File, r *repository.Repository, p []byte, off int64) (bool, error) {
	c, err := repository.ChunkAt(ctx, f, off)
	return c == r.ChunkOf(p), err
}
