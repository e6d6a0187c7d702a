package adaptertest_test

import (
	"context"
	"iter"
	"slices"
	"strings"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/adapters/mem"
	"stillpoint.io/stillpoint/cbt"
)

// bentTree bends every tree that is opened.
func bentTree(bend func(adapters.Tree) adapters.Tree) func(*mem.Adapter, *mem.Store) adapters.Adapter {
	return func(a *mem.Adapter, _ *mem.Store) adapters.Adapter { return bentTrees{a, bend} }
}

type bentTrees struct {
	*mem.Adapter
	bend func(adapters.Tree) adapters.Tree
}

func (a bentTrees) OpenTree(ctx context.Context, id adapters.SnapshotID, base *adapters.SnapshotID) (adapters.Tree, error) {
	t, err := a.Adapter.OpenTree(ctx, id, base)
	if err != nil {
		return nil, err
	}
	return a.bend(t), nil
}

// entries tells a lie about every entry.
func entries(lie func(*adapters.Entry)) func(*mem.Adapter, *mem.Store) adapters.Adapter {
	return bentTree(func(t adapters.Tree) adapters.Tree { return bentEntries{t, lie} })
}

type bentEntries struct {
	adapters.Tree
	lie func(*adapters.Entry)
}

func (t bentEntries) Stat(ctx context.Context, path string) (adapters.Entry, error) {
	e, err := t.Tree.Stat(ctx, path)
	t.lie(&e)
	return e, err
}

func (t bentEntries) Entries(ctx context.Context, dir string) iter.Seq2[adapters.Entry, error] {
	return func(yield func(adapters.Entry, error) bool) {
		for e, err := range t.Tree.Entries(ctx, dir) {
			t.lie(&e)
			if !yield(e, err) {
				return
			}
		}
	}
}

// comparesNames takes a directory for unchanged if it has the same names in it, as one would by its time alone.
type comparesNames struct{ *mem.Adapter }

func (a comparesNames) OpenTree(ctx context.Context, id adapters.SnapshotID, base *adapters.SnapshotID) (adapters.Tree, error) {
	t, err := a.Adapter.OpenTree(ctx, id, base)
	if err != nil || base == nil {
		return t, err
	}
	old, err := a.Adapter.OpenTree(ctx, *base, nil)
	if err != nil {
		return nil, err
	}
	return sameNames{t, old}, nil
}

type sameNames struct {
	adapters.Tree
	old adapters.Tree
}

func (t sameNames) names(ctx context.Context, tree adapters.Tree, dir string) (names []string) {
	for e, err := range tree.Entries(ctx, dir) {
		if err == nil {
			names = append(names, e.Name)
		}
	}
	return names
}

func (t sameNames) lie(ctx context.Context, path string, e *adapters.Entry) {
	if e.Type == adapters.Directory {
		e.Unchanged = slices.Equal(t.names(ctx, t.Tree, path), t.names(ctx, t.old, path))
	}
}

func (t sameNames) Stat(ctx context.Context, path string) (adapters.Entry, error) {
	e, err := t.Tree.Stat(ctx, path)
	t.lie(ctx, path, &e)
	return e, err
}

func (t sameNames) Entries(ctx context.Context, dir string) iter.Seq2[adapters.Entry, error] {
	return func(yield func(adapters.Entry, error) bool) {
		for e, err := range t.Tree.Entries(ctx, dir) {
			t.lie(ctx, strings.TrimPrefix(dir+"/"+e.Name, "/"), &e)
			if !yield(e, err) {
				return
			}
		}
	}
}

func (t sameNames) Close() error {
	t.old.Close()
	return t.Tree.Close()
}

// falseHoles says of every file that it is one hole.
type falseHoles struct{ adapters.Tree }

func (t falseHoles) OpenFile(ctx context.Context, path string) (adapters.File, error) {
	f, err := t.Tree.OpenFile(ctx, path)
	if err != nil {
		return nil, err
	}
	return hollow{f}, nil
}

type hollow struct{ adapters.File }

func (f hollow) Extents(context.Context) cbt.Seq {
	if f.Size() == 0 {
		return cbt.Of()
	}
	return cbt.Of(cbt.Extent{Length: f.Size(), Zero: true})
}

// byName orders entries by name, directories among the rest.
type byName struct{ adapters.Tree }

func (t byName) Entries(ctx context.Context, dir string) iter.Seq2[adapters.Entry, error] {
	return func(yield func(adapters.Entry, error) bool) {
		var all []adapters.Entry
		for e, err := range t.Tree.Entries(ctx, dir) {
			if err != nil {
				yield(e, err)
				return
			}
			all = append(all, e)
		}
		slices.SortFunc(all, func(a, b adapters.Entry) int { return strings.Compare(a.Name, b.Name) })
		for _, e := range all {
			if !yield(e, nil) {
				return
			}
		}
	}
}

// followsLinks follows a symbolic link on the way.
type followsLinks struct{ adapters.Tree }

func (t followsLinks) Stat(ctx context.Context, path string) (adapters.Entry, error) {
	return t.Tree.Stat(ctx, strings.Replace(path, "link/", "d/", 1))
}

// earlyTree makes the volume at the beginning of the restore.
type earlyTree struct{ *mem.Adapter }

func (a earlyTree) BeginTree(ctx context.Context, spec adapters.TreeSpec) (adapters.TreeTarget, error) {
	t, err := a.Adapter.BeginTree(ctx, spec)
	if err != nil {
		return nil, err
	}
	return visible{t, a, spec.ID}, nil
}

type visible struct {
	adapters.TreeTarget
	a  earlyTree
	id adapters.VolumeID
}

func (t visible) Symlink(ctx context.Context, path, target string) error {
	if r, ok := adapters.As[adapters.Restorer](adapters.Adapter(t.a)); ok && path == "missing/x" {
		if v, err := r.Begin(ctx, adapters.VolumeSpec{ID: t.id, Size: 1, Token: "early"}); err == nil {
			v.Commit(ctx)
		}
	}
	return t.TreeTarget.Symlink(ctx, path, target)
}

// staleTree makes trees whose files are all fresh, whatever they hold.
type staleTree struct{ *mem.Adapter }

func (a staleTree) BeginTree(ctx context.Context, spec adapters.TreeSpec) (adapters.TreeTarget, error) {
	t, err := a.Adapter.BeginTree(ctx, spec)
	return stale{t}, err
}

type stale struct{ adapters.TreeTarget }

func (t stale) Create(ctx context.Context, path string, size int64) (adapters.FileTarget, error) {
	f, err := t.TreeTarget.Create(ctx, path, size)
	return freshFile{f}, err
}

type freshFile struct{ adapters.FileTarget }

func (freshFile) Fresh() bool { return true }
