package backup

import (
	"context"
	"fmt"
	"math/rand/v2"
	"testing"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/adapters/adaptertest"
	"stillpoint.io/stillpoint/adapters/mem"
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

func (k *killTree) from() adapters.Adapter { return k.adapter }

func (k *killTree) holds(w *world, handle string) { mustHold(w.t, w.repo, handle, k.model) }

// So it is with the backup of a tree.
func TestTreeKilled(t *testing.T) {
	t.Parallel()
	killBackups(t, newWorld(t, killChunk, 4096), "kill-tree")
}
