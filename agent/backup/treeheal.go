package backup

import (
	"context"
	"errors"
	"fmt"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/repository"
	"stillpoint.io/stillpoint/fault"
)

// tree stores again what a tree has lost, from the snapshot that it was made of: all of that is walked and read, as for a
// full backup, and the writer stores anew what is known to be damaged. Everything has the name that it had. Another snapshot
// is not taken: what differs in it would be stored for nobody. A backup is walked once however much of it is hurt.
func (h *healing) tree(ctx context.Context, b repository.Backup) (ok bool, why string, err error) {
	if h.to == nil {
		return false, "a dry run does not read the snapshots of trees", nil
	}
	if why, done := h.trees[b.ID]; done {
		return why == "", why, nil
	}
	renewed, err := h.regrow(ctx, b)
	h.count += renewed
	switch {
	case ctx.Err() != nil:
		return false, "", ctx.Err()
	case err != nil:
		why = fmt.Sprintf("snapshot %s: %v", b.Snapshot, err)
	case renewed == 0:
		why = fmt.Sprintf("snapshot %s does not have what was there", b.Snapshot)
	}
	h.trees[b.ID] = why
	return why == "", why, nil
}

// regrow walks the snapshot of a backup, and returns how many contents were stored anew.
func (h *healing) regrow(ctx context.Context, b repository.Backup) (renewed int64, err error) {
	a, err := h.sources.adapter(ctx, b.Volume.Backend)
	if err != nil {
		return 0, err
	}
	found, err := a.Snapshot(ctx, b.Snapshot)
	if err != nil {
		return 0, err
	}
	trees, ok := adapters.As[adapters.Trees](a)
	if !ok || !isOf(b, found) {
		return 0, fault.Errorf(fault.Unsupported, "it is not what was backed up, or backend %s cannot open trees", b.Volume.Backend)
	}
	source, err := trees.OpenTree(ctx, found.ID, nil)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, source.Close()) }()
	pool := readPool(h.budget, h.r)
	defer pool.Close()
	w, err := h.r.NewWriter(ctx)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, w.Close(context.WithoutCancel(ctx))) }()
	g := &grower{
		r: h.r, w: w, source: source, chunk: h.r.ChunkSize(), pool: pool, progress: new(Progress),
		spare: make(chan struct{}, pool.workers()-1), links: map[uint64]*linked{},
	}
	if _, err := g.root(ctx); err != nil {
		return 0, err
	}
	return w.Renewed(), w.Flush(ctx)
}
