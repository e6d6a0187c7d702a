package backup

import (
	"context"
	"fmt"
	"iter"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/adapters/adaptertest"
	"stillpoint.io/stillpoint/adapters/mem"
	"stillpoint.io/stillpoint/adapters/treefs"
	"stillpoint.io/stillpoint/agent/repository"
	"stillpoint.io/stillpoint/fault"
	"stillpoint.io/stillpoint/integration/lab"
)

// grove is a world whose volume is a tree of files, in memory.
type grove struct {
	*world
	tree  *mem.Grove
	model *adaptertest.TreeModel
}

type liveGrove struct{ *mem.Grove }

func (g liveGrove) ID() adapters.VolumeID { return adapters.VolumeID{Backend: "mem", ID: g.Grove.ID()} }

func newGrove(t testing.TB) *grove {
	t.Helper()
	w := newWorld(t, 64<<10, 4096)
	tree, err := w.store.CreateTree("tree")
	if err != nil {
		t.Fatal(err)
	}
	w.id = liveGrove{tree}.ID()
	return &grove{w, tree, adaptertest.NewTreeModel(liveGrove{tree})}
}

func (g *grove) grow(r *rand.Rand, n int) {
	g.t.Helper()
	if err := g.model.Grow(r, n); err != nil {
		g.t.Fatal(err)
	}
}

func (g *grove) apply(changes ...func(*adaptertest.TreeModel) error) {
	g.t.Helper()
	if err := g.model.Apply(changes...); err != nil {
		g.t.Fatal(err)
	}
}

// cutTree makes a verified snapshot and returns what it must hold.
func (g *grove) cutTree() (adapters.SnapshotID, *adaptertest.TreeModel) {
	g.t.Helper()
	id, _ := g.cut()
	return id, g.model.Clone()
}

// mustTree opens the tree of a backup.
func mustTree(t testing.TB, r *repository.Repository, handle string) (repository.Backup, *repository.Tree) {
	t.Helper()
	b, err := r.Backup(t.Context(), backupID(t, handle))
	if err != nil {
		t.Fatal(err)
	}
	tree, err := r.OpenTree(t.Context(), b)
	if err != nil {
		t.Fatal(err)
	}
	return b, tree
}

// mustHold compares a backup with a model: read, restored into a volume, and verified.
func mustHold(t testing.TB, r *repository.Repository, handle string, want *adaptertest.TreeModel) {
	t.Helper()
	b, tree := mustTree(t, r, handle)
	if _, err := want.Compare(t.Context(), tree, nil); err != nil {
		t.Fatalf("%s: %v", handle, err)
	}
	if _, err := Verify(t.Context(), VerifyRequest{Repository: r, ID: b.ID}); err != nil {
		t.Fatal(err)
	}
	if int(b.Count.Entries) != want.Len() {
		t.Errorf("%s has %+v, of %d entries", handle, b.Count, want.Len())
	}
}

// mustBecome restores into a new volume and compares that.
func (g *grove) mustBecome(source Source, only string, want *adaptertest.TreeModel) {
	g.t.Helper()
	g.cuts++
	id := adapters.VolumeID{Backend: "mem", ID: fmt.Sprint("local/restored-", g.cuts)}
	if _, err := Restore(g.t.Context(), RestoreRequest{Source: source, Target: g.adapter, Volume: id, Only: only}); err != nil {
		g.t.Fatal(err)
	}
	s, err := g.adapter.CreateSnapshot(g.t.Context(), id, "look")
	if err == nil {
		err = g.adapter.Publish(g.t.Context(), s.ID, adapters.Notes{})
	}
	if err != nil {
		g.t.Fatal(err)
	}
	trees, _ := adapters.As[adapters.Trees](g.adapter)
	tree, err := trees.OpenTree(g.t.Context(), s.ID, nil)
	if err != nil {
		g.t.Fatal(err)
	}
	defer tree.Close()
	if _, err := want.Compare(g.t.Context(), tree, nil); err != nil {
		g.t.Fatalf("restored: %v", err)
	}
}

