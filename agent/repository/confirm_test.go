package repository

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/kopia/kopia/repo"
	"github.com/kopia/kopia/repo/content/indexblob"

	"stillpoint.io/stillpoint/fault"
)

// vanish drops everything from the index that is marked as deleted, as a maintenance does in time.
func (a *aged) vanish() {
	a.t.Helper()
	err := repo.DirectWriteSession(a.t.Context(), a.repo.kopia, repo.WriteSessionOptions{}, func(ctx context.Context, w repo.DirectRepositoryWriter) error {
		_, err := w.ContentManager().CompactIndexes(ctx, indexblob.CompactOptions{DropDeletedBefore: w.Time().Add(time.Second)})
		return err
	})
	if err != nil {
		a.t.Fatal(err)
	}
}

// again begins a backup that reuses all of the base's segments.
func again(t *testing.T, r *Repository, base Backup) (*Writer, *Index) {
	t.Helper()
	w, err := r.NewWriter(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.Close(context.Background()); err != nil {
			t.Error(err)
		}
	})
	image, err := r.OpenImage(t.Context(), base)
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
	return w, x
}

func commitAgain(t *testing.T, w *Writer, x *Index, d *disk, base Backup) (Backup, error) {
	t.Helper()
	b := d.describe(w.r, "again", time.Now())
	b.Kind, b.Base, b.BaseImage = Incremental, base.ID, base.Image
	var err error
	if b.Image, err = x.Finish(t.Context()); err != nil {
		t.Fatal(err)
	}
	return w.Commit(t.Context(), b, readsBack())
}

// The ways in which a backup can take too long, or not begin by itself.
var late = map[string]func(*Writer){
	"by the clock":       func(w *Writer) { w.began.wall = w.began.wall.Add(-safeSession) },
	"the clock set back": func(w *Writer) { w.began.wall = w.began.wall.Add(safeSession + time.Hour) },
	"asleep":             func(w *Writer) { w.began.boot -= safeSession },
	"resumed":            func(w *Writer) { w.Resume(Checkpoint{}) },
}

// A backup that took too long, and whose contents a maintenance dropped meanwhile, is not committed; neither is one whose
// contents are in the index and not on the medium.
func TestLateBackupIsNotWrong(t *testing.T) {
	t.Parallel()
	d := &disk{name: "v", chunks: make([]uint64, 1100), random: true}
	for i := range 20 {
		d.chunks[i*50] = uint64(i + 1)
	}
	for name, delay := range late {
		t.Run(name, func(t *testing.T) {
			a := newAged(t)
			base := a.backup(d, "base")
			a.backup(&disk{name: "w", chunks: []uint64{77}}, "other")
			a.pass(day)
			w, x := again(t, a.repo, base)
			delay(w)
			a.forget("base")
			a.maintain(MaintainOptions{Full: true})
			a.vanish()
			if b, err := commitAgain(t, w, x, d, base); fault.KindOf(err) != fault.Unavailable || !strings.Contains(fmt.Sprint(err), "back up again") {
				t.Errorf("dropped from the index: %+v, %v", b, err)
			}
			a.check()

			w, x = again(t, a.repo, a.backup(d, "whole"))
			delay(w)
			if b, err := commitAgain(t, w, x, d, base); err != nil {
				t.Errorf("everything there: %v", err)
			} else if err := d.check(t.Context(), a.repo, b); err != nil {
				t.Error(err)
			}
			a.forget("again")
			w, x = again(t, a.repo, base)
			delay(w)
			packs, err := filepath.Glob(filepath.Join(a.at.Path, "p", "*", "*.f"))
			if err != nil || len(packs) == 0 {
				t.Fatal(packs, err)
			}
			for _, p := range packs {
				if err := os.Rename(p, p+".hidden"); err != nil {
					t.Fatal(err)
				}
			}
			if b, err := commitAgain(t, w, x, d, base); fault.KindOf(err) != fault.Unavailable {
				t.Errorf("gone from the medium: %+v, %v", b, err)
			}
			for _, p := range packs {
				if err := os.Rename(p+".hidden", p); err != nil {
					t.Fatal(err)
				}
			}
			a.check()
		})
	}
}

// A backup that took too long, and whose contents are marked as deleted, stores them anew: a maintenance that listed the
// backups before it was committed may drop what is marked.
func TestLateBackupOutlivesMarks(t *testing.T) {
	t.Parallel()
	a := newAged(t)
	d := &disk{name: "v", chunks: make([]uint64, 1100), random: true}
	for i := range 20 {
		d.chunks[i*50] = uint64(i + 1)
	}
	base := a.backup(d, "base")
	a.pass(day)
	w, x := again(t, a.repo, base)
	w.began.wall = w.began.wall.Add(-safeSession)
	a.forget("base")
	a.maintain(MaintainOptions{Full: true})
	b, err := commitAgain(t, w, x, d, base)
	if err != nil {
		t.Fatal(err)
	}
	a.has["again"] = d.clone()
	a.pass(time.Minute)
	a.vanish()
	a.check()

	image, err := a.repo.OpenImage(t.Context(), b)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.repo.kopia.ContentInfo(t.Context(), image.segments[0]); err != nil {
		t.Error(err)
	}
}

// A checkpoint that was written too late goes when it proves to be worthless, so that the next run begins anew.
func TestWorthlessCheckpointGoes(t *testing.T) {
	t.Parallel()
	a := newAged(t)
	d := &disk{name: "v", chunks: make([]uint64, 1100), random: true}
	d.chunks[3], d.chunks[1050] = 1, 2
	base := a.backup(d, "base")
	a.pass(day)
	w, x := again(t, a.repo, base)
	a.forget("base")
	a.maintain(MaintainOptions{Full: true})
	a.vanish()
	unfinished := d.describe(w.r, "again", time.Now())
	if err := w.Checkpoint(t.Context(), unfinished, x.Part(), nil); err != nil {
		t.Fatal(err)
	}
	found, err := a.repo.Checkpoints(t.Context(), Filter{})
	if err != nil || len(found) != 1 {
		t.Fatalf("%+v, %v", found, err)
	}
	next, err := a.repo.NewWriter(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer next.Close(t.Context())
	next.Resume(found[0])
	x.w = next
	if b, err := commitAgain(t, next, x, d, base); fault.KindOf(err) != fault.Unavailable {
		t.Errorf("%+v, %v", b, err)
	}
	a.pass(0)
	if found, err := a.repo.Checkpoints(t.Context(), Filter{}); err != nil || len(found) != 0 {
		t.Errorf("left: %+v, %v", found, err)
	}
	a.check()
}

// readsBack is a check of a commit that reads chunks.
func readsBack(offsets ...int64) func(context.Context, *Image) error {
	return func(ctx context.Context, back *Image) error {
		p := make([]byte, back.r.ChunkSize())
		for _, off := range offsets {
			if _, err := back.ReadAt(ctx, p, off); err != nil {
				return err
			}
		}
		return nil
	}
}
