package backup

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/adapters/adaptertest"
	"stillpoint.io/stillpoint/adapters/mem"
	"stillpoint.io/stillpoint/agent/repository"
)

// halfwayTree makes a tree whose snapshots are the same in every process, to the second: the first has all its files, and
// of the second half of them are others. Of all files no two are the same.
func halfwayTree(read counter, at int64, do func() error) (countedTrees, [2]*adaptertest.TreeModel, error) {
	var want [2]*adaptertest.TreeModel
	store := new(mem.Store)
	v, err := store.CreateTree("vol")
	if err != nil {
		return countedTrees{}, want, err
	}
	m := adaptertest.NewTreeModel(liveGrove{v})
	a := counted{Adapter: store.Adapter("mem")}
	for i, name := range []string{"first", "second"} {
		err := m.Apply(func(m *adaptertest.TreeModel) error { return halfwayChange(m, i) })
		if err != nil {
			return countedTrees{}, want, err
		}
		want[i] = m.Clone()
		s, err := a.CreateSnapshot(context.Background(), resumeVolume, name)
		if err == nil {
			err = a.Publish(context.Background(), s.ID, adapters.Notes{})
		}
		if err != nil {
			return countedTrees{}, want, err
		}
	}
	return countedTrees{a, read.n, at, do}, want, nil
}

// halfwayFile is the size of each file, in bytes: of whole blocks, as they are read, so that no read ends early, which
// countedTrees does not count on. halfwayTotal is what each round reads.
const (
	halfwayDirs, halfwayFiles = 20, 40
	halfwayFile               = 20 << 10
	halfwayStride             = 32 << 10 // bytes between checkpoints
)

var halfwayTotal = [2]int64{halfwayDirs * halfwayFiles * halfwayFile, halfwayDirs * halfwayFiles / 2 * halfwayFile}

func halfwayChange(m *adaptertest.TreeModel, round int) error {
	rng := rand.New(rand.NewPCG(uint64(round), 6))
	for d := range halfwayDirs {
		dir := fmt.Sprintf("dir-%02d", d)
		if round == 0 {
			if err := m.Mkdir(dir, rng); err != nil {
				return err
			}
		}
		for f := 0; f < halfwayFiles; f += 1 + round {
			if err := m.Write(fmt.Sprintf("%s/file-%02d", dir, f), random(rng, halfwayFile), 0, rng); err != nil {
				return err
			}
		}
	}
	return nil
}

// halfwayChild backs a tree up until it kills itself.
func halfwayChild() error {
	ctx := context.Background()
	read, err := newCounter(os.Getenv("COUNTER"))
	if err != nil {
		return err
	}
	var at int64
	if _, err := fmt.Sscan(os.Getenv("AT"), &at); err != nil {
		return err
	}
	a, _, err := halfwayTree(read, at, kill)
	if err != nil {
		return err
	}
	r, err := repository.Open(ctx, repository.Location{Path: os.Getenv("REPOSITORY")}, passphrase, repository.OpenOptions{Host: "test"})
	if err != nil {
		return err
	}
	fmt.Println("open")
	q := resumeRequest(r, a, os.Getenv("SNAPSHOT"))
	q.Pace.Bytes = halfwayStride
	_, err = Run(ctx, q)
	return fmt.Errorf("it was not killed: %w", err)
}

// A backup of a tree that is killed half-way continues: at most a tenth of the bytes is read twice, the tree is right, and
// no checkpoint is left. What the checkpoint refers to survives a maintenance.
func TestTreeKilledHalfway(t *testing.T) {
	t.Parallel()
	w := newKopiaWorld(t, 64<<10, 4096)
	for i, snapshot := range []string{"first", "second"} {
		total, path := halfwayTotal[i], t.TempDir()+"/counter"
		if c := runChild(t, "halfway", time.Hour, 0, "REPOSITORY="+w.at.Path, "COUNTER="+path, "SNAPSHOT="+snapshot, fmt.Sprint("AT=", total/2)); !c.killed {
			t.Fatal("the child was not killed")
		}
		newKopia(t, w.at).run("maintenance", "run", "--full", "--safety=none")
		read, err := newCounter(path)
		if err != nil {
			t.Fatal(err)
		}
		a, want, err := halfwayTree(read, 0, nil)
		if err != nil {
			t.Fatal(err)
		}
		r := openRepository(t, w.at)
		if left, err := r.Checkpoints(t.Context(), repository.Filter{}); err != nil || len(left) != 1 || left[0].Done == 0 {
			t.Fatalf("%+v, %v", left, err)
		}
		report, err := Run(t.Context(), resumeRequest(r, a, snapshot))
		if err != nil {
			t.Fatal(err)
		}
		twice := read.n.Load() - report.BytesAudited - total
		t.Logf("%s: killed at half of %d bytes, %d resumed, %d read twice (%.1f %%)", report.Kind, total, report.BytesResumed, twice, 100*float64(twice)/float64(total))
		if report.Kind != []repository.Kind{repository.Full, repository.Incremental}[i] || report.BytesResumed == 0 || twice < 0 || twice > total/10 {
			t.Errorf("%+v", report)
		}
		mustHold(t, r, report.Backup, want[i])
		if left, err := r.Checkpoints(t.Context(), repository.Filter{}); err != nil || len(left) > 0 {
			t.Errorf("left: %+v, %v", left, err)
		}
	}
}

// A checkpoint of a tree is of no use for another snapshot, a full backup takes none of an incremental, and one that was
// given up goes with the next backup of the volume.
func TestTreeCheckpointGivenUp(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 64<<10, 4096)
	a, want, err := halfwayTree(counter{new(atomic.Int64)}, 0, nil)
	if err != nil {
		t.Fatal(err)
	}
	interrupt := func(snapshot string, at int64) {
		t.Helper()
		ctx, cancel := context.WithCancel(t.Context())
		q := resumeRequest(w.repo, countedTrees{a.Adapter, new(atomic.Int64), at, func() error { cancel(); return nil }}, snapshot)
		q.Pace = Pace{Time: time.Hour} // none but the last
		if _, err := Run(ctx, q); !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
		left, err := w.repo.Checkpoints(t.Context(), repository.Filter{})
		if err != nil || len(left) != 1 || left[0].ID != q.ID || left[0].Done == 0 {
			t.Fatalf("%+v, %v", left, err)
		}
	}
	finish := func(snapshot string, want *adaptertest.TreeModel) {
		t.Helper()
		report, err := Run(t.Context(), resumeRequest(w.repo, a, snapshot))
		if err != nil || report.BytesResumed != 0 {
			t.Fatalf("%+v, %v", report, err)
		}
		mustHold(t, w.repo, report.Backup, want)
		if left, err := w.repo.Checkpoints(t.Context(), repository.Filter{}); err != nil || len(left) > 0 {
			t.Errorf("left: %+v, %v", left, err)
		}
	}
	interrupt("first", halfwayTotal[0]/2)
	if all, err := w.repo.Backups(t.Context(), repositoryFilter); err != nil || len(all) > 0 {
		t.Fatalf("a checkpoint is listed as a backup: %+v, %v", all, err)
	}
	finish("second", want[1])

	// One of an older snapshot, made afterwards, is given up as well; and a full backup begins anew.
	interrupt("first", halfwayTotal[0]/2)
	q := resumeRequest(w.repo, a, "first")
	if p, err := Prepare(t.Context(), q); err != nil || p.Resume == nil {
		t.Errorf("%+v, %v", p, err)
	}
	if err := w.repo.GiveUp(t.Context(), q.ID); err != nil {
		t.Fatal(err)
	}
	finish("first", want[0])
}