// Random histories: every backup of a tree, incremental or not, is the tree at its instant, and so is what is restored.
func TestTreeHistory(t *testing.T) {
	for seed := range uint64(4) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			g, r := newGrove(t), rand.New(rand.NewPCG(seed, 3))
			g.grow(r, 80)
			type step struct {
				report Report
				model  *adaptertest.TreeModel
			}
			var steps []step
			reused, walked := int64(0), 0
			for range 14 {
				g.grow(r, r.IntN(12))
				s, want := g.cutTree()
				q := g.request(s)
				q.Full = r.IntN(8) == 0
				report, err := Run(t.Context(), q)
				if err != nil || len(report.Warnings) > 0 {
					t.Fatalf("%+v, %v", report, err)
				}
				if report.Tree.Entries != int64(want.Len()) {
					t.Errorf("%+v of %d entries", report.Tree, want.Len())
				}
				reused += report.Tree.DirsReused + report.Tree.FilesReused
				if report.Tree.Walked {
					walked++
				}
				steps = append(steps, step{report, want})
				if r.IntN(3) == 0 && len(steps) > 1 {
					i := r.IntN(len(steps) - 1)
					if err := g.repo.Forget(t.Context(), backupID(t, steps[i].report.Backup)); err != nil {
						t.Fatal(err)
					}
					steps = slices.Delete(steps, i, i+1)
				}
			}
			if reused < 50 {
				t.Errorf("only %d entries were reused", reused)
			}
			for i, s := range steps {
				mustHold(t, g.repo, s.report.Backup, s.model)
				if i%3 == 0 {
					g.mustBecome(FromBackup(g.repo, backupID(t, s.report.Backup)), "", s.model)
				}
			}
		})
	}
}

// A change in one directory of a thousand walks the path to it and nothing else, and every tenth backup walks everything.
func TestTreeReuse(t *testing.T) {
	t.Parallel()
	g := newGrove(t)
	for i := range 1000 {
		for _, path := range []string{fmt.Sprintf("d%03d", i)} {
			g.apply1(g.tree.Mkdir(path), g.tree.Write(path+"/f", []byte(path), 0), g.tree.Write(path+"/g", []byte(path), 0))
		}
	}
	s, _ := g.cut()
	if r := g.backup(s); r.Kind != repository.Full || r.Tree.DirsWalked != 1001 || r.Tree.FilesRead != 2000 || r.Tree.Entries != 3001 {
		t.Errorf("%+v, %+v", r, r.Tree)
	}
	for i := range 2*walkEvery + 1 {
		g.apply1(g.tree.Write("d500/f", []byte{byte(i)}, 0))
		s, _ := g.cut()
		r := g.backup(s)
		if r.Kind != repository.Incremental || len(r.Warnings) > 0 {
			t.Fatalf("%+v", r)
		}
		if i%walkEvery == walkEvery-1 {
			if x := r.Tree; !x.Walked || x.DirsWalked != 1001 || x.DirsReused != 0 || x.FilesRead != 1 || x.FilesReused != 1999 || x.FilesAudited == 0 {
				t.Errorf("%d: %+v", i, x)
			}
		} else if x := r.Tree; x.Walked || x.DirsWalked != 2 || x.DirsReused != 999 || x.FilesRead != 1 || x.FilesReused != 1 || x.FilesAudited == 0 || r.BytesRead != 4 {
			t.Errorf("%d: %+v, %+v", i, x, r)
		}
	}
	same, _ := g.cut()
	if r := g.backup(same); r.Tree.DirsWalked != 0 || r.Tree.DirsReused != 1 || r.BytesRead != 0 || r.Tree.Entries != 3001 {
		t.Errorf("%+v, %+v", r, r.Tree)
	}
}

func (g *grove) apply1(errs ...error) {
	g.t.Helper()
	for _, err := range errs {
		if err != nil {
			g.t.Fatal(err)
		}
	}
}

// liarTrees tells lies about what is unchanged.
type liarTrees struct {
	adapters.Adapter
	lie func(path string, e *adapters.Entry)
}

func (a liarTrees) OpenTree(ctx context.Context, id adapters.SnapshotID, base *adapters.SnapshotID) (adapters.Tree, error) {
	trees, _ := adapters.As[adapters.Trees](a.Adapter)
	t, err := trees.OpenTree(ctx, id, base)
	if err != nil || base == nil {
		return t, err
	}
	return liarTree{t, a.lie}, nil
}

type liarTree struct {
	adapters.Tree
	lie func(path string, e *adapters.Entry)
}

func (t liarTree) Stat(ctx context.Context, path string) (adapters.Entry, error) {
	e, err := t.Tree.Stat(ctx, path)
	t.lie(path, &e)
	return e, err
}

