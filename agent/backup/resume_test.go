package backup

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"os"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/adapters/mem"
	"stillpoint.io/stillpoint/agent/repository"
	"stillpoint.io/stillpoint/fault"
)

// counter is a number in a file that outlives a killed process to the last increment.
type counter struct{ n *atomic.Int64 }

func newCounter(path string) (counter, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return counter{}, err
	}
	defer f.Close()
	if err := f.Truncate(8); err != nil {
		return counter{}, err
	}
	p, err := unix.Mmap(int(f.Fd()), 0, 8, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return counter{}, err
	}
	return counter{(*atomic.Int64)(unsafe.Pointer(&p[0]))}, nil
}

// counted is an adapter of a volume whose snapshots are the same in every process, to the second. It counts what
// is read, and may do something at a count.
type counted struct {
	*mem.Adapter
	read counter
	at   int64 // bytes; 0: never
	do   func() error
}

const (
	resumeSize = 2560 << 20 // 40 segments
	smallSize  = 512 << 20
	resumeID   = "resumed"
)

var resumeVolume = adapters.VolumeID{Backend: "mem", ID: "local/vol"}

// resumeWorld makes the volume and its first snapshot, with a few bytes in every chunk of 1 MiB, and its second after
// some went into all but the last eighth.
func resumeWorld(size int64, read counter) (counted, *mem.Volume, error) {
	store := new(mem.Store)
	v, err := store.Create("vol", size)
	a := counted{Adapter: store.Adapter("mem"), read: read}
	for i, name := range []string{"first", "second"} {
		for off := int64(0); off < size/8*int64(8-i) && err == nil; off += 1 << 20 {
			_, err = v.WriteAt(fmt.Appendf(nil, "%s at %d", name, off), off)
		}
		if err == nil {
			_, err = a.CreateSnapshot(context.Background(), resumeVolume, name)
		}
		if err == nil {
			err = a.Publish(context.Background(), adapters.SnapshotID{Volume: resumeVolume, Name: name}, adapters.Notes{})
		}
	}
	return a, v, err
}

func dated(s adapters.Snapshot) adapters.Snapshot {
	s.Created = time.Unix(1700000000+int64(len(s.ID.Name)), 0)
	return s
}

func (c counted) Snapshot(ctx context.Context, id adapters.SnapshotID) (adapters.Snapshot, error) {
	s, err := c.Adapter.Snapshot(ctx, id)
	return dated(s), err
}

func (c counted) Snapshots(ctx context.Context, f adapters.Filter) iter.Seq2[adapters.Snapshot, error] {
	return func(yield func(adapters.Snapshot, error) bool) {
		for s, err := range c.Adapter.Snapshots(ctx, f) {
			if !yield(dated(s), err) {
				return
			}
		}
	}
}

func (c counted) Open(ctx context.Context, id adapters.SnapshotID) (adapters.Image, error) {
	i, err := c.Adapter.Open(ctx, id)
	return countedImage{i, c}, err
}

type countedImage struct {
	adapters.Image
	c counted
}

func (i countedImage) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	if n := i.c.read.n.Add(int64(len(p))); i.c.at > 0 && n >= i.c.at {
		if err := i.c.do(); err != nil {
			return 0, err
		}
	}
	return i.Image.ReadAt(ctx, p, off)
}

func kill() error { return unix.Kill(os.Getpid(), unix.SIGKILL) }

func resumeRequest(r *repository.Repository, a adapters.Adapter, snapshot string) Request {
	return Request{Adapter: a, Snapshot: adapters.SnapshotID{Volume: resumeVolume, Name: snapshot}, Repository: r, ID: resumeID + "-" + snapshot, Pace: Pace{Bytes: 1 << 20, Time: time.Nanosecond}}
}

