package backup

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/adapters/adaptertest"
	"stillpoint.io/stillpoint/fault"
)

// sickTree is a world with two backups of one tree, which share most of what they have, and the snapshots of both. In one
// of its directories are as many names as a test asks for.
type sickTree struct {
	*sick
	grove     *grove
	snapshots []adapters.SnapshotID
	wants     []*adaptertest.TreeModel
}

func newSickTree(t *testing.T, names int) *sickTree {
	t.Helper()
	g, rng := newGrove(t), rand.New(rand.NewPCG(3, 4))
	w := &sickTree{sick: &sick{world: g.world, t: t}, grove: g}
	write := func(path string, size int, off int64) func(*adaptertest.TreeModel) error {
		return func(m *adaptertest.TreeModel) error { return m.Write(path, random(rng, int64(size)), off, rng) }
	}
	mkdir := func(path string) func(*adaptertest.TreeModel) error {
		return func(m *adaptertest.TreeModel) error { return m.Mkdir(path, rng) }
	}
	changes := []func(*adaptertest.TreeModel) error{mkdir("dir"), mkdir("dir/sub"), mkdir("wide"),
		write("dir/small", 30<<10, 0), write("dir/empty", 0, 0), write("dir/sub/deep", 5000, 0), write("large", 300<<10, 0), write("large", 100, 70<<20),
		func(m *adaptertest.TreeModel) error { return m.Symlink("dir/link", "../large", rng) }}
	for i := range names {
		changes = append(changes, write(fmt.Sprintf("wide/%0200d", i), 8, 0))
	}
	g.apply(changes...)
	for i := range 2 {
		g.apply(write("changing", 200, int64(i)*10))
		id, want := g.cutTree()
		w.handles = append(w.handles, g.backup(id).Backup)
		w.snapshots, w.wants = append(w.snapshots, id), append(w.wants, want)
	}
	return w
}

// contents are the ids of the contents that hold what the first backup has at a path.
func (w *sickTree) contents(path string) []string {
	w.t.Helper()
	return treeContents(w.t, w.repo, w.handles[0], func(p string) bool { return p == path })
}

// segment is the id of the first index of the large file, and that of a chunk which it lists.
func (w *sickTree) segment() (index, chunk string) {
	w.t.Helper()
	_, tree := mustTree(w.t, w.repo, w.handles[0])
	e, err := tree.Find(w.t.Context(), "large")
	if err != nil {
		w.t.Fatal(err)
	}
	image, err := w.repo.OpenImage(w.t.Context(), e.AsImage())
	if err != nil {
		w.t.Fatal(err)
	}
	defer image.Close()
	s, _ := image.Segment(0)
	chunks, err := image.Chunks(w.t.Context(), 0)
	if err != nil {
		w.t.Fatal(err)
	}
	return s.Index().String(), chunks[1].String()
}

// Whatever is lost of a tree is stored again under the names that it had, from what a snapshot has at the same path: both
// backups are whole, and a dry run says so before and changes nothing.
func TestRepairTree(t *testing.T) {
	indexes := func(w *sickTree) (ids []string) {
		for _, id := range w.contents("large") {
			if strings.HasPrefix(id, "x") {
				ids = append(ids, id)
			}
		}
		return ids
	}
	for name, c := range map[string]struct {
		spoil   func(w *sickTree) []string
		planned int64 // contents that a dry run sees
		stored  int64
	}{
		"a small file":    {func(w *sickTree) []string { return w.contents("dir/small") }, 1, 1},
		"a chunk":         {func(w *sickTree) []string { _, id := w.segment(); return []string{id} }, 1, 1},
		"a segment":       {func(w *sickTree) []string { id, _ := w.segment(); return []string{id} }, 1, 1},
		"all of a file":   {func(w *sickTree) []string { return w.contents("large") }, 1, 10},
		"all its indexes": {indexes, 1, 3},
		"a link":          {func(w *sickTree) []string { return w.contents("dir/link") }, 1, 1},
		"an empty file":   {func(w *sickTree) []string { return w.contents("dir/empty") }, 1, 1},
		"the folders":     {func(w *sickTree) []string { return w.all("directory") }, 2, 2},
		"everything in it": {func(w *sickTree) []string {
			return slices.Concat(w.all("directory"), w.contents(""), w.contents("dir"), w.contents("dir/small"), w.contents("large"))
		}, 2, 15},
		"a directory":      {func(w *sickTree) []string { return w.contents("dir/sub") }, 1, 1},
		"a wide directory": {func(w *sickTree) []string { return w.contents("wide") }, 3, 3},
		"directories, and all below": {func(w *sickTree) []string {
			return slices.Concat(w.contents("dir"), w.contents("dir/small"), w.contents("dir/sub"), w.contents("dir/sub/deep"))
		}, 2, 4},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			names := 3
			if name == "a wide directory" { // of more than one content
				names = 3000
			}
			w := newSickTree(t, names)
			ids := c.spoil(w)
			w.spoil(ids...)
			w.reopen()
			before := w.files()
			planned, err := w.repair(true)
			if err != nil || len(planned.Hurt) != 2 || planned.Stored != c.planned || !planned.Hurt[1].Healed {
				t.Errorf("planned: %s, %v", short(planned), err)
			}
			if after := w.files(); len(after) != len(before) {
				t.Error("a dry run changed something")
			}
			done, err := w.repair(false)
			if err != nil || len(done.Hurt) != 2 || done.Stored != c.stored || len(done.Dropped) > 0 || len(done.Hurt[0].Bad) == 0 {
				t.Errorf("repaired, of %d contents: %s, %v", len(ids), short(done), err)
			}
			w.whole()
		})
	}
}