func (t liarTree) Entries(ctx context.Context, dir string) iter.Seq2[adapters.Entry, error] {
	return func(yield func(adapters.Entry, error) bool) {
		for e, err := range t.Tree.Entries(ctx, dir) {
			t.lie(join(dir, e.Name), &e)
			if !yield(e, err) {
				return
			}
		}
	}
}

// A backend that does not see, in the directory of one name, what changes in a file of several: where the base has such files,
// the directory is looked at, and where it has none, it is reused. Also when everything is looked at this is no lie.
func TestTreeButLinks(t *testing.T) {
	t.Parallel()
	g := newGrove(t)
	g.apply(
		func(m *adaptertest.TreeModel) error { return m.Mkdir("first", nil) },
		func(m *adaptertest.TreeModel) error { return m.Mkdir("outer", nil) },
		func(m *adaptertest.TreeModel) error { return m.Mkdir("outer/second", nil) },
		func(m *adaptertest.TreeModel) error { return m.Mkdir("third", nil) },
		func(m *adaptertest.TreeModel) error { return m.Write("first/f", []byte("0"), 0, nil) },
		func(m *adaptertest.TreeModel) error { return m.Write("third/g", []byte("g"), 0, nil) },
		func(m *adaptertest.TreeModel) error { return m.Link("first/f", "outer/second/f") },
	)
	q := g.request(adapters.SnapshotID{})
	q.Adapter = liarTrees{g.adapter, func(path string, e *adapters.Entry) {
		if e.Type == adapters.Directory && path != "" && path != "first" {
			e.Unchanged, e.ButLinks = true, true
		}
	}}
	for i := range walkEvery + 1 {
		g.apply(func(m *adaptertest.TreeModel) error { return m.Write("first/f", fmt.Append(nil, i), 0, nil) })
		var want *adaptertest.TreeModel
		q.Snapshot, want = g.cutTree()
		r, err := Run(t.Context(), q)
		if err != nil || len(r.Warnings) > 0 {
			t.Fatalf("%+v, %v", r, err)
		}
		if x := r.Tree; i > 0 && (x.Walked != (i == walkEvery) || !x.Walked && (x.DirsWalked != 4 || x.DirsReused != 1)) {
			t.Errorf("%d: %+v", i, x)
		}
		mustHold(t, g.repo, r.Backup, want)
	}
}

// Whatever a backend calls unchanged and is not, is found out: at once where the description differs, by the audit where
// only bytes do, by the walk where it is deep down. The backup is then a full one, and right.
func TestTreeDistrust(t *testing.T) {
	for name, c := range map[string]struct {
		change func(g *grove)
		lie    string // the path that is called unchanged
		runs   int    // within which it must be found
	}{
		"a description":       {func(g *grove) { g.apply1(g.tree.Describe("d/f", adapters.Entry{Mode: 0o123})) }, "d/f", 1},
		"a size":              {func(g *grove) { g.apply1(g.tree.Write("d/f", []byte("longer than it was"), 0)) }, "d/f", 1},
		"what was a link":     {func(g *grove) { g.apply1(g.tree.Remove("d/f"), g.tree.Symlink("d/f", "x")) }, "d/f", 1},
		"a new name":          {func(g *grove) { g.apply1(g.tree.Write("d/new", []byte("new"), 0)) }, "d/new", 1},
		"the bytes of a file": {func(g *grove) { g.apply1(g.tree.Write("d/f", []byte("other"), 0)) }, "d/f", 1}, // the one file that is reused is audited
		"in a directory":      {func(g *grove) { g.apply1(g.tree.Write("d/f", []byte("longer than it was"), 0)) }, "d", walkEvery},
		"a name in it":        {func(g *grove) { g.apply1(g.tree.Mkdir("d/new")) }, "d", walkEvery},
		"a name gone":         {func(g *grove) { g.apply1(g.tree.Remove("d/z")) }, "d", walkEvery},
		"a name renamed":      {func(g *grove) { g.apply1(g.tree.Rename("d/z", "d/y")) }, "d", walkEvery},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			g := newGrove(t)
			g.apply1(g.tree.Mkdir("d"), g.tree.Write("d/f", []byte("bytes"), 0), g.tree.Mkdir("d/e"), g.tree.Write("d/z", []byte("z"), 0))
			s, _ := g.cut()
			g.backup(s)
			c.change(g)
			honest := g.adapter
			g.adapter = liarTrees{honest, func(path string, e *adapters.Entry) { e.Unchanged = e.Unchanged || path == c.lie }}
			found := false
			for i := range c.runs {
				s, _ := g.cut()
				r := g.backup(s)
				if r.Distrusted {
					if found = true; r.Kind != repository.Full || len(r.Warnings) != 1 || !strings.Contains(r.Warnings[0], "unchanged") {
						t.Errorf("%+v", r)
					}
					b, err := g.repo.Backup(t.Context(), backupID(t, r.Backup))
					if err != nil {
						t.Fatal(err)
					}
					tree, err := g.repo.OpenTree(t.Context(), b)
					if err != nil {
						t.Fatal(err)
					}
					for _, path := range []string{"d", "d/f", "d/e", "d/z", "d/new", "d/y"} {
						want, err := statMem(t, honest, s, path)
						got, err2 := tree.Stat(t.Context(), path)
						if fmt.Sprintf("%+v %v", got, fault.KindOf(err2)) != fmt.Sprintf("%+v %v", want, fault.KindOf(err)) {
							t.Errorf("%s: %+v, want %+v", path, got, want)
						}
					}
					break
				}
				if r.Kind != repository.Incremental {
					t.Fatalf("run %d: %+v", i, r)
				}
			}
			if !found {
				t.Error("it was not found")
			}
			g.adapter = honest
		})
	}
}

