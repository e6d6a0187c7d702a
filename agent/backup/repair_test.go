package backup

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

// sick is a world with three backups of one volume, which share most of what they have, and the snapshots of them all.
type sick struct {
	*world
	t         *testing.T
	handles   []string
	snapshots []adapters.SnapshotID
	wants     []*model
}

func newSick(t *testing.T) *sick {
	t.Helper()
	w := &sick{world: newWorld(t, 64<<10, 70<<20+12345), t: t}
	rng := rand.New(rand.NewPCG(5, 6))
	w.write(random(rng, 3<<20), 1<<20)
	w.write(random(rng, 1<<20), 66<<20)
	for i := range int64(3) {
		w.write(random(rng, 100<<10), 2<<20+i*(300<<10))
		s, want := w.cut()
		w.handles, w.snapshots, w.wants = append(w.handles, w.backup(s).Backup), append(w.snapshots, s), append(w.wants, want)
	}
	return w
}

func (w *sick) adapterOf(context.Context, string) (adapters.Adapter, error) { return w.adapter, nil }

func (w *sick) repair(dry bool) (RepairReport, error) {
	w.t.Helper()
	w.reopen()
	return Repair(w.t.Context(), RepairRequest{Repository: w.repo, All: true, DryRun: dry, Adapter: w.adapterOf})
}

// reopen forgets what the process knows of the repository.
func (w *sick) reopen() {
	w.t.Helper()
	w.repo = openRepository(w.t, w.at)
}

// files reads the repository.
func (w *sick) files() map[string]string {
	w.t.Helper()
	all := map[string]string{}
	for _, prefix := range []string{"p", "q", "x", "s", "k"} {
		for _, path := range blobs(w.t, w.at, prefix) {
			p, err := os.ReadFile(path)
			if err != nil {
				w.t.Fatal(err)
			}
			all[path] = string(p)
		}
	}
	return all
}

// parts are the ids of the contents of a backup, by what they are, as a dump tells them.
func (w *sick) parts(handle string) map[string][]string {
	w.t.Helper()
	b, err := w.repo.Backup(w.t.Context(), backupID(w.t, handle))
	if err != nil {
		w.t.Fatal(err)
	}
	var out strings.Builder
	if err := w.repo.Dump(w.t.Context(), &out, b); err != nil {
		w.t.Fatal(err)
	}
	parts := map[string][]string{"top": {strings.TrimPrefix(b.Image.String(), "I")}}
	for _, line := range strings.Split(out.String(), "\n") {
		f := strings.Fields(line)
		switch {
		case len(f) == 4 && f[0] == "manifest":
			parts["directory"] = []string{f[3]}
		case strings.HasPrefix(line, "  ") && len(f) == 5:
			parts["chunk"] = append(parts["chunk"], f[2])
		case len(f) == 3 && strings.HasPrefix(f[2], "Ix"):
			parts["segment"] = append(parts["segment"], strings.TrimPrefix(f[2], "I"))
		}
	}
	return parts
}

// Whatever part of a backup is lost, every backup that shares it is named with the offsets, and is whole again after a
// repair, under the ids that it had; a dry run says the same and changes nothing.
func TestRepair(t *testing.T) {
	for name, c := range map[string]struct {
		spoil func(w *sick) // damages the repository
		parts []Part        // that are found hurt, of some backup
		hurt  int           // backups
	}{
		"a chunk": {func(w *sick) { w.spoil(w.parts(w.handles[0])["chunk"][0]) }, []Part{ChunkPart}, 3},
		"a chunk of one": {func(w *sick) {
			w.spoil(w.only("chunk")[0])
		}, []Part{ChunkPart}, 1},
		"all chunks":                    {func(w *sick) { w.spoil(w.all("chunk")...) }, []Part{ChunkPart}, 3},
		"a segment's index":             {func(w *sick) { w.spoil(w.parts(w.handles[0])["segment"][1]) }, []Part{SegmentPart}, 3},
		"an index and its chunks":       {func(w *sick) { w.spoil(append(w.all("segment"), w.all("chunk")...)...) }, []Part{SegmentPart}, 3},
		"a top level":                   {func(w *sick) { w.spoil(w.all("top")[0]) }, []Part{TopPart}, 1},
		"a directory":                   {func(w *sick) { w.spoil(w.all("directory")[0]) }, []Part{DescriptionPart}, 1},
		"a top level, and all below it": {func(w *sick) { w.spoil(append(append(w.all("top"), w.all("segment")...), w.all("chunk")...)...) }, []Part{TopPart}, 3},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newSick(t)
			c.spoil(w)
			w.reopen()
			damaged := map[string]bool{}
			_, err := VerifyAll(t.Context(), VerifyRequest{Repository: w.repo, All: true, Each: func(r VerifyReport) { damaged[r.Backup] = r.Faults > 0 }})
			if fault.KindOf(err) != fault.Corrupt || len(damaged) != 3 {
				t.Fatalf("verify: %v, %v", damaged, err)
			}
			before := w.files()
			planned, err := w.repair(true)
			if !maps.Equal(before, w.files()) {
				t.Error("a dry run changed something")
			}
			if err != nil || len(planned.Hurt) != c.hurt || planned.Stored == 0 || !planned.Hurt[0].Healed {
				t.Errorf("planned: %+v, %v", short(planned), err)
			}
			done, err := w.repair(false)
			if err != nil || len(done.Hurt) != c.hurt || done.Stored < planned.Stored {
				t.Errorf("repaired: %+v, %v", short(done), err)
			}
			for _, h := range done.Hurt {
				if !h.Healed || !damaged[h.Backup] || len(h.Bad) == 0 || !strings.Contains(strings.Join(h.Bad, "\n"), string(partWord[c.parts[0]])) {
					t.Errorf("%+v", h)
				}
			}
			w.whole()
		})
	}
}

