package repository

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/kopia/kopia/repo/content"
	"github.com/kopia/kopia/repo/content/index"
	"github.com/kopia/kopia/repo/manifest"

	"stillpoint.io/stillpoint/fault"
)

// manifestContents counts the pieces that manifests are in, as r sees them without looking at the medium again.
func manifestContents(t *testing.T, r *Repository) (n int) {
	t.Helper()
	err := r.kopia.ContentReader().IterateContents(t.Context(), content.IterateOptions{Range: index.PrefixRange(manifest.ContentPrefix)}, func(content.Info) error {
		n++
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// Two processes compact manifests, one of which has not seen that a backup was forgotten. Kopia's repository has the
// manifest again then; Stillpoint does not list the backup, and the next maintenance deletes it once more.
func TestForgottenStaysForgotten(t *testing.T) {
	t.Parallel()
	a := newAged(t)
	d := &disk{name: "v", chunks: []uint64{1, 2, 3}}
	kept := a.backup(d, "kept")
	a.backup(d, "doomed")
	for n := 0; manifestContents(t, a.repo) < 15; n++ { // at 16, who reads them compacts them
		if err := a.repo.PutRecord(t.Context(), verifiedRecord, "kept", verification{time.Unix(int64(n), 0)}); err != nil {
			t.Fatal(err)
		}
	}
	unaware := mustOpen(t, a.at, OpenOptions{})
	raw := func(r *Repository) (ids []string) {
		t.Helper()
		all, err := r.loadSnapshots(t.Context(), r.kopia)
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range all {
			ids = append(ids, s.name())
		}
		return ids
	}
	if ids := raw(unaware); len(ids) != 2 {
		t.Fatalf("at first: %v", ids)
	}
	a.pass(time.Second)
	a.forget("doomed")
	if ids := raw(a.repo); len(ids) != 1 || manifestContents(t, a.repo) > 2 {
		t.Fatalf("the first did not compact: %v in %d", ids, manifestContents(t, a.repo))
	}
	if err := unaware.PutRecord(t.Context(), verifiedRecord, "kept", verification{time.Unix(99, 0)}); err != nil {
		t.Fatal(err)
	}
	if ids := raw(unaware); len(ids) != 2 || manifestContents(t, unaware) > 2 {
		t.Fatalf("the second did not compact: %v in %d", ids, manifestContents(t, unaware))
	}

	a.pass(time.Second)
	if ids := raw(a.repo); len(ids) != 2 {
		t.Fatalf("kopia does not bring it back any more: %v; the records of what was forgotten may go", ids)
	}
	a.check()
	if _, err := a.repo.Backup(t.Context(), "doomed"); fault.KindOf(err) != fault.NotFound {
		t.Errorf("the forgotten backup: %v", err)
	}
	if err := a.repo.Forget(t.Context(), "doomed"); fault.KindOf(err) != fault.NotFound {
		t.Errorf("forgetting it again: %v", err)
	}
	if b, err := a.repo.Backup(t.Context(), "kept"); err != nil || b.manifest != kept.manifest || b.Verified.Unix() != 99 {
		t.Errorf("the other: %+v, %v", b, err)
	}
	a.backup(d, "doomed") // its id is free
	a.maintain(MaintainOptions{})
	a.pass(time.Second)
	if ids := strings.Join(raw(a.repo), ", "); ids != "backup kept, backup doomed" && ids != "backup doomed, backup kept" {
		t.Errorf("after a maintenance: %s", ids)
	}
	a.check()

	records := func() int {
		found, err := a.repo.kopia.FindManifests(t.Context(), forgottenRecord.labels(""))
		if err != nil {
			t.Fatal(err)
		}
		return len(found)
	}
	if n := records(); n != 1 {
		t.Errorf("%d records", n)
	}
	a.pass(forgottenFor + day)
	a.maintain(MaintainOptions{})
	a.pass(time.Second)
	if n := records(); n != 0 {
		t.Errorf("%d records after their time", n)
	}
	a.check()
}

// What was learnt about a backup goes with it: another of its id begins with nothing.
func TestForgetTakesRecords(t *testing.T) {
	t.Parallel()
	r := mustOpen(t, mustInit(t, MinChunkSize), OpenOptions{})
	d := &disk{name: "v", chunks: []uint64{1}}
	var ids []string
	for n := range 3 {
		id := fmt.Sprint("b", n)
		if _, err := d.backup(t.Context(), r, id, time.Now()); err != nil {
			t.Fatal(err)
		}
		if err := r.MarkSuspect(t.Context(), id, "it lied"); err != nil {
			t.Fatal(err)
		}
		if err := r.MarkVerified(t.Context(), id, time.Now()); err != nil {
			t.Fatal(err)
		}
		ids = append(ids, id)
	}
	if err := r.Forget(t.Context(), "b0", "none"); fault.KindOf(err) != fault.NotFound || !strings.Contains(fmt.Sprint(err), "none") {
		t.Errorf("one that is not there: %v", err)
	}
	if all, err := r.Backups(t.Context(), Filter{}); err != nil || len(all) != 3 {
		t.Errorf("%d backups after a refusal: %v", len(all), err)
	}
	if err := r.Forget(t.Context(), ids[:2]...); err != nil {
		t.Fatal(err)
	}
	if _, err := d.backup(t.Context(), r, "b0", time.Now()); err != nil {
		t.Fatal(err)
	}
	all, err := r.Backups(t.Context(), Filter{})
	if err != nil || len(all) != 2 {
		t.Fatalf("%d backups: %v", len(all), err)
	}
	for _, b := range all {
		if anew := b.ID == "b0"; (b.Suspect == "") != anew || b.Verified.IsZero() != anew {
			t.Errorf("%s: %+v", b.ID, b.Standing)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := r.Forget(ctx, "b2"); err == nil {
		t.Error("forgot although it was cancelled")
	}
}

// What was learnt about a volume goes with its last backup, and not before; another volume's stays.
func TestForgetTakesWhatIsKnownOfVolumes(t *testing.T) {
	t.Parallel()
	r := mustOpen(t, mustInit(t, MinChunkSize), OpenOptions{})
	keys := map[string]string{} // by the disk's name
	for _, name := range []string{"v", "w"} {
		d := &disk{name: name, chunks: []uint64{1}}
		for n := range 3 {
			b, err := d.backup(t.Context(), r, fmt.Sprint(name, n), time.Now())
			if err != nil {
				t.Fatal(err)
			}
			keys[name] = b.Volume.String()
		}
		if err := r.PutRecord(t.Context(), AuditedRecord, keys[name], 1); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		forget []string
		left   []string
	}{
		{[]string{"v0"}, []string{"v", "w"}},
		{[]string{"v1", "w0"}, []string{"v", "w"}},
		{[]string{"w1", "v2"}, []string{"w"}},
		{[]string{"w2"}, nil},
	} {
		if err := r.Forget(t.Context(), c.forget...); err != nil {
			t.Fatal(err)
		}
		got, err := Records[int](t.Context(), r, AuditedRecord)
		if err != nil || len(got) != len(c.left) {
			t.Errorf("after %v: %v, %v", c.forget, got, err)
		}
		for _, name := range c.left {
			if got[keys[name]] != 1 {
				t.Errorf("after %v: %v", c.forget, got)
			}
		}
	}
}
