//go:build ceph && cgo

package ceph

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/adapters/adaptertest"
	"stillpoint.io/stillpoint/agent/backup"
	"stillpoint.io/stillpoint/agent/repository"
)

// testLag is how long recursive times take in the tests' cluster at the most, and lagging the backend's parameter for it.
const testLag = 2 * time.Second

var lagging = map[string]string{"lag": testLag.String()}

// past is a time long ago: one in the future would make all directories above it look changed.
func past(t time.Time) time.Time {
	return time.Unix(t.Unix()&(1<<30-1), int64(t.Nanosecond())).UTC()
}

// cutFiles makes a published snapshot.
func cutFiles(t testing.TB, a *FSAdapter, id adapters.VolumeID, name string) adapters.Snapshot {
	t.Helper()
	s, err := a.CreateSnapshot(t.Context(), id, name)
	must(t, err)
	must(t, a.Publish(t.Context(), s.ID, adapters.Notes{Cut: name}))
	return s
}

// mature waits until what was done before is old enough to be believed in.
func mature() { time.Sleep(testLag + testLag/4) }

// Random histories of a subvolume: whatever pair of its snapshots is compared, what is called unchanged is, files of several
// names apart where that is said.
func TestFSHistory(t *testing.T) {
	t.Parallel()
	a, v := openFiles(t, lagging), makeTree(t)
	r := rand.New(rand.NewPCG(5, 8))
	m := adaptertest.NewTreeModel(v)
	m.Times = past
	must(t, m.Grow(r, 150))
	mature()
	type moment struct {
		id    adapters.SnapshotID
		model *adaptertest.TreeModel
	}
	var all []moment
	unchanged, dirs := 0, 0
	for i := range 5 {
		must(t, m.Grow(r, r.IntN(9)))
		now := moment{cutFiles(t, a, v.ID(), fmt.Sprint("m", i)).ID, m.Clone()}
		mature()
		for _, base := range append(all, now) {
			tree, err := a.OpenTree(t.Context(), now.id, &base.id)
			must(t, err)
			n, err := now.model.Compare(t.Context(), tree, base.model)
			if err != nil {
				t.Fatalf("%s since %s: %v", now.id, base.id, err)
			}
			unchanged += n
			for _, path := range now.model.Paths() {
				if e, err := tree.Stat(t.Context(), path); err != nil || e.Unchanged && e.Type == adapters.Directory {
					must(t, err)
					dirs++
				}
			}
			must(t, tree.Close())
		}
		all = append(all, now)
	}
	if t.Logf("%d entries were called unchanged, %d of them directories", unchanged, dirs); unchanged < 300 || dirs < 50 {
		t.Errorf("only %d entries were called unchanged, %d of them directories", unchanged, dirs)
	}
}

// What changes in a file of several names shows above one of them only: the other's directory is called unchanged, but for
// such files.
func TestFSLinks(t *testing.T) {
	t.Parallel()
	a, v := openFiles(t, lagging), makeTree(t)
	m := adaptertest.NewTreeModel(v)
	m.Times = past
	must(t, m.Apply(
		func(m *adaptertest.TreeModel) error { return m.Mkdir("first", nil) },
		func(m *adaptertest.TreeModel) error { return m.Mkdir("second", nil) },
		func(m *adaptertest.TreeModel) error { return m.Write("first/f", []byte("one"), 0, nil) },
		func(m *adaptertest.TreeModel) error { return m.Link("first/f", "second/f") },
	))
	mature()
	base := cutFiles(t, a, v.ID(), "base").ID
	must(t, v.Write("first/f", []byte("two"), 0))
	next := cutFiles(t, a, v.ID(), "next").ID
	mature()
	tree, err := a.OpenTree(t.Context(), next, &base)
	must(t, err)
	for path, want := range map[string][2]bool{"first": {}, "second": {true, true}, "first/f": {}, "second/f": {}} {
		if e, err := tree.Stat(t.Context(), path); err != nil || [2]bool{e.Unchanged, e.ButLinks} != want {
			t.Errorf("%s: %+v, %v", path, e, err)
		}
	}
}

