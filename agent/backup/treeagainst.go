package backup

import (
	"context"
	"errors"
	"fmt"
	"time"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/repository"
	"stillpoint.io/stillpoint/fault"
)

// runTree compares a backup's tree with a snapshot's: every entry, and every chunk of every file.
func (c *comparison) runTree(ctx context.Context, r *repository.Repository, live adapters.Tree) (err error) {
	m, err := r.OpenMedium(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.Close(context.WithoutCancel(ctx))) }()
	t, err := m.OpenTree(ctx, c.backup)
	if fault.KindOf(err) == fault.Corrupt {
		return nil // the verification has said so
	} else if err != nil {
		return err
	}
	b, err := newBuffer(max(r.ChunkSize(), adapters.ImageAlign))
	if err != nil {
		return err
	}
	defer b.free()
	c.progress.Total.Add(c.backup.Size)
	w := &treeComparison{comparison: c, r: r, t: t, live: live, p: b.p}
	self, err := live.Stat(ctx, "")
	if err != nil {
		return err
	}
	return w.entry(ctx, "", t.Root(), self)
}

// treeComparison is a comparison of two trees, one entry after the other.
type treeComparison struct {
	*comparison
	r    *repository.Repository
	t    *repository.Tree
	live adapters.Tree
	p    []byte
}

// tell notes a difference. They are in the order of the walk: of a tree none has an offset.
func (w *treeComparison) tell(path string, length int64, format string, args ...any) {
	w.differs(0, length, fmt.Sprintf("%q: ", path)+fmt.Sprintf(format, args...))
}

// entry compares what both have at a path.
func (w *treeComparison) entry(ctx context.Context, path string, e repository.TreeEntry, now adapters.Entry) error {
	if !e.Same(now) {
		w.tell(path, 0, "the backup has %s, the snapshot %s", described(e.Entry), described(now))
	}
	switch {
	case e.Type != now.Type:
		return nil
	case e.Type == adapters.Directory:
		return w.directory(ctx, path, e)
	case e.Type == adapters.RegularFile:
		return w.file(ctx, path, e)
	}
	return ctx.Err()
}

// described is an entry in words.
func described(e adapters.Entry) string {
	return fmt.Sprintf("a %s of %d bytes with mode %04o, owner %d:%d, time %s, target %q, device %d, link %d, attributes %q",
		e.Type, e.Size, e.Mode, e.UID, e.GID, e.Modified.Format(time.RFC3339Nano), e.Target, e.Device, e.Link, e.Attributes)
}

// directory goes through two directories, which have one order.
func (w *treeComparison) directory(ctx context.Context, path string, dir repository.TreeEntry) error {
	old := newCursor(ctx, w.t, &dir)
	defer old.stop()
	alone := func(until *adapters.Entry) {
		for old.at != nil && (until == nil || old.at.Before(*until)) {
			w.tell(join(path, old.at.Name), old.at.Count().Bytes, "only the backup has it")
			old.next()
		}
	}
	for now, err := range w.live.Entries(ctx, path) {
		if err != nil {
			return err
		}
		alone(&now)
		was, _, err := old.find(now)
		if fault.KindOf(err) == fault.Corrupt {
			return nil // the verification has said so
		} else if err != nil {
			return err
		}
		if at := join(path, now.Name); was == nil {
			w.tell(at, now.Size, "only the snapshot has it")
		} else if err := w.entry(ctx, at, *was, now); err != nil {
			return err
		}
	}
	alone(nil)
	if fault.KindOf(old.err) == fault.Corrupt {
		return nil
	}
	return old.err
}

// file compares the bytes of two files, as far as both have them.
func (w *treeComparison) file(ctx context.Context, path string, e repository.TreeEntry) (err error) {
	was, err := w.t.Open(ctx, e)
	if fault.KindOf(err) == fault.Corrupt {
		return nil // the verification has said so
	} else if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, was.Close()) }()
	now, err := w.live.OpenFile(ctx, path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, now.Close()) }()
	size := w.r.ChunkSize()
	for off := int64(0); off < e.Size; off += size {
		length := min(size, e.Size-off)
		if off+length > now.Size() {
			return nil // told as a difference of size
		}
		want, err := repository.ChunkAt(ctx, was, off)
		if fault.KindOf(err) == fault.Corrupt {
			continue // the verification has said so
		} else if err != nil {
			return err
		}
		if err := readFull(ctx, now, w.p, off, length); err != nil {
			return err
		}
		if got := w.r.ChunkOf(w.p[:length]); got != want {
			zero := w.r.ZeroChunk(length)
			w.tell(path, length, "%d bytes at %d: the backup has %s, the snapshot %s", length, off, named(want, zero), named(got, zero))
		}
		w.compared += length
		w.progress.Done.Add(length)
	}
	return nil
}
