package repository

import (
	"fmt"
	"slices"
	"testing"
	"time"
)

// aged is a repository in which days pass in seconds.
type aged struct {
	t    *testing.T
	at   Location
	run  string
	now  time.Duration // since now
	repo *Repository
	has  map[string]*disk // what backups must hold
}

func newAged(t *testing.T) *aged {
	t.Helper()
	a := &aged{t: t, at: mustInit(t, MinChunkSize), run: t.TempDir(), has: map[string]*disk{}}
	a.pass(0)
	return a
}

// pass opens the repository a while later.
func (a *aged) pass(d time.Duration) {
	a.t.Helper()
	a.now += d
	a.repo = mustOpen(a.t, a.at, OpenOptions{Locks: a.run}.Skewed(a.now, a.now))
}

func (a *aged) maintain(o MaintainOptions) Maintenance {
	a.t.Helper()
	m, err := a.repo.Maintain(a.t.Context(), o)
	if err != nil {
		a.t.Fatal(err)
	}
	return m
}

func (a *aged) backup(d *disk, id string) Backup {
	a.t.Helper()
	b, err := d.backup(a.t.Context(), a.repo, id, time.Now().Add(a.now))
	if err != nil {
		a.t.Fatal(err)
	}
	a.has[id] = d.clone()
	return b
}

func (a *aged) forget(ids ...string) {
	a.t.Helper()
	if err := a.repo.Forget(a.t.Context(), ids...); err != nil {
		a.t.Fatal(err)
	}
	for _, id := range ids {
		delete(a.has, id)
	}
}

// check reads all of every backup that there must be.
func (a *aged) check() {
	a.t.Helper()
	found, err := a.repo.Backups(a.t.Context(), Filter{})
	if err != nil || len(found) != len(a.has) {
		a.t.Fatalf("%d backups, want %d: %v", len(found), len(a.has), err)
	}
	for _, b := range found {
		if a.has[b.ID] == nil {
			a.t.Fatalf("backup %s is listed", b.ID)
		}
		if err := a.has[b.ID].check(a.t.Context(), a.repo, b); err != nil {
			a.t.Error(err)
		}
	}
}

func (a *aged) space() Space {
	a.t.Helper()
	s, err := a.repo.Space(a.t.Context())
	if err != nil {
		a.t.Fatal(err)
	}
	return s
}

// tasks are the names of what a maintenance did.
func tasks(m Maintenance) (names []string) {
	for _, t := range m.Tasks {
		names = append(names, t.Name)
	}
	return names
}

const day = 24 * time.Hour

// With a maintenance a day, as kopia's schedule has it, the space of forgotten backups is back after some cycles, and all
// other backups are what they were in every state between.
func TestSpaceComesBack(t *testing.T) {
	a := newAged(t)
	d := &disk{name: "v", chunks: make([]uint64, 1500), random: true}
	next := uint64(1)
	write := func(n int) {
		for i := range n {
			d.chunks[(int(next)*7+i)%len(d.chunks)] = next
			next++
		}
	}
	write(1000)
	for n := range 8 {
		write(100)
		a.backup(d, fmt.Sprint("b", n))
	}
	a.forget("b0", "b1", "b2", "b4", "b5", "b6")
	s := a.space()
	reclaimable := s.Reclaimable
	if reclaimable < 10<<20 || s.Medium < reclaimable {
		t.Fatalf("%+v", s)
	}
	t.Logf("day 0: %d KiB on the medium, %d KiB in use, %d KiB reclaimable", s.Medium>>10, s.Backups>>10, s.Reclaimable>>10)
	full := 0
	for n := 1; n <= 6; n++ {
		a.pass(day + time.Minute)
		m := a.maintain(MaintainOptions{})
		if m.Mode != "full" {
			t.Fatalf("day %d: %s maintenance", n, m.Mode)
		}
		full++
		a.check()
		s = a.space()
		t.Logf("day %d: %d KiB on the medium, %d KiB in use, %d KiB reclaimable: %v", n, s.Medium>>10, s.Backups>>10, s.Reclaimable>>10, tasks(m))
		write(10)
		a.backup(d, fmt.Sprint("day", n))
		if n < 2 && s.Medium < reclaimable {
			t.Errorf("the space came back before any two cycles: kopia's safety times are not kept")
		}
	}
	// What is left waits in the one pack that is too small and is packed anew with what came since, which begins its time
	// again. Everything else is gone from the medium too.
	const shortPack = 12 << 20
	if s.Reclaimable > min(shortPack, reclaimable/4) || s.Medium > s.Backups+s.Reclaimable+1<<20 {
		t.Errorf("after %d cycles: %d bytes on the medium, %d in use, %d reclaimable of %d", full, s.Medium, s.Backups, s.Reclaimable, reclaimable)
	}
	if m := a.maintain(MaintainOptions{}); m.Mode != "none" || len(m.Tasks) != 0 {
		t.Errorf("the next at once: %+v", m)
	}
	a.pass(time.Hour + time.Minute)
	if m := a.maintain(MaintainOptions{}); m.Mode != "quick" || slices.Contains(tasks(m), "snapshot-gc") {
		t.Errorf("an hour later: %+v", m)
	}
	a.check()
}

