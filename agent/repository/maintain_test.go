package repository

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kopia/kopia/repo"
	"github.com/kopia/kopia/repo/content"
	"github.com/kopia/kopia/repo/content/indexblob"
	"github.com/kopia/kopia/repo/maintenance"
	"github.com/kopia/kopia/repo/manifest"
	"github.com/kopia/kopia/snapshot"
	"github.com/kopia/kopia/snapshot/snapshotgc"

	"stillpoint.io/stillpoint/fault"
)

// With a maintenance a day, as kopia's schedule has it, the space of forgotten backups is back after some cycles, and all
// other backups are what they were in every state between.
func TestSpaceComesBack(t *testing.T) {
	t.Parallel()
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
	t.Parallel()
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
	if _, err := w.Commit(ctx, incremental, readsBack(0, 27<<16)); err != nil {
		t.Fatal(err)
	}
	a.has["incremental"] = d.clone()
	a.check() // marked as deleted, and there
	medium, err := running.OpenMedium(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for n := range image.Segments() {
		chunks, err := image.Chunks(ctx, n)
		for i := 0; err == nil && i < len(chunks); i++ {
			err = medium.Locate(ctx, chunks[i])
		}
		if err != nil {
			t.Errorf("verification says: %v", err)
		}
	}
	if err := medium.Close(ctx); err != nil {
		t.Fatal(err)
	}

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

// What marks contents as in use, and what does not, is as kopia judges it.
func TestCollectIsKopias(t *testing.T) {
	t.Parallel()
	a := newAged(t)
	d := &disk{name: "v", chunks: make([]uint64, 1200)}
	for n := range 4 {
		for i := range 30 {
			d.chunks[i*39+n] = uint64(n*10 + i)
		}
		a.backup(d, fmt.Sprint("b", n))
	}
	base, err := a.repo.Backup(t.Context(), "b2")
	if err != nil {
		t.Fatal(err)
	}
	unfinished := d.clone()
	unfinished.chunks[8] = 4711
	if err := unfinished.checkpoint(t.Context(), a.repo, "c", time.Now(), &base); err != nil {
		t.Fatal(err)
	}
	a.forget("b0", "b2")
	a.pass(25 * time.Hour)
	judge := func(gc func(context.Context, repo.DirectRepositoryWriter) error) map[string]any {
		t.Helper()
		if err := repo.DirectWriteSession(t.Context(), a.repo.kopia, repo.WriteSessionOptions{}, gc); err != nil {
			t.Fatal(err)
		}
		s, err := maintenance.GetSchedule(t.Context(), a.repo.kopia)
		if err != nil {
			t.Fatal(err)
		}
		return stats(s.Runs[maintenance.TaskSnapshotGarbageCollection][0])
	}
	ours := judge(func(ctx context.Context, w repo.DirectRepositoryWriter) error {
		return a.repo.collect(ctx, w, w.Time())
	})
	a.pass(25 * time.Hour) // a mark makes a content young
	theirs := judge(func(ctx context.Context, w repo.DirectRepositoryWriter) error {
		return snapshotgc.Run(ctx, w, true, maintenance.SafetyFull, w.Time())
	})
	for _, name := range []string{"inUseContentCount", "inUseContentSize", "unreferencedContentCount", "unreferencedContentSize"} {
		if ours[name] == nil || ours[name] != theirs[name] {
			t.Errorf("%s: ours %v, kopia's %v", name, ours[name], theirs[name])
		}
	}
	a.check()
}

// One host maintains, one process at a time.
func TestWhoMaintains(t *testing.T) {
	t.Parallel()
	a := newAged(t)
	other, err := Open(t.Context(), a.at, secret, OpenOptions{Host: "other", Locks: a.run})
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close(t.Context())
	for _, o := range []MaintainOptions{{}, {Full: true}, {DryRun: true}} {
		if _, err := other.Maintain(t.Context(), o); fault.KindOf(err) != fault.Invalid || !strings.Contains(fmt.Sprint(err), `"stillpoint@test"`) {
			t.Errorf("%+v by another host: %v", o, err)
		}
	}
	if m, err := other.Maintain(t.Context(), MaintainOptions{TakeOver: true, DryRun: true}); err != nil || m.Owner != "stillpoint@test" || m.Mode != "full" {
		t.Errorf("a dry run of taking over: %+v, %v", m, err)
	}
	if m, err := other.Maintain(t.Context(), MaintainOptions{TakeOver: true}); err != nil || m.Owner != "stillpoint@other" {
		t.Errorf("taking over: %+v, %v", m, err)
	}
	if _, err := a.repo.Maintain(t.Context(), MaintainOptions{}); fault.KindOf(err) != fault.Invalid || !strings.Contains(fmt.Sprint(err), `"stillpoint@other"`) {
		t.Errorf("by the old owner: %v", err)
	}
	a.maintain(MaintainOptions{TakeOver: true})

	lock, err := a.repo.lockMaintenance()
	if err != nil {
		t.Fatal(err)
	}
	again := mustOpen(t, a.at, OpenOptions{Locks: a.run})
	if _, err := again.Maintain(t.Context(), MaintainOptions{}); fault.KindOf(err) != fault.Busy {
		t.Errorf("while another maintains: %v", err)
	}
	lock.Close()
	if _, err := again.Maintain(t.Context(), MaintainOptions{Full: true}); err != nil {
		t.Error(err)
	}
	unlocked := mustOpen(t, a.at, OpenOptions{})
	if _, err := unlocked.Maintain(t.Context(), MaintainOptions{}); fault.KindOf(err) != fault.Invalid {
		t.Errorf("without a folder for locks: %v", err)
	}
	reader := mustOpen(t, a.at, OpenOptions{Locks: a.run, ReadOnly: true})
	if _, err := reader.Maintain(t.Context(), MaintainOptions{}); fault.KindOf(err) != fault.Invalid {
		t.Errorf("for reading only: %v", err)
	}
}

// With a clock that is wrong nothing is judged by its age, and nothing is put off.
func TestClocksThatJump(t *testing.T) {
	t.Parallel()
	a := newAged(t)
	d := &disk{name: "v", chunks: make([]uint64, 100)}
	for n := range 3 {
		d.chunks[n*7] = uint64(n + 1)
		a.backup(d, fmt.Sprint("b", n))
	}
	a.forget("b1")
	a.pass(day)
	a.maintain(MaintainOptions{})
	before, err := maintenance.GetSchedule(t.Context(), a.repo.kopia)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name          string
		kopia, medium time.Duration
	}{
		{"kopia's far ahead", a.now + 400*day, a.now},
		{"kopia's far behind", a.now - 400*day, a.now},
		{"the medium's far ahead", a.now, a.now + 400*day},
		{"kopia's a little ahead", a.now + 6*time.Minute, a.now},
		{"both set back", a.now - 2*day, a.now - 2*day},
	} {
		r := mustOpen(t, a.at, OpenOptions{Locks: a.run}.Skewed(c.kopia, c.medium))
		for _, full := range []bool{false, true} {
			if m, err := r.Maintain(t.Context(), MaintainOptions{Full: full}); fault.KindOf(err) != fault.Unavailable {
				t.Errorf("%s: %+v, %v", c.name, m, err)
			}
		}
		after, err := maintenance.GetSchedule(t.Context(), a.repo.kopia)
		if err != nil || !after.NextFullMaintenanceTime.Equal(before.NextFullMaintenanceTime) || !after.NextQuickMaintenanceTime.Equal(before.NextQuickMaintenanceTime) {
			t.Errorf("%s: the schedule changed from %v to %v: %v", c.name, before, after, err)
		}
		id := strings.ReplaceAll(strings.ReplaceAll(c.name, " ", "-"), "'", "")
		if _, err := d.backup(t.Context(), r, id, time.Now()); err != nil {
			t.Fatal(err)
		}
		a.has[id] = d.clone()
		d.chunks[50]++
		a.pass(0)
		a.check()
	}
	// Forgetting by a clock that has not reached the backup would not last.
	behind := mustOpen(t, a.at, OpenOptions{}.Skewed(a.now-400*day, a.now-400*day))
	if err := behind.Forget(t.Context(), "b2"); fault.KindOf(err) != fault.Unavailable {
		t.Errorf("forgetting by a clock that is behind: %v", err)
	}
	a.forget("b2")
	for range 5 {
		a.pass(day + time.Minute)
		a.maintain(MaintainOptions{})
		a.check()
	}
}

// Checkpoints keep what they refer to, and go when nobody will continue from them.
func TestStaleCheckpoints(t *testing.T) {
	t.Parallel()
	a := newAged(t)
	d := &disk{name: "v", chunks: make([]uint64, 64), random: true}
	for i := range d.chunks {
		d.chunks[i] = uint64(i + 1)
	}
	base := a.backup(d, "base")
	of := func(id string, d *disk, base *Backup) {
		t.Helper()
		if err := d.checkpoint(t.Context(), a.repo, id, time.Now(), base); err != nil {
			t.Fatal(err)
		}
	}
	old, mine, young := d.clone(), d.clone(), d.clone()
	old.name, old.chunks[0], mine.name, mine.chunks[1] = "old", 901, "mine", 902
	young.name, young.chunks[2] = "young", 903
	of("old", old, &base)
	of("mine", mine, nil)
	a.forget("base")
	a.backup(mine, "done")
	of("done", mine, nil) // by a process that came late

	left := func() (ids []string) {
		all, err := a.repo.Checkpoints(t.Context(), Filter{})
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range all {
			ids = append(ids, c.ID)
			held := map[string]*disk{"old": old, "mine": mine, "done": mine, "young": young}[c.ID]
			part := c.Backup
			part.Size = c.Done
			if err := held.check(t.Context(), a.repo, part); err != nil {
				t.Errorf("the checkpoint of %s: %v", c.ID, err)
			}
		}
		slices.Sort(ids)
		return ids
	}
	if m := a.maintain(MaintainOptions{Full: true}); m.Checkpoints != 1 || strings.Join(left(), " ") != "old" {
		// "mine" went when a newer backup of its volume was committed.
		t.Errorf("%d dropped, left %v", m.Checkpoints, left())
	}
	for n := range 6 {
		a.pass(day + time.Minute)
		if n == 5 {
			of("young", young, nil)
		}
		if m := a.maintain(MaintainOptions{}); m.Checkpoints != 0 {
			t.Errorf("day %d: %d dropped", n, m.Checkpoints)
		}
		left()
		if s := a.space(); s.Unfinished < 64<<10 {
			t.Errorf("day %d: %d bytes are held by checkpoints", n, s.Unfinished)
		}
	}
	a.pass(day)
	if m := a.maintain(MaintainOptions{}); m.Checkpoints != 1 || strings.Join(left(), " ") != "young" {
		t.Errorf("after a week: %d dropped, left %v", m.Checkpoints, left())
	}
	a.check()
}

// What cannot be understood stops a maintenance before anything is freed: kopia's own would take its data for unused.
func TestMaintenanceStopsAtDamage(t *testing.T) {
	t.Parallel()
	a := newAged(t)
	d := &disk{name: "v", chunks: []uint64{1, 2, 3}}
	a.backup(d, "good")
	d.chunks[1] = 9
	a.backup(d, "hurt")
	a.backup(&disk{name: "w", chunks: []uint64{5}}, "gone")
	a.forget("gone")
	session := func(f func(context.Context, repo.DirectRepositoryWriter) error) {
		t.Helper()
		if err := repo.DirectWriteSession(t.Context(), a.repo.kopia, repo.WriteSessionOptions{}, f); err != nil {
			t.Fatal(err)
		}
	}
	deleted := func() (n int) {
		err := a.repo.kopia.ContentReader().IterateContents(t.Context(), content.IterateOptions{IncludeDeleted: true}, func(c content.Info) error {
			if c.Deleted && c.ContentID.Prefix() != manifest.ContentPrefix {
				n++
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	var strange manifest.ID
	session(func(ctx context.Context, w repo.DirectRepositoryWriter) (err error) {
		strange, err = w.PutManifest(ctx, map[string]string{manifest.TypeLabelKey: snapshot.ManifestType}, []string{"from", "a", "newer", "kopia"})
		return err
	})
	a.pass(day)
	if _, err := a.repo.Maintain(t.Context(), MaintainOptions{}); fault.KindOf(err) != fault.Corrupt || !strings.Contains(err.Error(), string(strange)) {
		t.Errorf("a manifest that cannot be read: %v", err)
	}
	session(func(ctx context.Context, w repo.DirectRepositoryWriter) error { return w.DeleteManifest(ctx, strange) })

	b, err := a.repo.Backup(t.Context(), "hurt")
	if err != nil {
		t.Fatal(err)
	}
	image, err := a.repo.OpenImage(t.Context(), b)
	if err != nil {
		t.Fatal(err)
	}
	chunks, err := image.Chunks(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	session(func(ctx context.Context, w repo.DirectRepositoryWriter) error {
		return w.ContentManager().DeleteContent(ctx, chunks[1].id)
	})
	session(func(ctx context.Context, w repo.DirectRepositoryWriter) error {
		_, err := w.ContentManager().CompactIndexes(ctx, indexblob.CompactOptions{DropDeletedBefore: w.Time().Add(time.Minute)})
		return err
	})
	a.pass(day)
	if _, err := a.repo.Maintain(t.Context(), MaintainOptions{Full: true}); fault.KindOf(err) != fault.Corrupt || !strings.Contains(err.Error(), "backup hurt") {
		t.Errorf("a content that is not there: %v", err)
	}
	if n := deleted(); n != 0 {
		t.Errorf("%d contents were marked all the same", n)
	}
	a.forget("hurt")
	a.maintain(MaintainOptions{Full: true})
	if n := deleted(); n == 0 {
		t.Error("nothing is marked once the damage is gone")
	}
	a.check()
}
