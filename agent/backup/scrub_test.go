package backup

import (
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/repository"
	"stillpoint.io/stillpoint/cbt"
	"stillpoint.io/stillpoint/fault"
)

// slip makes a backup of s whose delta hides what lies at off, and which the sample does not find: with one draw of
// chance after the other, until it is so.
func (w *world) slip(s adapters.SnapshotID, off int64) Report {
	w.t.Helper()
	before, err := loadAudited(w.t.Context(), w.repo, w.id)
	if err != nil {
		w.t.Fatal(err)
	}
	for seed := range uint64(50) {
		q := w.request(s)
		q.chance = rand.NewPCG(seed, 3)
		q.Adapter = liar{Adapter: w.mem(), delta: filtered(func(e cbt.Extent) (cbt.Extent, bool) {
			return e, e.End() <= off || e.Offset > off
		})}
		r, err := Run(w.t.Context(), q)
		if err != nil {
			w.t.Fatal(err)
		}
		if r.Kind == repository.Incremental {
			return r
		}
		if err := errors.Join(w.repo.Forget(w.t.Context(), backupID(w.t, r.Backup)), w.repo.PutRecord(w.t.Context(), repository.AuditedRecord, w.id.String(), before)); err != nil {
			w.t.Fatal(err)
		}
	}
	w.t.Fatal("every draw found it")
	return Report{}
}

func (w *world) scrub(q ScrubRequest) (ScrubReport, error) {
	q.Adapter, q.Volume, q.Repository = w.adapter, w.id, w.repo
	return Scrub(w.t.Context(), q)
}

func (w *world) lookup(handle string) repository.Backup {
	w.t.Helper()
	b, err := w.repo.Backup(w.t.Context(), backupID(w.t, handle))
	if err != nil {
		w.t.Fatal(err)
	}
	return b
}

// A chain with a lie in its midst: the scrub finds it, condemns whoever has it and nobody else, and heals.
func TestScrubHeals(t *testing.T) {
	t.Parallel()
	const chunk, place = 64 << 10, 150 << 20
	w := newWorld(t, chunk, 200<<20)
	rng := rand.New(rand.NewPCG(1, 1))
	w.write(random(rng, 1<<20), 149<<20)
	w.write(random(rng, 1<<20), place)
	write := func() { w.write(random(rng, 1<<20), rng.Int64N(100)<<20) }

	s1, _ := w.cut()
	first := w.backup(s1)
	write()
	s2, want2 := w.cut()
	second := w.backup(s2)
	if r, err := w.scrub(ScrubRequest{All: true}); err != nil || r.BytesScrubbed != 200<<20 || r.Backup != second.Backup || !r.Oldest.Equal(w.lookup(second.Backup).Created) {
		t.Fatalf("%+v, %v", r, err)
	}
	w.write([]byte("missed"), place)
	s3, _ := w.cut()
	third := w.slip(s3, place)
	write()
	s4, want4 := w.cut()
	fourth := w.slip(s4, place) // an honest answer: that place is not in it
	for _, s := range []adapters.SnapshotID{s1, s2, s3} {
		w.deleteSnapshot(s)
	}

	r, err := w.scrub(ScrubRequest{All: true})
	if fault.KindOf(err) != fault.Corrupt || r.BytesWrong != chunk || len(r.Wrong) != 1 || r.Backup != fourth.Backup || r.Healed == "" {
		t.Fatalf("%+v, %v", r, err)
	}
	slices.Sort(r.Suspect)
	want := []string{third.Backup, fourth.Backup}
	slices.Sort(want)
	if !slices.Equal(r.Suspect, want) {
		t.Errorf("suspect are %v, want %v", r.Suspect, want)
	}
	for handle, suspect := range map[string]bool{first.Backup: false, second.Backup: false, third.Backup: true, fourth.Backup: true, r.Healed: false} {
		if b := w.lookup(handle); (b.Suspect != "") != suspect {
			t.Errorf("%s: suspect %q", handle, b.Suspect)
		}
	}
	mustEqual(t, "the healed one", w.content(r.Healed), want4)
	mustEqual(t, "the second", w.content(second.Backup), want2)
	if r.Oldest.Before(w.lookup(fourth.Backup).Created) {
		t.Errorf("after healing, something counts as not looked at since %v", r.Oldest)
	}

	// A suspect backup is not restored by accident, and is no base.
	restore := RestoreRequest{Source: FromBackup(w.repo, backupID(t, fourth.Backup)), Target: w.adapter, Volume: target("v")}
	if _, err := Restore(t.Context(), restore); fault.KindOf(err) != fault.Corrupt || !strings.Contains(err.Error(), "--suspect") {
		t.Errorf("restored: %v", err)
	}
	restore.Suspect = true
	if _, err := Restore(t.Context(), restore); err != nil {
		t.Errorf("insisted: %v", err)
	}
	again := w.backup(s4)
	if !again.Existed || again.Backup != r.Healed {
		t.Errorf("the same snapshot again: %+v", again)
	}
	byID := w.request(s4)
	byID.ID = backupID(t, fourth.Backup)
	if _, err := Run(t.Context(), byID); fault.KindOf(err) != fault.Corrupt {
		t.Errorf("under the suspect one's id: %v", err)
	}
	write()
	s5, want5 := w.cut()
	fifth := w.backup(s5)
	if fifth.Kind != repository.Incremental || fifth.Base != r.Healed {
		t.Errorf("%+v", fifth)
	}
	mustEqual(t, "the fifth", w.content(fifth.Backup), want5)
	if r, err := w.scrub(ScrubRequest{All: true}); err != nil || r.Backup != fifth.Backup {
		t.Errorf("%+v, %v", r, err)
	}
}

