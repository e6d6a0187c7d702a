package adaptertest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

// grown is a snapshot of a tree together with what it must hold.
type grown struct {
	snap  adapters.Snapshot
	model *TreeModel
}

// trees changes a tree at random and snapshots it after every round; the last two rounds change nothing.
func (s *suite) trees(t *testing.T, a adapters.Adapter, rounds int) []grown {
	t.Helper()
	v, r := s.CreateTree(t), seeded(t)
	m := NewTreeModel(v)
	m.Times = s.Times
	var all []grown
	for i := range rounds {
		changes := 25
		if i >= rounds-2 {
			changes = 0
		}
		if err := m.Grow(r, changes); err != nil {
			t.Fatalf("the harness could not change the tree: %v", err)
		}
		all = append(all, grown{s.snap(t, a, v.ID(), fmt.Sprintf("grown-%d", i)), m.Clone()})
	}
	return all
}

func (s *suite) openTree(t testing.TB, a adapters.Adapter, id adapters.SnapshotID, base *adapters.SnapshotID) adapters.Tree {
	t.Helper()
	trees, _ := adapters.As[adapters.Trees](a)
	tree, err := trees.OpenTree(t.Context(), id, base)
	succeed(t, "OpenTree opens a snapshot that is ready", err)
	t.Cleanup(func() {
		if err := tree.Close(); err != nil {
			t.Errorf("broken promise: a tree closes: %v", err)
		}
	})
	return tree
}

// tree compares every snapshot with its model, and every pair of them.
func (s *suite) tree(t *testing.T) {
	a := s.open(t)
	all := s.trees(t, a, 6)
	for _, x := range all {
		vol, err := a.Volume(t.Context(), x.snap.ID.Volume)
		succeed(t, "Volume finds a volume", err)
		if vol.Form != adapters.TreeForm || x.snap.Form != adapters.TreeForm {
			broken(t, "a volume that is a tree and its snapshots say so", "%+v, %+v", vol, x.snap)
		}
		for _, base := range append(all, grown{}) {
			var id *adapters.SnapshotID
			if base.model != nil {
				id = &base.snap.ID
			}
			t.Run("", func(t *testing.T) { // the tree is closed at its end
				if _, err := x.model.Compare(t.Context(), s.openTree(t, a, x.snap.ID, id), base.model); err != nil {
					broken(t, "a tree is the volume at its instant, and unchanged is only what is", "%s since %v: %v", x.snap.ID, base.snap.ID.Name, err)
				}
			})
		}
	}
	t.Run("parallel", func(t *testing.T) {
		last := all[len(all)-1]
		tree := s.openTree(t, a, last.snap.ID, &all[0].snap.ID)
		errs := make([]error, 4)
		var wg sync.WaitGroup
		for i := range errs {
			wg.Go(func() { _, errs[i] = last.model.Compare(t.Context(), tree, all[0].model) })
		}
		wg.Wait()
		succeed(t, "a tree is safe in parallel", errors.Join(errs...))
	})
}

