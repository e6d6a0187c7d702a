package backup

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/adapters/adaptertest"
	"stillpoint.io/stillpoint/adapters/reflink"
	"stillpoint.io/stillpoint/agent/repository"
	"stillpoint.io/stillpoint/integration/lab"
)

// subvolume is a real one, on a btrfs of the test.
type subvolume struct {
	lab.Tree
	pool    string
	adapter adapters.Adapter
	model   *adaptertest.TreeModel
	cuts    int
}

func (s *subvolume) ID() adapters.VolumeID { return adapters.VolumeID{Backend: "r", ID: s.Dir} }

func openReflink(ctx context.Context, pool string) (adapters.Adapter, error) {
	return reflink.Kind().Open(ctx, adapters.Config{Name: "r", Parameters: map[string]string{"pools": pool}})
}

// newSubvolume makes one by restoring nothing into it.
func newSubvolume(t testing.TB, size int64) *subvolume {
	t.Helper()
	fs, err := lab.Test(t).Pool(t.Context(), "pool", "btrfs", size)
	if err != nil {
		t.Fatal(err)
	}
	a, err := openReflink(t.Context(), fs.Mount)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close() })
	s := &subvolume{Tree: lab.Tree{Dir: filepath.Join(fs.Mount, "tree")}, pool: fs.Mount, adapter: a}
	trees, _ := adapters.As[adapters.TreeRestorer](a)
	target, err := trees.BeginTree(t.Context(), adapters.TreeSpec{ID: s.ID(), Token: "new"})
	if err == nil {
		_, err = target.Commit(t.Context())
	}
	if err != nil {
		t.Fatal(err)
	}
	s.model = adaptertest.NewTreeModel(s)
	return s
}

func (s *subvolume) cut(ctx context.Context) (adapters.SnapshotID, error) {
	s.cuts++
	snap, err := s.adapter.CreateSnapshot(ctx, s.ID(), fmt.Sprint("cut-", s.cuts))
	if err != nil {
		return snap.ID, err
	}
	return snap.ID, s.adapter.Publish(ctx, snap.ID, adapters.Notes{})
}

// Random histories of a subvolume of btrfs: what is in the backup, what we restore onto btrfs and onto another
// filesystem, and what kopia restores, is what was there.
func TestTreeBtrfs(t *testing.T) {
	t.Parallel()
	x, w := newSubvolume(t, 1<<30), newKopiaWorld(t, 64<<10, 4096)
	rng := rand.New(rand.NewPCG(21, 22))
	var handles []string
	var models []*adaptertest.TreeModel
	if err := x.model.Grow(rng, 250); err != nil {
		t.Fatal(err)
	}
	reused := int64(0)
	for range 2*walkEvery + 2 {
		if err := x.model.Grow(rng, rng.IntN(10)); err != nil {
			t.Fatal(err)
		}
		s, err := x.cut(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		r, err := Run(t.Context(), Request{Adapter: x.adapter, Snapshot: s, Repository: w.repo})
		if err != nil || len(r.Warnings) > 0 {
			t.Fatalf("%+v, %v", r, err)
		}
		reused += r.Tree.DirsReused + r.Tree.FilesReused
		handles, models = append(handles, r.Backup), append(models, x.model.Clone())
	}
	if reused < 300 {
		t.Errorf("only %d entries were reused", reused)
	}
	k := newKopia(t, w.at)
	k.run("snapshot", "verify", "--verify-files-percent=100")
	var listed []struct {
		ID   string            `json:"id"`
		Tags map[string]string `json:"tags"`
	}
	if err := json.Unmarshal([]byte(k.run("snapshot", "list", "--all", "--json")), &listed); err != nil {
		t.Fatal(err)
	}
	out := lab.Test(t).Dir
	for i, h := range handles {
		mustHold(t, w.repo, h, models[i])
		if i%8 != 5 {
			continue
		}
		id := backupID(t, h)
		restored := filepath.Join(x.pool, "restored-"+id)
		volume := adapters.VolumeID{Backend: "r", ID: restored}
		r, err := Restore(t.Context(), RestoreRequest{Source: FromBackup(w.repo, id), Target: x.adapter, Volume: volume})
		if err != nil || r.Path != restored {
			t.Fatalf("%+v, %v", r, err)
		}
		mustBe(t, restored, models[i])
		elsewhere := filepath.Join(out, id)
		if _, err := Restore(t.Context(), RestoreRequest{Source: FromBackup(w.repo, id), Directory: elsewhere}); err != nil {
			t.Fatal(err)
		}
		mustBe(t, elsewhere, models[i])
		for _, m := range listed {
			if m.Tags["tag:backup"] == id {
				byKopia := filepath.Join(out, "kopia-"+id)
				k.run("restore", m.ID, byKopia)
				mustBeKopias(t, filepath.Join(byKopia, "tree"), models[i])
			}
		}
	}
	// What kopia throws away when nobody needs it, we do not need.
	for _, h := range handles[:len(handles)-2] {
		if err := w.repo.Forget(t.Context(), backupID(t, h)); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		k.run("maintenance", "run", "--full", "--safety=none")
	}
	for i := len(handles) - 2; i < len(handles); i++ {
		mustHold(t, openRepository(t, w.at), handles[i], models[i])
	}
}

// mustBeKopias compares what kopia restored, as far as kopia keeps it, with a model.
func mustBeKopias(t *testing.T, dir string, want *adaptertest.TreeModel) {
	t.Helper()
	found := 0
	err := filepath.WalkDir(dir, func(string, os.DirEntry, error) error {
		found++
		return nil
	})
	if err != nil || found != want.Len() {
		t.Errorf("kopia restored %d entries of %d: %v", found, want.Len(), err)
	}
	for _, path := range want.Paths() {
		at := dir
		for element := range strings.SplitSeq(path, "/") {
			at = filepath.Join(at, kopiasName(t, at, element))
		}
		e, data := want.Get(path)
		var st unix.Stat_t
		if err := unix.Lstat(at, &st); err != nil {
			t.Fatalf("%q: %v", at, err)
		}
		mode := map[adapters.FileType]uint32{adapters.Directory: unix.S_IFDIR, adapters.Symlink: unix.S_IFLNK}[e.Type]
		if mode == 0 {
			mode = unix.S_IFREG
		}
		if st.Mode != mode|e.Mode || st.Uid != e.UID || st.Gid != e.GID {
			t.Errorf("%q: mode %o of %d:%d instead of %o of %d:%d", path, st.Mode, st.Uid, st.Gid, mode|e.Mode, e.UID, e.GID)
		}
		var close time.Duration // kopia sets times of links to the microsecond, more or less
		if e.Type == adapters.Symlink {
			close = 2 * time.Microsecond
		}
		if e.Type != adapters.Directory && time.Unix(st.Mtim.Unix()).Sub(e.Modified).Abs() > close {
			t.Errorf("%q: time %v instead of %v", path, time.Unix(st.Mtim.Unix()), e.Modified)
		}
		switch e.Type {
		case adapters.Directory:
		case adapters.Symlink:
			if target, err := os.Readlink(at); err != nil || target != e.Target {
				t.Errorf("%q leads to %q, not to %q: %v", path, target, e.Target, err)
			}
		default:
			if got, err := os.ReadFile(at); err != nil || !bytes.Equal(got, data) {
				t.Errorf("%q: %d bytes, not the %d that were written: %v", path, len(got), len(data), err)
			}
		}
	}
}

// kopiasName is the name of an entry where kopia restored it.
func kopiasName(t *testing.T, dir, name string) string {
	if utf8.ValidString(name) && !strings.HasSuffix(name, ".kopia-entry") {
		return name
	}
	hash := sha256.Sum256([]byte(name))
	suffix := "~" + hex.EncodeToString(hash[:8])
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), suffix) {
			return e.Name()
		}
	}
	t.Fatalf("in %q nothing stands for %q", dir, name)
	return ""
}

