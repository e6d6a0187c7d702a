package backup

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"strings"
	"testing"
	"time"

	"stillpoint.io/stillpoint/agent/repository"
	"stillpoint.io/stillpoint/fault"
)

// What several backups share is read once, and every one of them is recorded as verified; those that were verified lately
// can be left out.
func TestVerifyAllReadsOnce(t *testing.T) {
	t.Parallel()
	w := newSick(t)
	var data, read int64
	reports := map[string]VerifyReport{}
	s, err := VerifyAll(t.Context(), VerifyRequest{Repository: w.repo, All: true, Each: func(r VerifyReport) {
		reports[r.Backup] = r
		data += r.BytesVerified
		read += r.BytesRead
	}})
	if err != nil || s.Backups != 3 || len(s.Rot) > 0 || len(reports) != 3 {
		t.Fatalf("%+v, %v", s, err)
	}
	distinct := int64(len(w.all("chunk"))) * (64 << 10)
	if read > distinct || read < distinct-(2<<16) || data < 3*(4<<20) {
		t.Errorf("read %d for %d in %d backups, there are %d", read, data, len(reports), distinct)
	}
	all, err := w.repo.Backups(t.Context(), repositoryFilter)
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range all {
		if time.Since(b.Verified) > time.Minute {
			t.Errorf("%s: verified %v", b.Handle, b.Verified)
		}
	}
	if err := w.repo.MarkVerified(t.Context(), backupID(t, w.handles[1]), time.Now().Add(-48*time.Hour)); err != nil {
		t.Fatal(err)
	}
	var again []string
	s, err = VerifyAll(t.Context(), VerifyRequest{Repository: w.repo, All: true, OlderThan: 24 * time.Hour, Each: func(r VerifyReport) { again = append(again, r.Backup) }})
	if err != nil || s.Backups != 1 || again[0] != w.handles[1] {
		t.Errorf("%+v of %v, %v", s, again, err)
	}
}

