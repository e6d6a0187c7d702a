package backup

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"testing"
	"time"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/adapters/adaptertest"
	"stillpoint.io/stillpoint/adapters/mem"
	"stillpoint.io/stillpoint/agent/repository"
)

// The tree of the kill test is the same in every process: after n rounds it depends on n and the run only.
type killTree struct {
	adapter adapters.Adapter
	model   *adaptertest.TreeModel
	rng     *rand.Rand
	round   int
}

func newKillTree(run uint64) (*killTree, error) {
	store := new(mem.Store)
	v, err := store.CreateTree("tree")
	if err != nil {
		return nil, err
	}
	return &killTree{adapter: store.Adapter("mem"), model: adaptertest.NewTreeModel(liveGrove{v}), rng: rand.New(rand.NewPCG(run, 77))}, nil
}

// next changes the tree and cuts it.
func (k *killTree) next(ctx context.Context) (adapters.SnapshotID, error) {
	changes := 150
	if k.round > 0 {
		changes = 20
	}
	k.round++
	if err := k.model.Grow(k.rng, changes); err != nil {
		return adapters.SnapshotID{}, err
	}
	s, err := k.adapter.CreateSnapshot(ctx, adapters.VolumeID{Backend: "mem", ID: "local/tree"}, fmt.Sprintf("round-%d", k.round))
	if err != nil {
		return adapters.SnapshotID{}, err
	}
	return s.ID, k.adapter.Publish(ctx, s.ID, adapters.Notes{})
}

func killTreeID(run uint64, round int) string { return fmt.Sprintf("tree-%d-%d", run, round) }

// killedTreeChild makes backups of the tree until it is killed.
func killedTreeChild() error {
	ctx := context.Background()
	var run uint64
	if _, err := fmt.Sscan(os.Getenv("RUN"), &run); err != nil {
		return err
	}
	r, err := repository.Open(ctx, repository.Location{Path: os.Getenv("REPOSITORY")}, passphrase, repository.OpenOptions{Host: "test"})
	if err != nil {
		return err
	}
	k, err := newKillTree(run)
	if err != nil {
		return err
	}
	fmt.Println("open")
	for {
		s, err := k.next(ctx)
		if err != nil {
			return err
		}
		report, err := Run(ctx, Request{Adapter: k.adapter, Snapshot: s, Repository: r, ID: killTreeID(run, k.round), Pace: Pace{Bytes: 1, Time: 1}})
		if err != nil {
			return err
		}
		fmt.Println("made", report.Kind, report.Seconds)
	}
}

// Killed at any moment, the backup of a tree leaves a repository in which what is listed is right, what was reported is
// listed, and the next backup is right.
func TestTreeKilled(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 64<<10, 4096)
	const most = 4
	runs := kills(8)
	rng := rand.New(rand.NewPCG(uint64(time.Now().UnixNano()), 0))
	pace, seen := time.Hour, 0
	for run := range uint64(runs) {
		after := pace
		if run > 0 {
			after = time.Duration(rng.Int64N(int64(pace)))
		}
		started := time.Now()
		if run > 0 && run%killsEach == 0 {
			w.anew(64 << 10)
		}
		reported := killSomewhere(t, "kill-tree", w.at, run, after, most)
		if run == 0 {
			pace = time.Since(started)
		}
		w.sound()
		k, err := newKillTree(run)
		if err != nil {
			t.Fatal(err)
		}
		for round := 1; ; round++ {
			s, err := k.next(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			b, err := w.repo.Backup(t.Context(), killTreeID(run, round))
			if err == nil {
				seen++
				mustHold(t, w.repo, b.Handle.String(), k.model)
				continue
			}
			if round <= reported {
				t.Fatalf("%d backups were reported, the %d. is not there: %v", reported, round, err)
			}
			r, err := Run(t.Context(), Request{Adapter: k.adapter, Snapshot: s, Repository: w.repo, ID: killTreeID(run, round)})
			if err != nil {
				t.Fatal(err)
			}
			mustHold(t, w.repo, r.Backup, k.model)
			break
		}
	}
	if seen < most {
		t.Errorf("%d kills left %d backups", runs, seen)
	}
}