// resumedChild backs a snapshot up until it kills itself. If it is not to, it compares the backup with the snapshot, and
// prints the report.
func resumedChild() error {
	ctx := context.Background()
	read, err := newCounter(os.Getenv("COUNTER"))
	if err != nil {
		return err
	}
	a, _, err := resumeWorld(resumeSize, read)
	if err != nil {
		return err
	}
	if _, err := fmt.Sscan(os.Getenv("AT"), &a.at); err != nil {
		return err
	}
	a.do = kill
	r, err := repository.Open(ctx, repository.Location{Path: os.Getenv("REPOSITORY")}, passphrase, repository.OpenOptions{Host: "test"})
	if err != nil {
		return err
	}
	snapshot := os.Getenv("SNAPSHOT")
	if a.at > 0 {
		fmt.Println("open")
	}
	report, err := Run(ctx, resumeRequest(r, a, snapshot))
	if a.at > 0 {
		return fmt.Errorf("it was not killed: %w", err)
	}
	if err == nil {
		err = sameAsSnapshot(ctx, r, report.Backup, a, snapshot)
	}
	if err == nil {
		err = json.NewEncoder(os.Stdout).Encode(report)
	}
	return err
}

// changedBytes is what an incremental of the second snapshot has to read, in chunks of 1 MiB.
const changedBytes = resumeSize / 8 * 7

// A backup that is killed half-way continues: at most a tenth is read twice, the image is right, and no checkpoint is
// left. What the checkpoint refers to survives a maintenance, also after its base was forgotten.
func TestResume(t *testing.T) {
	t.Parallel()
	w := newKopiaWorld(t, 1<<20, 1<<20)
	for _, c := range []struct {
		snapshot string
		total    int64
		kind     repository.Kind
	}{{"first", resumeSize, repository.Full}, {"second", changedBytes, repository.Incremental}} {
		path := t.TempDir() + "/counter"
		env := []string{"REPOSITORY=" + w.at.Path, "COUNTER=" + path, "SNAPSHOT=" + c.snapshot, fmt.Sprint("AT=", c.total/2)}
		if c := runChild(t, "resume", time.Hour, 0, env...); !c.killed {
			t.Fatal("the child was not killed")
		}
		newKopia(t, w.at).run("maintenance", "run", "--full", "--safety=none")

		read, err := newCounter(path)
		if err != nil {
			t.Fatal(err)
		}
		r := openRepository(t, w.at)
		unfinished, err := r.Checkpoints(t.Context(), repository.Filter{})
		if err != nil || len(unfinished) != 1 || unfinished[0].Done == 0 {
			t.Fatalf("%+v, %v", unfinished, err)
		}
		var report Report
		childReport(t, &report, "resume", append(env, "AT=0")...)
		twice := read.n.Load() - report.BytesAudited - report.BytesChecked - c.total
		t.Logf("%s: killed at half of %d MiB, continued at %d MiB, read %d MiB twice (%.1f %%)", c.kind, c.total>>20, report.BytesResumed>>20, twice>>20, 100*float64(twice)/float64(c.total))
		if report.Kind != c.kind || report.BytesResumed == 0 || twice < 0 || twice > c.total/10 {
			t.Errorf("%+v", report)
		}
		if left, err := openRepository(t, w.at).Checkpoints(t.Context(), repository.Filter{}); err != nil || len(left) > 0 {
			t.Errorf("left: %+v, %v", left, err)
		}
	}
}

// sameAsSnapshot compares a backup with a snapshot, chunk by chunk.
func sameAsSnapshot(ctx context.Context, r *repository.Repository, handle string, a counted, snapshot string) error {
	h, err := repository.ParseHandle(handle)
	if err != nil {
		return err
	}
	b, err := r.Backup(ctx, h.ID)
	if err != nil {
		return err
	}
	image, err := r.OpenImage(ctx, b)
	if err != nil {
		return err
	}
	defer image.Close()
	source, err := a.Adapter.Open(ctx, adapters.SnapshotID{Volume: resumeVolume, Name: snapshot})
	if err != nil {
		return err
	}
	defer source.Close()
	p := make([]byte, r.ChunkSize())
	for off := int64(0); off < b.Size; off += int64(len(p)) {
		if _, err := source.ReadAt(ctx, p, off); err != nil {
			return err
		}
		if n, err := image.Need(ctx, off, p); err != nil || !image.Is(n.Chunk, p) {
			return fmt.Errorf("the backup of %s differs in the chunk at %d: %v", snapshot, off, err)
		}
	}
	return nil
}