func statMem(t *testing.T, a adapters.Adapter, id adapters.SnapshotID, path string) (adapters.Entry, error) {
	trees, _ := adapters.As[adapters.Trees](a)
	tree, err := trees.OpenTree(t.Context(), id, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer tree.Close()
	return tree.Stat(t.Context(), path)
}

// Files of all sizes around chunks and segments, with holes, come back, and their holes are not written.
func TestTreeFiles(t *testing.T) {
	t.Parallel()
	g, rng := newGrove(t), rand.New(rand.NewPCG(1, 9))
	const chunk, segment = 64 << 10, repository.SegmentSize
	for _, size := range []int64{0, 1, chunk - 1, chunk, chunk + 1, 3*chunk + 5, segment - 1, segment, segment + 1, segment + chunk + 7} {
		path := fmt.Sprint("f", size)
		g.apply(func(m *adaptertest.TreeModel) error { return m.Write(path, random(rng, min(size, 2*chunk+9)), 0, nil) },
			func(m *adaptertest.TreeModel) error { return m.Truncate(path, size) })
		if size > 2*segment/3 {
			g.apply(func(m *adaptertest.TreeModel) error { return m.Write(path, []byte("end"), size-3, nil) })
		}
	}
	g.apply(func(m *adaptertest.TreeModel) error { return m.Write("hole", nil, 0, nil) },
		func(m *adaptertest.TreeModel) error { return m.Truncate("hole", 2*segment) },
		func(m *adaptertest.TreeModel) error { return m.Link("f1", "g1") })
	s, want := g.cutTree()
	r := g.backup(s)
	if r.BytesRead > 40*chunk {
		t.Errorf("holes were read: %+v", r)
	}
	mustHold(t, g.repo, r.Backup, want)
	out := filepath.Join(lab.Test(t).Dir, "out")
	report, err := Restore(t.Context(), RestoreRequest{Source: FromBackup(g.repo, backupID(t, r.Backup)), Directory: out})
	if err != nil || report.Entries != int64(want.Len()) || report.BytesWritten > 30*chunk {
		t.Fatalf("%+v, %v", report, err)
	}
	mustBe(t, out, want)
}

// mustBe compares a directory of this machine with a model.
func mustBe(t testing.TB, path string, want *adaptertest.TreeModel) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	r := treefs.NewReader(f, treefs.Options{What: path})
	defer r.Close()
	if _, err := want.Compare(t.Context(), r, nil); err != nil {
		t.Fatalf("%s: %v", path, err)
	}
}