// Contents that a backup refers to again, after a cycle marked them as deleted, are read at once, lose the mark in the next
// cycle, and are there when everything is gone that really was to go.
func TestDeletedContentsComeBack(t *testing.T) {
	a := newAged(t)
	d := &disk{name: "v", chunks: make([]uint64, 1100), random: true}
	for i := range 40 {
		d.chunks[i*27] = uint64(i + 1)
	}
	base := a.backup(d, "base")
	a.pass(day)

	// One that reuses the base's segments without a look at what is in them, as an incremental does, and is not done when
	// the base is forgotten and its contents are marked; and one that begins after that, and finds all of them by itself.
	ctx := t.Context()
	running := a.repo
	w, err := running.NewWriter(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close(ctx)
	image, err := running.OpenImage(ctx, base)
	if err != nil {
		t.Fatal(err)
	}
	x := w.NewIndex(base.Size)
	for n := range image.Segments() {
		s, _ := image.Segment(n)
		if err := x.Add(s); err != nil {
			t.Fatal(err)
		}
	}
	a.pass(time.Minute)
	a.forget("base")
	marked := number(a.maintain(MaintainOptions{Full: true}), "snapshot-gc", "deletedContentCount")
	if marked < 42 {
		t.Fatalf("%d contents were marked, of 40 chunks and two segments at least", marked)
	}
	incremental := d.describe(running, "incremental", time.Now())
	if incremental.Image, err = x.Finish(ctx); err != nil {
		t.Fatal(err)
	}
	incremental.Kind, incremental.Base, incremental.BaseImage = Incremental, base.ID, base.Image
	if _, err := w.Commit(ctx, incremental, []int64{0, 27 << 16}); err != nil {
		t.Fatal(err)
	}
	a.has["incremental"] = d.clone()
	a.check() // marked as deleted, and there

	half := d.clone()
	half.chunks = half.chunks[:600]
	half.name = "half"
	a.backup(half, "late")
	a.check()
	if n := number(a.maintain(MaintainOptions{Full: true}), "snapshot-gc", "recoveredContentCount"); n == 0 || n >= marked {
		t.Errorf("%d of %d contents lost their mark; those that the late backup stored again had none", n, marked)
	}
	a.check()
	for range 5 {
		a.pass(day + time.Minute)
		a.maintain(MaintainOptions{})
		a.check()
	}
	a.forget("incremental")
	for range 5 {
		a.pass(day + time.Minute)
		a.maintain(MaintainOptions{})
		a.check()
	}
}

// number is one of kopia's, of a task.
func number(m Maintenance, task, name string) int {
	for _, t := range m.Tasks {
		if n, ok := t.Stats[name].(float64); ok && t.Name == task {
			return int(n)
		}
	}
	return 0
}
