package backup

import (
	"math/rand/v2"
	"strings"
	"testing"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/adapters/adaptertest"
	"stillpoint.io/stillpoint/agent/repository"
	"stillpoint.io/stillpoint/fault"
)

// A backup of a tree is what its snapshot is, to the byte; what another snapshot has otherwise is named by its path, and
// what the repository has lost is no difference and hides none elsewhere.
func TestTreeVerifyAgainst(t *testing.T) {
	t.Parallel()
	w := newSickTree(t, 3)
	against := func(snapshot adapters.SnapshotID) (AgainstReport, error) {
		return VerifyAgainst(t.Context(), AgainstRequest{Repository: w.repo, ID: backupID(t, w.handles[1]), Adapter: w.adapter, Snapshot: snapshot})
	}
	own, err := against(w.snapshots[1])
	if err != nil || !own.Same || own.BytesCompared == 0 || own.BytesCompared != own.BytesVerified || own.BytesDiffer != 0 || len(own.Differences) != 0 {
		t.Errorf("its own: %+v, %v", own, err)
	}

	rng := rand.New(rand.NewPCG(5, 6))
	write := func(path string, p string, off int64) func(*adaptertest.TreeModel) error {
		return func(m *adaptertest.TreeModel) error { return m.Write(path, []byte(p), off, rng) }
	}
	w.grove.apply(func(m *adaptertest.TreeModel) error { return m.Remove("dir/link") },
		func(m *adaptertest.TreeModel) error { return m.Remove("dir/sub/deep") },
		func(m *adaptertest.TreeModel) error { return m.Mkdir("fresh", rng) },
		write("new", "new", 0), write("large", "other", 100<<10), write("large", "other", 70<<20), write("changing", "longer", 250))
	third, _ := w.grove.cutTree()
	r, err := against(third)
	said := strings.Join(r.Differences, "\n")
	// The last chunk of the large file is the hundred bytes at its end.
	if fault.KindOf(err) != fault.Corrupt || r.Same || r.Faults != 0 || r.BytesDiffer != 64<<10+100+5000+3 {
		t.Errorf("another: %+v, %v", r, err)
	}
	for _, words := range []string{
		`"dir/link": a symlink of the backup that is not in the snapshot`, `"dir/sub/deep": a file of the backup`, `"fresh": a directory of the snapshot`,
		`"new": a file of the snapshot`, `"large": 65536 bytes at 65536: the backup has content`, `"large": 100 bytes at 73400320: the backup has content`,
		`"changing": the backup has a file of 210 bytes`,
	} {
		if !strings.Contains(said, words) {
			t.Errorf("%s is not in:\n%s", words, said)
		}
	}
	if strings.Contains(said, `"dir/small"`) {
		t.Errorf("what is the same is in:\n%s", said)
	}

	index, _ := w.segment()
	w.spoil(index)
	w.reopen()
	r, err = against(w.snapshots[1])
	if fault.KindOf(err) != fault.Corrupt || r.Faults != 1 || len(r.Differences) != 0 || r.BytesCompared != own.BytesCompared-repository.SegmentSize {
		t.Errorf("damaged: %+v, %v", r, err)
	}
	r, err = against(third)
	if said := strings.Join(r.Differences, "\n"); fault.KindOf(err) != fault.Corrupt || !strings.Contains(said, `"large": 100 bytes at 73400320`) || strings.Contains(said, "65536 bytes") {
		t.Errorf("damaged, another: %+v, %v", r, err)
	}
}

// A tree is not compared with a disk image.
func TestTreeVerifyAgainstImage(t *testing.T) {
	t.Parallel()
	w, g := newWorld(t, 64<<10, 1<<20), newGrove(t)
	image, _ := w.cut()
	s, _ := g.cutTree()
	id := backupID(t, g.backup(s).Backup)
	if _, err := VerifyAgainst(t.Context(), AgainstRequest{Repository: g.repo, ID: id, Adapter: w.adapter, Snapshot: image}); fault.KindOf(err) != fault.Invalid {
		t.Errorf("%v", err)
	}
}