// A quick verification reads no data: it does not see a flipped byte, and sees that a blob is missing or too short.
func TestVerifyQuick(t *testing.T) {
	t.Parallel()
	w := newSick(t)
	quick := func() (map[string]int, error) {
		w.reopen()
		faults := map[string]int{}
		_, err := VerifyAll(t.Context(), VerifyRequest{Repository: w.repo, All: true, Quick: true, Each: func(r VerifyReport) { faults[r.Backup] = r.Faults }})
		return faults, err
	}
	if f, err := quick(); err != nil || len(f) != 3 {
		t.Fatalf("%v, %v", f, err)
	}
	all, err := w.repo.Backups(t.Context(), repositoryFilter)
	if err != nil || !all[0].Verified.IsZero() {
		t.Errorf("a quick verification counts as one: %+v, %v", all[0].Standing, err)
	}
	chunk := w.only("chunk")[0]
	w.spoil(chunk)
	if f, err := quick(); err != nil {
		t.Errorf("it has read data: %v, %v", f, err)
	}
	pack, off, _, err := w.repo.Where(t.Context(), chunk)
	if err != nil {
		t.Fatal(err)
	}
	path := w.path(pack)
	if err := os.Truncate(path, off+1); err != nil {
		t.Fatal(err)
	}
	f, err := quick()
	if fault.KindOf(err) != fault.Corrupt || f[w.handles[2]] == 0 || !strings.Contains(err.Error(), pack) {
		t.Errorf("cut short: %v, %v", f, err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	f, err = quick()
	if fault.KindOf(err) != fault.Corrupt || f[w.handles[2]] == 0 || f[w.handles[0]] != 0 || !strings.Contains(err.Error(), "missing") {
		t.Errorf("gone: %v, %v", f, err)
	}
}

// Compared with a snapshot, a backup differs where the snapshot does, and the words say which side is which.
func TestVerifyAgainst(t *testing.T) {
	t.Parallel()
	w := newSick(t)
	against := func(backup, snapshot int) (AgainstReport, error) {
		return VerifyAgainst(t.Context(), AgainstRequest{Repository: w.repo, ID: backupID(t, w.handles[backup]), Adapter: w.adapter, Snapshot: w.snapshots[snapshot]})
	}
	if r, err := against(1, 1); err != nil || !r.Same || r.BytesCompared != 70<<20+12345 || r.BytesVerified == 0 || len(r.Differences) > 0 {
		t.Errorf("%+v, %v", r, err)
	}
	r, err := against(0, 1)
	if fault.KindOf(err) != fault.Corrupt || r.Same || r.BytesDiffer == 0 || r.BytesDiffer%(64<<10) != 0 || r.BytesBad != 0 {
		t.Errorf("%+v, %v", r, err)
	}
	for off := int64(0); off < w.wants[0].size; off += 64 << 10 {
		end := min(off+64<<10, w.wants[0].size)
		differs := !bytes.Equal(w.wants[0].read(off, end-off), w.wants[1].read(off, end-off))
		named := strings.Contains(strings.Join(r.Differences, "\n"), " at "+fmt.Sprint(off)+": the backup has content ")
		if differs != named {
			t.Errorf("at %d: differs %v, named %v", off, differs, named)
		}
	}
	w.zero(1<<20, 64<<10)
	w.resize(70<<20 + 99)
	s, _ := w.cut()
	w.snapshots = append(w.snapshots, s)
	r, err = against(2, 3)
	if words := strings.Join(r.Differences, "\n"); fault.KindOf(err) != fault.Corrupt || !strings.Contains(words, "at 1048576: the backup has content") ||
		!strings.Contains(words, "the snapshot zeros") || !strings.Contains(words, "the snapshot 73400419") {
		t.Errorf("%+v, %v", r, err)
	}
}

// A content that rots and that no backup refers to any more is found too, and after a repair the next backup of the same
// bytes does not rely on it.
func TestRotNobodyReads(t *testing.T) {
	t.Parallel()
	w := newSick(t)
	chunk := w.only("chunk")[0]
	w.spoil(chunk)
	if err := w.repo.Forget(t.Context(), backupID(t, w.handles[2])); err != nil {
		t.Fatal(err)
	}
	w.reopen()
	s, err := VerifyAll(t.Context(), VerifyRequest{Repository: w.repo, All: true})
	if fault.KindOf(err) != fault.Corrupt || len(s.Damaged) > 0 || len(s.Rot) != 1 || !strings.Contains(s.Rot[0], chunk) {
		t.Fatalf("%+v, %v", s, err)
	}
	before := w.files()
	if r, err := w.repair(true); err != nil || len(r.Dropped) != 1 || !maps.Equal(before, w.files()) {
		t.Errorf("planned: %s, %v", short(r), err)
	}
	if r, err := w.repair(false); err != nil || len(r.Dropped) != 1 || len(r.Hurt) > 0 {
		t.Errorf("%s, %v", short(r), err)
	}
	w.reopen()
	q := w.request(w.snapshots[2])
	q.ID = "again"
	again, err := Run(t.Context(), q)
	if err != nil {
		t.Fatal(err)
	}
	w.handles[2] = again.Backup
	if _, err := VerifyAll(t.Context(), VerifyRequest{Repository: w.repo, All: true}); err != nil {
		t.Error(err)
	}
	w.whole()
}

// Checking allocates nothing of a chunk's size.
func TestVerifyAllocations(t *testing.T) {
	if raceDetector {
		return // the detector's own allocations would be counted
	}
	w := newWorld(t, 64<<10, 64<<20)
	w.write(random(rand.New(rand.NewPCG(1, 1)), 64<<20), 0)
	s, _ := w.cut()
	id := backupID(t, w.backup(s).Backup)
	b, err := w.repo.Backup(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	m, err := w.repo.OpenMedium(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close(context.Background())
	image, err := m.OpenImage(t.Context(), b)
	if err != nil {
		t.Fatal(err)
	}
	chunks, err := image.Chunks(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	in := m.NewReader(make([]byte, m.Repository().ReadBuffer()))
	needs := []repository.Need{}
	for _, c := range chunks {
		needs = append(needs, repository.Need{Chunk: c, Length: 64 << 10})
	}
	check := func() {
		if err := in.Read(t.Context(), needs, func(c repository.Chunk, err error) { t.Errorf("%s: %v", c, err) }); err != nil {
			t.Fatal(err)
		}
	}
	r := testing.Benchmark(func(b *testing.B) {
		b.SetBytes(64 << 20)
		for b.Loop() {
			check()
		}
	})
	perChunk := r.AllocedBytesPerOp() / int64(len(needs))
	t.Logf("%s, %d bytes and %d allocations for a chunk", r, perChunk, r.AllocsPerOp()/int64(len(needs)))
	if perChunk > 16<<10 {
		t.Errorf("%d bytes are allocated for each chunk of 64 KiB", perChunk)
	}
}
