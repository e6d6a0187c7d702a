package adapters

import (
	"context"
	"iter"

	"stillpoint.io/stillpoint/cbt"
)

type trees struct {
	layered
	inner Trees
}

func (r trees) OpenTree(ctx context.Context, id SnapshotID, base *SnapshotID) (Tree, error) {
	var t Tree
	err := r.call(ctx, "OpenTree", func(ctx context.Context) (err error) { t, err = r.inner.OpenTree(ctx, id, base); return err })
	if err != nil {
		if t != nil {
			t.Close() // opened, but the layer says otherwise
		}
		return nil, err
	}
	return tree{r.layered, t}, nil
}

type tree struct {
	layered
	Tree
}

func (t tree) Stat(ctx context.Context, path string) (e Entry, err error) {
	err = t.call(ctx, "Stat", func(ctx context.Context) error { e, err = t.Tree.Stat(ctx, path); return err })
	return e, err
}

func (t tree) Entries(ctx context.Context, dir string) iter.Seq2[Entry, error] {
	return listing(ctx, t.layered, "Entries", func(ctx context.Context) iter.Seq2[Entry, error] { return t.Tree.Entries(ctx, dir) })
}

func (t tree) OpenFile(ctx context.Context, path string) (File, error) {
	var f File
	err := t.call(ctx, "OpenFile", func(ctx context.Context) (err error) { f, err = t.Tree.OpenFile(ctx, path); return err })
	if err != nil {
		if f != nil {
			f.Close() // opened, but the layer says otherwise
		}
		return nil, err
	}
	return file{image{t.layered, f}, f}, nil
}

type file struct {
	image
	inner File
}

func (f file) Extents(ctx context.Context) cbt.Seq {
	return stream(ctx, f.layered, "Extents", f.inner.Extents, func(e cbt.Extent) (off, length int64) { return e.Offset, e.Length })
}

type treeRestorer struct {
	layered
	inner TreeRestorer
}

func (r treeRestorer) BeginTree(ctx context.Context, spec TreeSpec) (TreeTarget, error) {
	var t TreeTarget
	err := r.call(ctx, "BeginTree", func(ctx context.Context) (err error) { t, err = r.inner.BeginTree(ctx, spec); return err })
	if err != nil {
		if t != nil {
			t.Close() // begun, but the layer says otherwise
		}
		return nil, err
	}
	return treeTarget{r.layered, t}, nil
}

type treeTarget struct {
	layered
	TreeTarget
}

func (t treeTarget) Mkdir(ctx context.Context, path string) error {
	return t.call(ctx, "Mkdir", func(ctx context.Context) error { return t.TreeTarget.Mkdir(ctx, path) })
}

func (t treeTarget) Create(ctx context.Context, path string, size int64) (FileTarget, error) {
	var f FileTarget
	err := t.call(ctx, "Create", func(ctx context.Context) (err error) { f, err = t.TreeTarget.Create(ctx, path, size); return err })
	if err != nil {
		if f != nil {
			f.Close() // made, but the layer says otherwise
		}
		return nil, err
	}
	return fileTarget{t.layered, f}, nil
}

func (t treeTarget) Symlink(ctx context.Context, path, target string) error {
	return t.call(ctx, "Symlink", func(ctx context.Context) error { return t.TreeTarget.Symlink(ctx, path, target) })
}

func (t treeTarget) Special(ctx context.Context, path string, k FileType, d Device) error {
	return t.call(ctx, "Special", func(ctx context.Context) error { return t.TreeTarget.Special(ctx, path, k, d) })
}

func (t treeTarget) Link(ctx context.Context, old, path string) error {
	return t.call(ctx, "Link", func(ctx context.Context) error { return t.TreeTarget.Link(ctx, old, path) })
}

func (t treeTarget) Describe(ctx context.Context, path string, e Entry) error {
	return t.call(ctx, "Describe", func(ctx context.Context) error { return t.TreeTarget.Describe(ctx, path, e) })
}

func (t treeTarget) Commit(ctx context.Context) (v Volume, err error) {
	err = t.call(ctx, "Commit", func(ctx context.Context) error { v, err = t.TreeTarget.Commit(ctx); return err })
	return v, err
}

func (t treeTarget) Abort(ctx context.Context) error { return t.call(ctx, "Abort", t.TreeTarget.Abort) }

type fileTarget struct {
	layered
	FileTarget
}

func (f fileTarget) ReadAt(ctx context.Context, p []byte, off int64) error {
	return f.layer.Around(ctx, Call{"ReadAt", off, int64(len(p))}, func(ctx context.Context, c Call) error {
		return f.FileTarget.ReadAt(ctx, p[:c.Length], off)
	})
}

func (f fileTarget) Zero(ctx context.Context, off, length int64) error {
	return f.layer.Around(ctx, Call{"Zero", off, length}, func(ctx context.Context, c Call) error {
		return f.FileTarget.Zero(ctx, off, c.Length)
	})
}

func (f fileTarget) WriteAt(ctx context.Context, p []byte, off int64) error {
	return f.layer.Around(ctx, Call{"WriteAt", off, int64(len(p))}, func(ctx context.Context, c Call) error {
		return f.FileTarget.WriteAt(ctx, p[:c.Length], off)
	})
}
