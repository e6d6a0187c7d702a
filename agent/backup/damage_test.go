package backup

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/adapters/adaptertest"
	"stillpoint.io/stillpoint/adapters/mem"
	"stillpoint.io/stillpoint/agent/repository"
	"stillpoint.io/stillpoint/fault"
)

// What is known to be damaged is stored anew by the next backup, whoever found it and whatever part it is: the new backup
// is whole, although its volume holds the same bytes, and the older ones are whole again as far as they share them.
func TestDamageIsStoredAnew(t *testing.T) {
	verify := func(w *sick) error {
		_, err := VerifyAll(w.t.Context(), VerifyRequest{Repository: w.repo, All: true})
		return err
	}
	one := func(w *sick) error {
		_, err := Verify(w.t.Context(), VerifyRequest{Repository: w.repo, ID: backupID(w.t, w.handles[2])})
		return err
	}
	for name, c := range map[string]struct {
		spoil func(w *sick)
		find  func(w *sick) error
	}{
		"a chunk, found by a verification of all": {func(w *sick) { w.spoil(w.parts(w.handles[2])["chunk"][0]) }, verify},
		"a chunk, found by one of a backup":       {func(w *sick) { w.spoil(w.parts(w.handles[2])["chunk"][1]) }, one},
		"a chunk, found by a restore": {func(w *sick) { w.spoil(w.parts(w.handles[2])["chunk"][2]) }, func(w *sick) error {
			_, err := Restore(w.t.Context(), RestoreRequest{Source: FromBackup(w.repo, backupID(w.t, w.handles[2])), Target: w.adapter, Volume: target("spoilt")})
			return err
		}},
		"zeros":             {func(w *sick) { w.spoil(w.repo.ZeroChunk(64 << 10).String()) }, verify},
		"a segment's index": {func(w *sick) { w.spoil(w.parts(w.handles[2])["segment"][0]) }, one},
		"a top level":       {func(w *sick) { w.spoil(w.parts(w.handles[2])["top"]...) }, one},
		"all of the last": {func(w *sick) {
			p := w.parts(w.handles[2])
			w.spoil(append(append(p["top"], p["segment"]...), p["chunk"]...)...)
		}, verify},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newSick(t)
			c.spoil(w)
			w.reopen()
			if err := c.find(w); fault.KindOf(err) != fault.Corrupt {
				t.Fatalf("not found: %v", err)
			}
			w.reopen()
			s, want := w.cut() // of the same bytes
			r := w.backup(s)
			if name != "zeros" && (r.Kind != repository.Full || !strings.Contains(r.Reason, "is damaged: ")) {
				t.Errorf("%s, %s", r.Kind, r.Reason)
			}
			w.reopen()
			if _, err := Verify(t.Context(), VerifyRequest{Repository: w.repo, ID: backupID(t, r.Backup)}); err != nil {
				t.Error(err)
			}
			got, err := w.restored(r.Backup, "restored")
			if err != nil {
				t.Fatal(err)
			}
			mustEqual(t, "the new backup", got, want)
			// The last of the old ones has the same bytes.
			if _, err := Verify(t.Context(), VerifyRequest{Repository: w.repo, ID: backupID(t, w.handles[2])}); err != nil {
				t.Errorf("the old one: %v", err)
			}
			s, want = w.cut()
			if r = w.backup(s); r.Kind != repository.Incremental {
				t.Errorf("the next: %s, %s", r.Kind, r.Reason)
			}
			mustEqual(t, "the next", w.content(r.Backup), want)
		})
	}
}

// Damage that a backup has no part in does not keep it from being incremental.
func TestDamageElsewhere(t *testing.T) {
	t.Parallel()
	w := newSick(t)
	w.spoil(w.only("chunk")...)
	w.write(random(rand.New(rand.NewPCG(7, 8)), 3<<20), 1<<20) // all of what is only in the last
	s, _ := w.cut()
	w.backup(s)
	w.reopen()
	if _, err := VerifyAll(t.Context(), VerifyRequest{Repository: w.repo, All: true}); fault.KindOf(err) != fault.Corrupt {
		t.Fatalf("not found: %v", err)
	}
	s, want := w.cut()
	r := w.backup(s)
	if r.Kind != repository.Incremental {
		t.Errorf("%s, %s", r.Kind, r.Reason)
	}
	if _, err := Verify(t.Context(), VerifyRequest{Repository: w.repo, ID: backupID(t, r.Backup)}); err != nil {
		t.Error(err)
	}
	mustEqual(t, "the backup", w.content(r.Backup), want)
}

// meanwhile has something happen when a snapshot is opened: a backup is planned then.
type meanwhile struct {
	*mem.Adapter
	do func()
}