// One directory, or one file, is restored alone; so is a snapshot that is in no backup.
func TestTreeRestoreParts(t *testing.T) {
	t.Parallel()
	g, rng := newGrove(t), rand.New(rand.NewPCG(4, 4))
	g.apply(func(m *adaptertest.TreeModel) error { return m.Mkdir("etc", rng) }, func(m *adaptertest.TreeModel) error { return m.Write("etc/passwd", []byte("root"), 0, rng) },
		func(m *adaptertest.TreeModel) error { return m.Link("etc/passwd", "etc/shadow") }, func(m *adaptertest.TreeModel) error { return m.Symlink("etc/up", "../../../../etc", rng) })
	s, want := g.cutTree()
	b := FromBackup(g.repo, backupID(t, g.backup(s).Backup))
	g.mustBecome(b, "etc", want.Only("etc"))
	g.mustBecome(FromSnapshot(g.adapter, s), "", want)
	dir := lab.Test(t).Dir
	out := filepath.Join(dir, "out")
	if _, err := Restore(t.Context(), RestoreRequest{Source: b, Directory: out, Only: "etc/passwd"}); err != nil {
		t.Fatal(err)
	}
	if text, err := os.ReadFile(filepath.Join(out, "passwd")); err != nil || string(text) != "root" {
		t.Errorf("%q, %v", text, err)
	}
	for name, q := range map[string]struct {
		q    RestoreRequest
		kind fault.Kind
	}{
		"over what exists":     {RestoreRequest{Source: b, Directory: out}, fault.Busy},
		"what is not there":    {RestoreRequest{Source: b, Directory: filepath.Join(dir, "no"), Only: "etc/none"}, fault.NotFound},
		"through a link":       {RestoreRequest{Source: b, Directory: filepath.Join(dir, "no"), Only: "etc/up/passwd"}, fault.NotFound},
		"nowhere":              {RestoreRequest{Source: b, Directory: filepath.Join(dir, "no", "no")}, fault.NotFound},
		"over a volume":        {RestoreRequest{Source: b, Target: g.adapter, Volume: g.id}, fault.Busy},
		"overwriting a volume": {RestoreRequest{Source: b, Target: g.adapter, Volume: g.id, Overwrite: true}, fault.Invalid},
	} {
		if _, err := Restore(t.Context(), q.q); fault.KindOf(err) != q.kind {
			t.Errorf("%s: %v (%v)", name, err, fault.KindOf(err))
		}
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 {
		t.Errorf("left: %v, %v", entries, err)
	}
}

// A tree that is damaged in the repository is found by a verification, which names the file, and is never made into a
// volume.
func TestTreeDamage(t *testing.T) {
	t.Parallel()
	g, rng := newGrove(t), rand.New(rand.NewPCG(8, 8))
	g.apply1(g.tree.Mkdir("dir"), g.tree.Write("dir/file", random(rng, 300<<10), 0))
	s, _ := g.cut()
	id := backupID(t, g.backup(s).Backup)
	for _, path := range blobs(t, g.at, "p") {
		p, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		p[len(p)/2] ^= 1
		if err := os.WriteFile(path, p, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	got, err := Verify(t.Context(), VerifyRequest{Repository: g.repo, ID: id})
	if fault.KindOf(err) != fault.Corrupt || got.BytesBad != 300<<10 || len(got.Bad) != 1 || !strings.Contains(got.Bad[0], `"dir/file"`) {
		t.Errorf("%+v, %v", got, err)
	}
	if _, err = Restore(t.Context(), RestoreRequest{Source: FromBackup(g.repo, id), Target: g.adapter, Volume: target("v")}); fault.KindOf(err) != fault.Corrupt {
		t.Errorf("restored: %v", err)
	}
	if _, err := g.adapter.Volume(t.Context(), target("v")); fault.KindOf(err) != fault.NotFound {
		t.Errorf("a damaged backup was made into a volume: %v", err)
	}
}

// A plan for a tree takes the newest backup whose snapshot is there, whatever its size.
func TestTreePlan(t *testing.T) {
	at := time.Unix(1000, 0)
	id := adapters.SnapshotID{Volume: adapters.VolumeID{Backend: "b", ID: "v"}, Name: "base"}
	base := adapters.Snapshot{ID: id, Form: adapters.TreeForm, Created: at, State: adapters.Ready, Mark: adapters.Verified}
	next := base
	next.ID.Name, next.Created = "next", at.Add(1)
	b := repository.Backup{ID: "base", Volume: id.Volume, Snapshot: id, Form: adapters.TreeForm, Created: at, Size: 12345}
	f := Facts{Snapshot: next, Differs: true, Backups: []repository.Backup{b}, Snapshots: []adapters.Snapshot{base}}
	p, err := MakePlan(f)
	if err != nil || p.Base == nil || p.Walk {
		t.Errorf("%+v, %v", p, err)
	}
	f.Backups[0].Believed = walkEvery - 1
	if p, err = MakePlan(f); err != nil || p.Base == nil || !p.Walk {
		t.Errorf("%+v, %v", p, err)
	}
	f.Backups[0].Form = adapters.BlockForm
	if p, err = MakePlan(f); err != nil || p.Base != nil {
		t.Errorf("%+v, %v", p, err)
	}
}