// Cancelled, or with a source that went away, a backup leaves a checkpoint as its last act. It is of no use for another
// snapshot, a full backup does not take one of an incremental, and one that was given up goes with the next backup of
// the volume.
func TestCheckpoints(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 1<<20, 1<<20)
	read := counter{new(atomic.Int64)}
	a, v, err := resumeWorld(smallSize, read)
	if err != nil {
		t.Fatal(err)
	}
	slow := Pace{Time: time.Hour} // none but the last
	checkpoint := func(id string) *repository.Checkpoint {
		t.Helper()
		all, err := w.repo.Checkpoints(t.Context(), repository.Filter{Volume: resumeVolume})
		if err != nil {
			t.Fatal(err)
		}
		for i, c := range all {
			if c.ID == id {
				return &all[i]
			}
		}
		return nil
	}

	ctx, cancel := context.WithCancel(t.Context())
	q := resumeRequest(w.repo, a, "first")
	q.Pace = slow
	interrupted := a
	interrupted.at, interrupted.do = smallSize/2, func() error { cancel(); return nil }
	q.Adapter = interrupted
	if _, err := Run(ctx, q); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	first := checkpoint(q.ID)
	if first == nil || first.Done < smallSize/2-3*repository.SegmentSize {
		t.Fatalf("%+v", first)
	}
	if all, err := w.repo.Backups(t.Context(), repositoryFilter); err != nil || len(all) > 0 {
		t.Fatalf("a checkpoint is listed as a backup: %+v, %v", all, err)
	}

	read.n.Store(0)
	interrupted.at, interrupted.do = smallSize/2, func() error { return fault.Errorf(fault.Unavailable, "the storage went away") }
	q.Adapter = interrupted
	if _, err := Run(t.Context(), q); fault.KindOf(err) != fault.Unavailable {
		t.Fatal(err)
	}
	if again := checkpoint(q.ID); again == nil || again.Done <= first.Done {
		t.Fatalf("%+v after %+v", again, first)
	}
	q.Adapter = a
	report, err := Run(t.Context(), q)
	if err != nil || report.BytesResumed <= first.Done {
		t.Fatalf("%+v, %v", report, err)
	}
	if err := sameAsSnapshot(t.Context(), w.repo, report.Backup, a, "first"); err != nil {
		t.Error(err)
	}

	// An incremental is interrupted; a full one of the same id starts from nothing, and replaces its checkpoint.
	read.n.Store(0)
	q = resumeRequest(w.repo, a, "second")
	q.Pace = slow
	ctx, cancel = context.WithCancel(t.Context())
	interrupted.at, interrupted.do = smallSize/2, func() error { cancel(); return nil }
	q.Adapter = interrupted
	if _, err := Run(ctx, q); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	if c := checkpoint(q.ID); c == nil || c.Kind != repository.Incremental || c.Base != resumeID+"-first" {
		t.Fatalf("%+v", c)
	}
	plan := q
	plan.Full = true
	if p, err := Prepare(t.Context(), plan); err != nil || p.Resume != nil || p.Kind != repository.Full || p.Unfinished == nil {
		t.Errorf("%+v, %v", p, err)
	}
	// Its base is deleted in the backend: it cannot be continued, and is right all the same.
	if err := a.DeleteSnapshot(t.Context(), adapters.SnapshotID{Volume: resumeVolume, Name: "first"}); err != nil {
		t.Fatal(err)
	}
	if p, err := Prepare(t.Context(), q); err != nil || p.Resume != nil || p.Kind != repository.Full {
		t.Errorf("%+v, %v", p, err)
	}
	// A newer snapshot is backed up meanwhile: the checkpoint is given up.
	if _, err := v.WriteAt([]byte("third"), 0); err != nil {
		t.Fatal(err)
	}
	s, err := a.CreateSnapshot(t.Context(), resumeVolume, "the-third")
	if err == nil {
		err = a.Publish(t.Context(), s.ID, adapters.Notes{})
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Run(t.Context(), resumeRequest(w.repo, a, "the-third")); err != nil {
		t.Fatal(err)
	}
	if c := checkpoint(q.ID); c != nil {
		t.Errorf("left: %+v", c)
	}
}