func (m meanwhile) Open(ctx context.Context, id adapters.SnapshotID) (adapters.Image, error) {
	m.do()
	return m.Adapter.Open(ctx, id)
}

// An increment whose base turns out to be damaged while it is made is not committed, and the next attempt is right.
func TestDamageFoundMeanwhile(t *testing.T) {
	t.Parallel()
	w := newSick(t)
	w.spoil(w.parts(w.handles[2])["chunk"][0])
	s, want := w.cut()
	q := w.request(s)
	q.Adapter = meanwhile{w.mem(), func() {
		if _, err := VerifyAll(t.Context(), VerifyRequest{Repository: openRepository(t, w.at), All: true}); fault.KindOf(err) != fault.Corrupt {
			t.Errorf("not found: %v", err)
		}
	}}
	if r, err := Run(t.Context(), q); fault.KindOf(err) != fault.Corrupt || !strings.Contains(err.Error(), "back up again") {
		t.Fatalf("%+v, %v", r, err)
	}
	w.reopen()
	if all, err := w.repo.Backups(t.Context(), repositoryFilter); err != nil || len(all) != 3 {
		t.Errorf("%d backups, %v", len(all), err)
	}
	r := w.backup(s)
	if _, err := Verify(t.Context(), VerifyRequest{Repository: w.repo, ID: backupID(t, r.Backup)}); err != nil {
		t.Error(err)
	}
	mustEqual(t, "the backup", w.content(r.Backup), want)
}

// The same of a tree of files, of which one directory is so large that it takes several contents.
func TestDamageOfTreeIsStoredAnew(t *testing.T) {
	large := map[string]bool{"a large directory": true, "everything": true}
	for name, spoilt := range map[string]func(path string) bool{
		"a file":            func(path string) bool { return path == "d/small" },
		"a large file":      func(path string) bool { return path == "d/large" },
		"a directory":       func(path string) bool { return path == "d" },
		"a large directory": func(path string) bool { return path == "wide" },
		"everything":        func(string) bool { return true },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			g := newGrove(t)
			rng := rand.New(rand.NewPCG(9, 10))
			wide := 3
			if large[name] {
				wide = 2500
			}
			g.apply(
				func(m *adaptertest.TreeModel) error { return m.Mkdir("d", rng) },
				func(m *adaptertest.TreeModel) error { return m.Mkdir("wide", rng) },
				func(m *adaptertest.TreeModel) error { return m.Write("d/small", []byte("a few bytes"), 0, rng) },
				func(m *adaptertest.TreeModel) error { return m.Write("d/large", random(rng, 300<<10), 0, rng) },
				func(m *adaptertest.TreeModel) error {
					for i := range wide {
						if err := m.Write(fmt.Sprintf("wide/%s%d", strings.Repeat("long", 50), i), nil, 0, rng); err != nil {
							return err
						}
					}
					return nil
				},
			)
			s, _ := g.cutTree()
			old := g.backup(s)
			w := &sick{world: g.world, t: t}
			contents := treeContents(t, g.repo, old.Backup, spoilt)
			if large[name] && len(contents) < 3 {
				t.Errorf("it has %d contents", len(contents))
			}
			w.spoil(contents...)
			w.reopen()
			if _, err := VerifyAll(t.Context(), VerifyRequest{Repository: w.repo, All: true}); fault.KindOf(err) != fault.Corrupt {
				t.Fatalf("not found: %v", err)
			}
			s, want := g.cutTree()
			r := g.backup(s)
			if r.Kind != repository.Full {
				t.Errorf("%s, %s", r.Kind, r.Reason)
			}
			w.reopen()
			mustHold(t, w.repo, r.Backup, want)
			mustHold(t, w.repo, old.Backup, want)
		})
	}
}

// treeContents are the contents of those entries of a tree, each once.
func treeContents(t *testing.T, r *repository.Repository, handle string, which func(path string) bool) []string {
	t.Helper()
	_, tree := mustTree(t, r, handle)
	seen := map[string]bool{}
	var walk func(path string, e repository.TreeEntry)
	walk = func(path string, e repository.TreeEntry) {
		if which(path) {
			all, err := tree.Contents(t.Context(), e)
			if err != nil {
				t.Fatal(err)
			}
			for _, c := range all {
				seen[c.String()] = true
			}
		}
		if e.Type != adapters.Directory {
			return
		}
		for child, err := range tree.Below(t.Context(), e) {
			if err != nil {
				t.Fatal(err)
			}
			walk(join(path, child.Name), child)
		}
	}
	walk("", tree.Root())
	return slices.Sorted(maps.Keys(seen))
}