// wideCount is how many files are in the one directory of TestTreeWide.
const wideCount = 100_000

type wideReport struct {
	Full, Incremental Report
	Restore           RestoreReport
	Peak              int64 // resident memory, bytes
}

// wideChild backs a directory of many files up twice, and restores it.
func wideChild() error {
	ctx := context.Background()
	r, err := repository.Open(ctx, repository.Location{Path: os.Getenv("REPOSITORY")}, passphrase, repository.OpenOptions{Host: "test"})
	if err != nil {
		return err
	}
	x := &subvolume{Tree: lab.Tree{Dir: os.Getenv("TREE")}}
	if x.adapter, err = openReflink(ctx, filepath.Dir(x.Dir)); err != nil {
		return err
	}
	var out wideReport
	for _, report := range []*Report{&out.Full, &out.Incremental} {
		s, err := x.cut(ctx)
		if err != nil {
			return err
		}
		if *report, err = Run(ctx, Request{Adapter: x.adapter, Snapshot: s, Repository: r, ID: s.Name}); err != nil {
			return err
		}
		for i := range 10 {
			if err := x.Write(fmt.Sprintf("wide/%06d", i*1000), []byte("changed"), 0); err != nil {
				return err
			}
		}
	}
	out.Restore, err = Restore(ctx, RestoreRequest{Source: FromBackup(r, "cut-1"), Target: x.adapter, Volume: adapters.VolumeID{Backend: "r", ID: x.Dir + "-restored"}})
	if err == nil {
		out.Peak, err = peakMemory()
	}
	if err == nil {
		err = json.NewEncoder(os.Stdout).Encode(out)
	}
	return err
}

// A directory of 100,000 files: memory keeps its bound, and of an increment only what changed is read.
func TestTreeWide(t *testing.T) {
	t.Parallel()
	x := newSubvolume(t, 4<<30)
	if err := x.Mkdir("wide"); err != nil {
		t.Fatal(err)
	}
	for i := range wideCount {
		if err := os.WriteFile(filepath.Join(x.Dir, "wide", fmt.Sprintf("%06d", i)), fmt.Appendf(nil, "file %d", i), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	at := repository.Location{Path: t.TempDir()}
	if err := repository.Init(t.Context(), at, passphrase, repository.Options{}.Quick()); err != nil {
		t.Fatal(err)
	}
	var got wideReport
	childReport(t, &got, "wide", "REPOSITORY="+at.Path, "TREE="+x.Dir)
	t.Logf("peak %d MiB; full %.2f s, incremental %.2f s, restore %.2f s", got.Peak>>20, got.Full.Seconds, got.Incremental.Seconds, got.Restore.Seconds)
	if f := got.Full.Tree; f.Entries != wideCount+2 || f.FilesRead != wideCount || f.DirsWalked != 2 {
		t.Errorf("%+v", f)
	}
	if i := got.Incremental.Tree; i.Entries != wideCount+2 || i.FilesRead != 10 || i.FilesReused != wideCount-10 || i.DirsWalked != 2 {
		t.Errorf("%+v", i)
	}
	if got.Restore.Entries != wideCount+2 {
		t.Errorf("%+v", got.Restore)
	}
	if got.Peak > memoryMax {
		t.Errorf("peak of %d MiB", got.Peak>>20)
	}
}