// Whoever dies after a backup was marked and before it was healed leaves that to the next scrub.
func TestScrubHealsLater(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 64<<10, 4<<20)
	w.write([]byte("x"), 1<<20)
	s, want := w.cut()
	first := w.backup(s)
	if err := w.repo.MarkSuspect(t.Context(), backupID(t, first.Backup), "a test"); err != nil {
		t.Fatal(err)
	}
	r, err := w.scrub(ScrubRequest{})
	if fault.KindOf(err) != fault.Corrupt || r.Healed == "" || r.BytesScrubbed != 0 {
		t.Fatalf("%+v, %v", r, err)
	}
	mustEqual(t, "healed", w.content(r.Healed), want)
	if again, err := w.scrub(ScrubRequest{All: true}); err != nil || again.Backup != r.Healed {
		t.Errorf("%+v, %v", again, err)
	}
}

// The backend is caught when the next backup is made, and the base turns out to be wrong already.
func TestCaughtOneBackupLate(t *testing.T) {
	t.Parallel()
	const place = 150 << 20
	w := newWorld(t, 64<<10, 200<<20)
	w.write([]byte("data"), place)
	s1, _ := w.cut()
	first := w.backup(s1)
	w.write([]byte("missed"), place)
	s2, _ := w.cut()
	second := w.slip(s2, place)
	s3, want := w.cut()
	for seed := range uint64(50) {
		q := w.request(s3)
		q.chance = rand.NewPCG(seed, 4)
		r, err := Run(t.Context(), q)
		if err != nil {
			t.Fatal(err)
		}
		if r.Kind == repository.Incremental { // this draw did not find it
			if err := w.repo.Forget(t.Context(), backupID(t, r.Backup)); err != nil {
				t.Fatal(err)
			}
			continue
		}
		if !slices.Equal(r.Suspect, []string{second.Backup}) || w.lookup(second.Backup).Suspect == "" || w.lookup(first.Backup).Suspect != "" {
			t.Errorf("%+v", r)
		}
		mustEqual(t, "image", w.content(r.Backup), want)
		return
	}
	t.Error("no draw found it")
}

// Daily scrubs of what is due find a lie within the days, read a share of the volume each, and then nothing more.
func TestScrubWithinDays(t *testing.T) {
	t.Parallel()
	const place = 190 << 20
	const days = 10
	w := newWorld(t, 64<<10, 320<<20)
	w.write([]byte("data"), place)
	s1, _ := w.cut()
	w.backup(s1)
	w.write([]byte("missed"), place)
	s2, want := w.cut()
	w.slip(s2, place)
	begin := time.Now()
	found := 0
	for day := 1; day <= days && found == 0; day++ {
		r, err := w.scrub(ScrubRequest{Within: days * 24 * time.Hour, now: begin.Add(time.Duration(day) * 24 * time.Hour)})
		switch {
		case fault.KindOf(err) == fault.Corrupt:
			found = day
			mustEqual(t, "healed", w.content(r.Healed), want)
		case err != nil:
			t.Fatal(err)
		case r.BytesScrubbed < repository.SegmentSize || r.BytesScrubbed > 70<<20:
			t.Errorf("day %d: %+v", day, r)
		}
	}
	t.Logf("found on day %d of %d", found, days)
	if found == 0 {
		t.Error("not found")
	}
	if r, err := w.scrub(ScrubRequest{Within: days * 24 * time.Hour, now: begin.Add(100 * 24 * time.Hour)}); err != nil || r.BytesScrubbed != 0 {
		t.Errorf("a snapshot that was looked at everywhere is read again: %+v, %v", r, err)
	}
}

// cancelling is a snapshot whose reader is cancelled after some reads.
type cancelling struct {
	adapters.Image
	left   *atomic.Int64
	cancel context.CancelFunc
}

func (c cancelling) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	if c.left.Add(-1) == 0 {
		c.cancel()
	}
	return c.Image.ReadAt(ctx, p, off)
}