// A backup of some hundred files, an increment of ten, one that looks at everything, and what is restored of them.
func TestFSBackup(t *testing.T) {
	t.Parallel()
	a, v := openFiles(t, lagging), makeTree(t)
	at := repository.Location{Path: t.TempDir()}
	passphrase := adapters.NewSecret("correct horse battery staple")
	must(t, repository.Init(t.Context(), at, passphrase, repository.Options{Host: "test"}))
	repo, err := repository.Open(t.Context(), at, passphrase, repository.OpenOptions{Host: "test"})
	must(t, err)
	t.Cleanup(func() { must(t, repo.Close(context.Background())) })

	m := adaptertest.NewTreeModel(v)
	m.Times = past
	r := rand.New(rand.NewPCG(1, 2))
	file := func(d, f int) string { return fmt.Sprintf("d%02d/f%02d", d, f) }
	for d := range 30 {
		must(t, m.Mkdir(fmt.Sprintf("d%02d", d), r))
		for f := range 10 {
			must(t, m.Write(file(d, f), randomBytes(1+r.IntN(9000)), 0, r))
		}
	}
	must(t, m.Mkdir("links", r))
	must(t, m.Link(file(3, 3), "links/l"))
	must(t, m.Apply())
	mature()

	run := func(name string) backup.Report {
		t.Helper()
		s := cutFiles(t, a, v.ID(), name)
		mature()
		report, err := backup.Run(t.Context(), backup.Request{Adapter: a, Snapshot: s.ID, Repository: repo})
		if err != nil || len(report.Warnings) > 0 {
			t.Fatalf("%+v, %v", report, err)
		}
		return report
	}
	full := run("full")
	if g := full.Tree; g.FilesRead != 300 || g.DirsWalked != 32 { // a file of two names is read once
		t.Errorf("the full backup: %+v", g)
	}
	fullModel := m.Clone()
	for d := range 10 {
		must(t, m.Write(file(d, d), randomBytes(500), 100, nil))
	}
	must(t, m.Apply())
	next := run("next")
	if g := next.Tree; g.FilesRead != 10 || g.DirsWalked != 12 || g.DirsReused != 20 || g.FilesReused != 90 {
		t.Errorf("the increment: %+v", g)
	}
	nextModel := m.Clone()
	var last backup.Report
	for i := range 9 { // the tenth that would believe it all
		must(t, m.Write(file(20, i), randomBytes(50), 0, nil))
		must(t, m.Apply())
		last = run(fmt.Sprint("more-", i))
	}
	// The file that changed just before the base was made is read again: that the base has all of it cannot be told.
	if g := last.Tree; !g.Walked || g.DirsWalked != 32 || g.FilesRead != 2 {
		t.Errorf("the last: %+v", g)
	}

	for handle, want := range map[string]*adaptertest.TreeModel{full.Backup: fullModel, next.Backup: nextModel, last.Backup: m.Clone()} {
		id := strings.TrimPrefix(handle[strings.LastIndexByte(handle, '/')+1:], "backup:")
		n := freeTree()
		cleanUpTree(t, n)
		_, err := backup.Restore(t.Context(), backup.RestoreRequest{Source: backup.FromBackup(repo, id), Target: a, Volume: n.id("f")})
		must(t, err)
		s := cutFiles(t, a, n.id("f"), "restored")
		tree, err := a.OpenTree(t.Context(), s.ID, nil)
		must(t, err)
		if _, err := want.Compare(t.Context(), tree, nil); err != nil {
			t.Errorf("%s: %v", handle, err)
		}
		against, err := repo.Backup(t.Context(), id)
		must(t, err)
		saved, err := repo.OpenTree(t.Context(), against)
		must(t, err)
		if _, err := want.Compare(t.Context(), saved, nil); err != nil {
			t.Errorf("%s in the repository: %v", handle, err)
		}
	}
}