// partWord is how a hurt part shows in words.
var partWord = map[Part]string{ChunkPart: "bytes at", SegmentPart: "by their segment", TopPart: "by their index", DescriptionPart: "its description"}

func short(r RepairReport) string {
	s := fmt.Sprintf("%d hurt, %d stored, %v dropped, %v loose", len(r.Hurt), r.Stored, r.Dropped, r.Loose)
	for _, h := range r.Hurt {
		s += fmt.Sprintf("; %s healed %v, %d bad, left %.3v, why %v", h.Backup, h.Healed, len(h.Bad), h.Left, h.Why)
	}
	return s
}

// all gives the contents of one sort of all backups, each once.
func (w *sick) all(part string) []string {
	seen := map[string]bool{}
	for _, h := range w.handles {
		for _, id := range w.parts(h)[part] {
			seen[id] = true
		}
	}
	return slices.Sorted(maps.Keys(seen))
}

// only gives those that the last backup has and no other.
func (w *sick) only(part string) []string {
	var only []string
	for _, id := range w.parts(w.handles[2])[part] {
		if !slices.Contains(w.parts(w.handles[0])[part], id) && !slices.Contains(w.parts(w.handles[1])[part], id) {
			only = append(only, id)
		}
	}
	return only
}

// spoil flips a byte of each content, where it lies.
func (w *sick) spoil(ids ...string) {
	w.t.Helper()
	for _, id := range ids {
		pack, off, length, err := w.repo.Where(w.t.Context(), id)
		if err != nil {
			w.t.Fatal(err)
		}
		f, err := os.OpenFile(w.path(pack), os.O_RDWR, 0)
		if err != nil {
			w.t.Fatal(err)
		}
		var b [1]byte
		at := off + length/2
		if _, err = f.ReadAt(b[:], at); err == nil {
			b[0] ^= 4
			_, err = f.WriteAt(b[:], at)
		}
		if err != nil {
			w.t.Fatal(err)
		}
		f.Close()
	}
}

// path is the file of a pack.
func (w *sick) path(pack string) string {
	return filepath.Join(w.at.Path, pack[:1], pack[1:4], pack[4:]+".f")
}

// whole makes sure that nothing is wrong any more: every backup reads as it was, and a whole verification finds nothing.
func (w *sick) whole() {
	w.t.Helper()
	w.reopen()
	if s, err := VerifyAll(w.t.Context(), VerifyRequest{Repository: w.repo, All: true}); err != nil || s.Backups != len(w.handles) {
		w.t.Errorf("after: %+v, %v", s, err)
	}
	for i, h := range w.handles {
		mustEqual(w.t, h, w.content(h), w.wants[i])
		b, err := w.repo.Backup(w.t.Context(), backupID(w.t, h))
		if err != nil || b.Verified.IsZero() || b.Suspect != "" {
			w.t.Errorf("%s: %+v, %v", h, b.Standing, err)
		}
	}
}

// What no snapshot has any more is said plainly, and the backups are marked; the rest is healed. When the bytes turn up
// again a later repair takes the mark back.
func TestRepairWhatIsLost(t *testing.T) {
	t.Parallel()
	w := newSick(t)
	lost, kept := w.only("chunk")[0], w.parts(w.handles[0])["chunk"]
	w.spoil(lost, kept[len(kept)-1])
	if err := w.adapter.DeleteSnapshot(t.Context(), w.snapshots[2]); err != nil {
		t.Fatal(err)
	}
	r, err := w.repair(false)
	if fault.KindOf(err) != fault.Corrupt || len(r.Hurt) != 3 || r.Stored != 1 {
		t.Fatalf("%s, %v", short(r), err)
	}
	for _, h := range r.Hurt {
		last := h.Backup == w.handles[2]
		if h.Healed == last || last && (len(h.Left) != 1 || len(h.Why) != 1 || !strings.Contains(h.Why[0], "no snapshot of")) {
			t.Errorf("%+v", h)
		}
	}
	b, err := w.repo.Backup(t.Context(), backupID(t, w.handles[2]))
	if err != nil || !strings.HasPrefix(b.Suspect, "damaged: ") {
		t.Errorf("%+v, %v", b.Standing, err)
	}
	// The volume still has what the snapshot had.
	w.cut()
	if r, err := w.repair(false); err != nil || len(r.Hurt) != 1 || !r.Hurt[0].Healed {
		t.Errorf("%s, %v", short(r), err)
	}
	w.whole()
}

// A snapshot with other bytes, whatever it is called, changes nothing.
func TestRepairFromWrongBytes(t *testing.T) {
	t.Parallel()
	w := newSick(t)
	w.spoil(w.only("chunk")[0], w.all("segment")[0], w.all("top")[1])
	impostor := newWorld(t, 64<<10, 70<<20+12345)
	impostor.write(random(rand.New(rand.NewPCG(8, 9)), 70<<20), 0)
	for range 3 {
		impostor.cut()
	}
	r, err := Repair(t.Context(), RepairRequest{Repository: w.repo, All: true,
		Adapter: func(context.Context, string) (adapters.Adapter, error) { return impostor.adapter, nil }})
	if fault.KindOf(err) != fault.Corrupt || r.Stored != 0 {
		t.Errorf("%s, %v", short(r), err)
	}
	if r, err := w.repair(false); err != nil || r.Stored == 0 {
		t.Errorf("and from the right ones: %s, %v", short(r), err)
	}
	w.whole()
}