func (s *suite) treeErrors(t *testing.T) {
	a := s.open(t)
	trees, _ := adapters.As[adapters.Trees](a)
	v, w := s.CreateTree(t), s.CreateTree(t)
	m := NewTreeModel(v)
	m.Times = s.Times
	if err := m.Apply(func(m *TreeModel) error { return m.Mkdir("d", nil) }, func(m *TreeModel) error { return m.Write("d/f", []byte("x"), 0, nil) },
		func(m *TreeModel) error { return m.Symlink("up", "..", nil) }, func(m *TreeModel) error { return m.Symlink("link", "d", nil) }); err != nil {
		t.Fatal(err)
	}
	cutting := s.cut(t, a, v.ID(), "cutting")
	_, err := trees.OpenTree(t.Context(), cutting.ID, nil)
	refuse(t, "nobody reads what is still cutting", err, fault.Invalid, fault.Unavailable)
	one, two := s.snap(t, a, v.ID(), "one"), s.snap(t, a, w.ID(), "two")
	_, err = trees.OpenTree(t.Context(), one.ID, &two.ID)
	refuse(t, "snapshots of two volumes cannot be compared", err, fault.Invalid)
	missing := adapters.SnapshotID{Volume: one.ID.Volume, Name: "missing"}
	_, err = trees.OpenTree(t.Context(), missing, nil)
	refuse(t, "a snapshot that is not there is NotFound", err, fault.NotFound)
	_, err = trees.OpenTree(t.Context(), one.ID, &missing)
	refuse(t, "a base that is not there is NotFound", err, fault.NotFound)
	if s.can["open"] {
		o, _ := adapters.As[adapters.Opener](a)
		_, err := o.Open(t.Context(), one.ID)
		refuse(t, "a tree has no image", err, fault.Unsupported)
		image := s.snap(t, a, s.create(t, s.Size).ID(), "image")
		_, err = trees.OpenTree(t.Context(), image.ID, nil)
		refuse(t, "an image has no tree", err, fault.Unsupported)
	}
	tree := s.openTree(t, a, one.ID, nil)
	for _, path := range []string{"missing", "d/missing", "d/f/below", "up/d", "link/f", "..", "d/../d", "/d", "d/", "a\x00b"} {
		kinds := []fault.Kind{fault.NotFound, fault.Invalid}
		_, err := tree.Stat(t.Context(), path)
		refuse(t, "what is not in the tree is not found in it, and no link is followed", err, kinds...)
		_, err = tree.OpenFile(t.Context(), path)
		refuse(t, "what is not in the tree is not found in it, and no link is followed", err, kinds...)
		for e, err := range tree.Entries(t.Context(), path) {
			if err == nil {
				broken(t, "what is not in the tree is not found in it, and no link is followed", "%q has %q", path, e.Name)
			}
			refuse(t, "what is not in the tree is not found in it, and no link is followed", err, kinds...)
		}
	}
	for _, path := range []string{"", "d", "link"} {
		_, err := tree.OpenFile(t.Context(), path)
		refuse(t, "only a regular file is opened", err, fault.Invalid)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := tree.Stat(ctx, "d"); !errors.Is(err, context.Canceled) {
		broken(t, "a method whose context has ended says so", "Stat: %v", err)
	}
	for _, err := range tree.Entries(ctx, "d") {
		if !errors.Is(err, context.Canceled) {
			broken(t, "a method whose context has ended says so", "Entries: %v", err)
		}
	}
	for range tree.Entries(t.Context(), "") {
		break // leaving early must release what the stream holds
	}
}

// replant makes a tree of every type of entry and looks at what came of it.
func (s *suite) replant(t *testing.T) {
	a := s.open(t)
	restorer, _ := adapters.As[adapters.TreeRestorer](a)
	all := s.trees(t, a, 5)
	source := all[2]
	id := s.AbsentTree(t)
	spec := adapters.TreeSpec{ID: id, Token: "replant"}
	begin := func() adapters.TreeTarget {
		target, err := restorer.BeginTree(t.Context(), spec)
		succeed(t, "BeginTree makes a target", err)
		t.Cleanup(func() {
			if err := target.Abort(context.Background()); err != nil {
				t.Errorf("broken promise: Abort after Commit, Abort or Close does nothing: %v", err)
			}
		})
		return target
	}
	target := begin()
	_, err := restorer.BeginTree(t.Context(), spec)
	refuse(t, "a target that somebody has open is Busy", err, fault.Busy)
	succeed(t, "what is not there can be made", target.Mkdir(t.Context(), "left by a dead process"))
	succeed(t, "a target closes", target.Close())
	target = begin()
	succeed(t, "what is not there can be made", source.model.plantIn(t.Context(), target))
	for what, err := range map[string]error{
		"over the root": target.Mkdir(t.Context(), ""), "dot-dot": target.Mkdir(t.Context(), "../x"), "nowhere": target.Symlink(t.Context(), "missing/x", "y"),
	} {
		refuse(t, "nothing is made outside of the tree or over what is there: "+what, err, fault.Invalid, fault.NotFound, fault.Busy)
	}
	_, err = a.Volume(t.Context(), id)
	refuse(t, "a target is not a volume until Commit", err, fault.NotFound)
	vol, err := target.Commit(t.Context())
	succeed(t, "Commit makes the volume visible", err)
	if vol.Form != adapters.TreeForm {
		broken(t, "Commit answers with the volume", "%+v", vol)
	}
	refuse(t, "Commit closes the target", target.Mkdir(t.Context(), "late"), fault.Invalid)
	snap := s.snap(t, a, id, "replanted")
	if _, err := source.model.Compare(t.Context(), s.openTree(t, a, snap.ID, nil), nil); err != nil {
		broken(t, "a restored tree is what was made", "%v", err)
	}
	_, err = restorer.BeginTree(t.Context(), spec)
	refuse(t, "a volume that exists is not restored over", err, fault.Busy)
	spec.ID = s.AbsentTree(t)
	target = begin()
	succeed(t, "what is not there can be made", target.Mkdir(t.Context(), "d"))
	succeed(t, "Abort removes a target", target.Abort(t.Context()))
	_, err = a.Volume(t.Context(), spec.ID)
	refuse(t, "an aborted restore leaves nothing", err, fault.NotFound)
	_, err = restorer.BeginTree(t.Context(), adapters.TreeSpec{ID: spec.ID})
	refuse(t, "a restore has a token", err, fault.Invalid)
}

// regrow makes a tree in several goes: bytes of files are taken over from one to the next, and nothing else is.
func (s *suite) regrow(t *testing.T) {
	a := s.open(t)
	restorer, _ := adapters.As[adapters.TreeRestorer](a)
	spec := adapters.TreeSpec{ID: s.AbsentTree(t), Token: "regrow"}
	begin := func() adapters.TreeTarget {
		target, err := restorer.BeginTree(t.Context(), spec)
		succeed(t, "BeginTree makes a target", err)
		t.Cleanup(func() { target.Abort(context.Background()) })
		succeed(t, "what was left is in the way of nothing", target.Mkdir(t.Context(), "d"))
		return target
	}
	const size = 3*4096 + 5
	old, other := bytes.Repeat([]byte("old"), size)[:size], bytes.Repeat([]byte("other"), size)[:size]
	fill := func(f adapters.FileTarget, p []byte) {
		succeed(t, "what is not there can be made", errors.Join(f.WriteAt(t.Context(), p, 0), f.Close()))
	}
	create := func(target adapters.TreeTarget, path string, size int64, holds []byte) adapters.FileTarget {
		t.Helper()
		f, err := target.Create(t.Context(), path, size)
		succeed(t, "what was left is in the way of nothing", err)
		const promise = "Create takes over the bytes of a file that was left at the same path with the same size, and no others"
		if f.Fresh() != (holds == nil) {
			broken(t, promise, "%s: Fresh is %v", path, f.Fresh())
		}
		if holds == nil {
			holds = make([]byte, size)
		}
		got := make([]byte, size)
		succeed(t, "ReadAt reads what a file holds", f.ReadAt(t.Context(), got, 0))
		if !bytes.Equal(got, holds) {
			broken(t, promise, "%s: it holds other bytes", path)
		}
		return f
	}

	target := begin()
	fill(create(target, "d/f", size, nil), old)
	fill(create(target, "d/g", size, nil), old)
	fill(create(target, "file", size, nil), old)
	succeed(t, "what is not there can be made", target.Link(t.Context(), "d/f", "d/h"))
	succeed(t, "what is not there can be made", target.Symlink(t.Context(), "link", "d"))
	succeed(t, "a target closes", target.Close())

	target = begin()
	f := create(target, "d/f", size, old)
	for what, err := range map[string]error{
		"ReadAt": f.ReadAt(t.Context(), make([]byte, 6), size-5), "WriteAt": f.WriteAt(t.Context(), make([]byte, 6), size-5),
		"Zero": f.Zero(t.Context(), size-5, 6), "Zero from before the start": f.Zero(t.Context(), -1, 2),
	} {
		refuse(t, "nothing reaches beyond a file's end: "+what, err, fault.Invalid)
	}
	succeed(t, "Zero makes a range read as zeros", errors.Join(f.Zero(t.Context(), 4096, 4096), f.Zero(t.Context(), size-7, 7)))
	clear(old[4096:8192])
	clear(old[size-7:])
	got := make([]byte, size)
	succeed(t, "ReadAt reads what a file holds", errors.Join(f.ReadAt(t.Context(), got, 0), f.Close()))
	if !bytes.Equal(got, old) {
		broken(t, "Zero makes a range read as zeros", "and no other one")
	}
	h, err := target.Create(t.Context(), "d/h", size) // it was the same file as d/f
	succeed(t, "what was left is in the way of nothing", err)
	fill(h, other)
	create(target, "d/g", size+1, nil).Close()
	succeed(t, "what was left is in the way of nothing", target.Mkdir(t.Context(), "file"))
	succeed(t, "what was left is in the way of nothing", target.Symlink(t.Context(), "link", "elsewhere"))
	succeed(t, "a target closes", target.Close())
	succeed(t, "a target closes", begin().Close())

	target = begin()
	create(target, "d/f", size, old).Close()
	create(target, "d/h", size, other).Close()
	create(target, "link", size, nil).Close()
	_, err = target.Commit(t.Context())
	succeed(t, "Commit makes the volume visible", err)
	snap := s.snap(t, a, spec.ID, "regrown")
	tree := s.openTree(t, a, snap.ID, nil)
	for path, want := range map[string][]string{"": {"d", "link"}, "d": {"f", "h"}} {
		var names []string
		for e, err := range tree.Entries(t.Context(), path) {
			succeed(t, "a tree is listed", err)
			if names = append(names, e.Name); e.Link != 0 {
				broken(t, "nothing but bytes is taken over", "%s has several names", e.Name)
			}
		}
		if !slices.Equal(names, want) {
			broken(t, "what was left goes with Commit", "%q holds %q", path, names)
		}
	}

	spec.ID = s.AbsentTree(t)
	target = begin()
	fill(create(target, "d/f", size, nil), old)
	succeed(t, "Abort removes a target", target.Abort(t.Context()))
	create(begin(), "d/f", size, nil).Close()
}

// plantIn makes the model's tree in a target.
func (m *TreeModel) plantIn(ctx context.Context, target adapters.TreeTarget) error {
	made := map[*plant]string{}
	paths := m.Paths()
	for _, path := range paths {
		x := m.at[path]
		var err error
		old, again := made[x]
		switch {
		case path == "":
			continue
		case again:
			err = target.Link(ctx, old, path)
		case x.entry.Type == adapters.Directory:
			err = target.Mkdir(ctx, path)
		case x.entry.Type == adapters.Symlink:
			err = target.Symlink(ctx, path, x.entry.Target)
		case x.entry.Type == adapters.RegularFile:
			var f adapters.FileTarget
			if f, err = target.Create(ctx, path, x.entry.Size); err == nil {
				half := int64(len(x.data) / 2)
				err = errors.Join(f.WriteAt(ctx, x.data[half:], half), f.WriteAt(ctx, x.data[:half], 0))
				if e := f.WriteAt(ctx, []byte{1}, x.entry.Size); fault.KindOf(e) != fault.Invalid {
					err = errors.Join(err, fmt.Errorf("a write beyond the file's end: %v", e))
				}
				err = errors.Join(err, f.Close())
			}
		default:
			err = target.Special(ctx, path, x.entry.Type, x.entry.Device)
		}
		if err != nil {
			return err
		}
		made[x] = path
	}
	for i := range paths {
		path := paths[len(paths)-1-i]
		if err := target.Describe(ctx, path, m.at[path].entry); err != nil {
			return err
		}
	}
	return nil
}
