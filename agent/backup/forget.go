package backup

import (
	"context"
	"slices"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/repository"
	"stillpoint.io/stillpoint/fault"
)

// OpenBackend gives the adapter of a backend by its name.
type OpenBackend func(ctx context.Context, name string) (adapters.Adapter, error)

// Judge applies a policy to what is in a repository.
func Judge(ctx context.Context, r *repository.Repository, f repository.Filter, p Policy, open OpenBackend) ([]Verdict, error) {
	if err := p.Check(); err != nil {
		return nil, err
	}
	backups, err := r.Backups(ctx, f)
	if err != nil {
		return nil, err
	}
	present, err := AskPresent(ctx, backups, open)
	if err != nil {
		return nil, err
	}
	return p.Apply(backups, Bases(backups, present))
}

// CheckForget is Busy if one of the backups is the base of its volume: see Bases. NotFound if there is no such backup.
func CheckForget(ctx context.Context, r *repository.Repository, ids []string, open OpenBackend) error {
	all, err := r.Backups(ctx, repository.Filter{})
	if err != nil {
		return err
	}
	concerned := map[adapters.VolumeID]bool{}
	for _, id := range ids {
		i := slices.IndexFunc(all, func(b repository.Backup) bool { return b.ID == id })
		if i < 0 {
			_, err := r.Backup(ctx, id) // says it in its words
			return err
		}
		concerned[all[i].Volume] = true
	}
	all = slices.DeleteFunc(all, func(b repository.Backup) bool { return !concerned[b.Volume] })
	present, err := AskPresent(ctx, all, open)
	if err != nil {
		return err
	}
	bases := Bases(all, present)
	for _, id := range ids {
		if why, ok := bases[id]; ok {
			return fault.Errorf(fault.Busy, "backup %s is %s; nothing was forgotten, --force forgets it all the same", repository.Handle{Remote: r.Remote(), ID: id}, why)
		}
	}
	return nil
}

// Forget forgets backups in their order, and says which are forgotten after every few. Killed or failed, those are that
// it said, at most repository.ForgetAtOnce more, and the repository is as good as before.
func Forget(ctx context.Context, r *repository.Repository, ids []string, said func(ids []string) error) error {
	for batch := range slices.Chunk(ids, repository.ForgetAtOnce) {
		if err := r.Forget(ctx, batch...); err != nil {
			return err
		}
		if err := said(batch); err != nil {
			return err
		}
	}
	return nil
}