// A restore that is interrupted continues: what it wrote is neither read from the repository nor written again, and it
// can be given up.
func TestResumeRestore(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 1<<20, 1<<20)
	a, _, err := resumeWorld(smallSize, counter{new(atomic.Int64)})
	if err != nil {
		t.Fatal(err)
	}
	report, err := Run(t.Context(), resumeRequest(w.repo, a, "first"))
	if err != nil {
		t.Fatal(err)
	}
	q := RestoreRequest{Source: FromBackup(w.repo, backupID(t, report.Backup)), Volume: target("local/restored")}
	interrupt := func() {
		t.Helper()
		f, err := adapters.ParseFaults(fmt.Sprintf("WriteAt@%d=unavailable", smallSize/2))
		if err != nil {
			t.Fatal(err)
		}
		q.Target = f.Decorate(a)
		if r, err := Restore(t.Context(), q); fault.KindOf(err) != fault.Unavailable {
			t.Fatalf("%+v, %v", r, err)
		}
		q.Target = a
	}
	interrupt()
	r, err := Restore(t.Context(), q)
	if err != nil || r.BytesFound < smallSize/2-smallSize/10 || r.BytesFound+r.BytesWritten != smallSize {
		t.Errorf("%+v, %v", r, err)
	}
	second := q
	second.Overwrite = true
	if r, err = Restore(t.Context(), second); err != nil || r.BytesFound != smallSize || r.BytesWritten != 0 {
		t.Errorf("over itself: %+v, %v", r, err)
	}

	q.Volume = target("local/another")
	interrupt()
	q.GiveUp = true
	if _, err := Restore(t.Context(), q); err != nil {
		t.Error(err)
	}
	q.GiveUp = false
	if r, err := Restore(t.Context(), q); err != nil || r.BytesFound != 0 {
		t.Errorf("after it was given up: %+v, %v", r, err)
	}
}

func TestPace(t *testing.T) {
	const mib, s = 1 << 20, time.Second
	for _, c := range []struct {
		p           Pace
		read, last  int64
		since, cost time.Duration
		want        bool
	}{
		{Pace{}, 63 * mib, 0, time.Hour / 4, 0, false},
		{Pace{}, 64 * mib, 0, s, 0, true},
		{Pace{}, 64 * mib, 0, s / 2, 0, false},
		{Pace{}, 64 * mib, 0, 19 * s, s, false},
		{Pace{}, 64 * mib, 0, 20 * s, s, true},
		{Pace{}, 16 << 30, 15<<30 + 100*mib, 60 * s, 0, false},
		{Pace{}, 17 << 30, 16 << 30, 60 * s, 0, true},
		{Pace{}, 1, 0, paceMax, 0, true},
		{Pace{}, 1, 1, 2 * paceMax, 0, false},
		{Pace{Bytes: 1, Time: 1}, 2, 1, 1, time.Hour / 4, true},
	} {
		if got := c.p.due(c.read, c.last, c.since, c.cost); got != c.want {
			t.Errorf("%+v: %v", c, got)
		}
	}
}

// Backups that share a pool share its memory, and each gets its turn.
func TestPool(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 64<<10, 1<<20)
	pool := StorePool(Budget{Workers: 2}, w.repo)
	defer pool.Close()
	if pool.workers() != 2 {
		t.Fatalf("%d workers", pool.workers())
	}
	const volumes, jobs = 4, 200
	done := make([]atomic.Int64, volumes)
	var most atomic.Int64 // how far the first was ahead of the last when it ended
	finished := make(chan error)
	for i := range volumes {
		for range pool.workers() {
			go func() {
				for done[i].Add(1) <= jobs {
					b, err := pool.take(t.Context())
					if err != nil {
						finished <- err
						return
					}
					least := int64(jobs)
					for k := range done {
						least = min(least, done[k].Load())
					}
					most.Store(max(most.Load(), done[i].Load()-least))
					pool.give(b)
				}
				finished <- nil
			}()
		}
	}
	for range volumes * pool.workers() {
		if err := <-finished; err != nil {
			t.Error(err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for range pool.workers() {
		b, err := pool.take(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer pool.give(b)
	}
	if _, err := pool.take(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("waiting for a buffer: %v", err)
	}
}