// whole fails the test unless every backup is what it was, for everybody who reads it, and the next may be built upon it.
func (w *sickTree) whole() {
	w.t.Helper()
	w.reopen()
	if s, err := VerifyAll(w.t.Context(), VerifyRequest{Repository: w.repo, All: true}); err != nil || s.Backups != len(w.handles) {
		w.t.Errorf("after: %+v, %v", s, err)
	}
	for i, handle := range w.handles {
		mustHold(w.t, w.repo, handle, w.wants[i])
		w.grove.mustBecome(FromBackup(w.repo, backupID(w.t, handle)), "", w.wants[i])
		b, err := w.repo.Backup(w.t.Context(), backupID(w.t, handle))
		if err != nil {
			w.t.Fatal(err)
		}
		if why, err := w.repo.Hurt(w.t.Context(), b); why != "" || err != nil {
			w.t.Errorf("it is not to be built upon: %s, %v", why, err)
		}
	}
}

// What no snapshot has at the path is named, and is not made up of what is there; the rest is healed.
func TestRepairTreeWhatIsLost(t *testing.T) {
	t.Parallel()
	w := newSickTree(t, 3)
	w.spoil(slices.Concat(w.contents("changing"), w.contents(""), w.contents("dir/small"))...)
	if err := w.adapter.DeleteSnapshot(t.Context(), w.snapshots[0]); err != nil {
		t.Fatal(err)
	}
	r, err := w.repair(false)
	if fault.KindOf(err) != fault.Corrupt || len(r.Hurt) != 2 || r.Stored != 1 {
		t.Fatalf("%s, %v", short(r), err)
	}
	for _, h := range r.Hurt {
		first := h.Backup == w.handles[0]
		if h.Healed == first || first && (len(h.Left) != 1 || len(h.Why) != 1 || !strings.Contains(h.Why[0], `has the directory "" as it was`)) {
			t.Errorf("%+v", h)
		}
	}
}

// Without any snapshot a tree stays hurt, is marked so, and the repair says why.
func TestRepairTreeWithoutSnapshot(t *testing.T) {
	t.Parallel()
	w := newSickTree(t, 3)
	w.spoil(w.contents("dir/small")...)
	for _, s := range w.snapshots {
		if err := w.adapter.DeleteSnapshot(t.Context(), s); err != nil {
			t.Fatal(err)
		}
	}
	report, err := w.repair(false)
	if fault.KindOf(err) != fault.Corrupt || len(report.Hurt) != 2 || report.Stored != 0 {
		t.Fatalf("%+v, %v", report, err)
	}
	w.reopen()
	for _, h := range report.Hurt {
		if h.Healed || len(h.Why) != 1 || !strings.Contains(h.Why[0], "no snapshot of "+w.grove.id.String()) {
			t.Errorf("%+v", h)
		}
		if b, err := w.repo.Backup(t.Context(), backupID(t, h.Backup)); err != nil || b.Suspect == "" {
			t.Errorf("not marked: %+v, %v", b, err)
		}
	}
}