// A scrub that is cancelled claims nothing that it did not do, and the next one works.
func TestScrubCancelled(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 64<<10, 200<<20)
	s, _ := w.cut()
	w.backup(s)
	before, err := loadAudited(t.Context(), w.repo, w.id)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var left atomic.Int64
	left.Store(50)
	a := liar{Adapter: w.mem(), open: func(i adapters.Image) adapters.Image { return cancelling{i, &left, cancel} }}
	if _, err := Scrub(ctx, ScrubRequest{Adapter: a, Volume: w.id, Repository: w.repo, All: true}); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	after, err := loadAudited(t.Context(), w.repo, w.id)
	if err != nil {
		t.Fatal(err)
	}
	if !after.Coverage.Oldest().Equal(before.Coverage.Oldest()) || !after.Scrubbed.IsZero() {
		t.Errorf("%+v after %+v", after, before)
	}
	if r, err := w.scrub(ScrubRequest{All: true}); err != nil || !r.Oldest.Equal(w.lookup(r.Backup).Created) {
		t.Errorf("%+v, %v", r, err)
	}
}

func TestScrubNothingToCompare(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 64<<10, 4<<20)
	if _, err := w.scrub(ScrubRequest{}); fault.KindOf(err) != fault.NotFound {
		t.Errorf("without a backup: %v", err)
	}
	s, _ := w.cut()
	w.backup(s)
	w.deleteSnapshot(s)
	if _, err := w.scrub(ScrubRequest{}); fault.KindOf(err) != fault.NotFound || !strings.Contains(err.Error(), "keep the newest snapshot") {
		t.Errorf("without its snapshot: %v", err)
	}
}

// What was looked at is remembered in the repository, derived from the backups where that is lost, and told as a metric.
func TestUnaudited(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 64<<10, 200<<20)
	if got, err := OldestUnaudited(t.Context(), w.repo); err != nil || len(got) != 0 {
		t.Errorf("of nothing: %v, %v", got, err)
	}
	w.write([]byte("x"), 0)
	s, _ := w.cut()
	first := w.lookup(w.backup(s).Backup)
	since := func() time.Time {
		t.Helper()
		got, err := OldestUnaudited(t.Context(), w.repo)
		if err != nil || len(got) != 1 || got[0].Volume != w.id {
			t.Fatalf("%v, %v", got, err)
		}
		registry := prometheus.NewRegistry()
		now := time.Unix(1_900_000_000, 0)
		if err := UnauditedGauge(registry, "default", got, now); err != nil {
			t.Fatal(err)
		}
		families, err := registry.Gather()
		if err != nil || len(families) != 1 || len(families[0].Metric) != 1 {
			t.Fatalf("%v, %v", families, err)
		}
		value, want := families[0].Metric[0].Gauge.GetValue(), got[0].Since
		if want.IsZero() {
			want = now
		}
		if d := value - float64(want.UnixNano())/1e9; d > 1e-3 || d < -1e-3 {
			t.Errorf("the metric is %f, want %v", value, want)
		}
		return got[0].Since
	}
	// The holes of a full backup were not looked at, save a sample.
	if got := since(); !got.Equal(first.Created.Add(-time.Second)) {
		t.Errorf("%v after a backup of %v", got, first.Created)
	}
	if _, err := w.scrub(ScrubRequest{All: true}); err != nil {
		t.Fatal(err)
	}
	if got := since(); !got.IsZero() {
		t.Errorf("%v after everything was looked at", got)
	}
	w.write([]byte("y"), 100<<20)
	s, _ = w.cut()
	w.backup(s)
	if got := since(); !got.Equal(first.Created) {
		t.Errorf("%v, want %v", got, first.Created)
	}
	if err := w.repo.PutRecord(t.Context(), repository.AuditedRecord, w.id.String(), map[string]any{"coverage": map[string]any{"version": 99}}); err != nil {
		t.Fatal(err)
	}
	if got := since(); !got.Equal(first.Created.Add(-time.Second)) {
		t.Errorf("%v without a record that can be read", got)
	}
}

func TestBits(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	for range 200 {
		n := 1 + rng.Int64N(400)
		b, model := newBits(n), make([]bool, n)
		for range rng.IntN(6) {
			from := rng.Int64N(n)
			to := from + rng.Int64N(n-from+1)
			b.set(from, to)
			for i := from; i < to; i++ {
				model[i] = true
			}
		}
		got := make([]bool, n)
		last := int64(-1)
		for from, to := range b.runs(n) {
			if from <= last || to <= from {
				t.Fatalf("a run from %d to %d after %d", from, to, last)
			}
			last = to
			for i := from; i < to; i++ {
				got[i] = true
			}
		}
		for i := range model {
			if b.has(int64(i)) != model[i] || got[i] != model[i] {
				t.Fatalf("bit %d of %d: %v, in a run %v, want %v", i, n, b.has(int64(i)), got[i], model[i])
			}
		}
	}
}
