package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/backup"
	"stillpoint.io/stillpoint/agent/cut"
	"stillpoint.io/stillpoint/agent/repository"
	"stillpoint.io/stillpoint/fault"
)

// The cuts that the command backup makes by itself are named by their time, to the millisecond, and the remote they are
// for. A snapshot with such a name is deleted once a newer backup in that remote has taken its place as the base of the
// next increment.
const ownCutLayout = "backup-20060102t150405.000" // with a dash for the dot

func ownCut(at time.Time, remote string) string {
	name := strings.Replace(at.UTC().Format(ownCutLayout), ".", "-", 1)
	if remote != defaultRemote {
		name += "-" + remote
	}
	return name
}

// isOwnCut judges by the name that was wanted for a snapshot.
func isOwnCut(wanted, remote string) bool {
	if len(wanted) < len(ownCutLayout) {
		return false
	}
	second := strings.Index(ownCutLayout, ".")
	at, err := time.Parse(ownCutLayout, wanted[:second]+"."+wanted[second+1:len(ownCutLayout)])
	return err == nil && wanted == ownCut(at, remote)
}

// backupFlags are those of the command backup.
type backupFlags struct {
	cut      cutFlags
	budget   budgetFlags
	progress progressFlags
	remote   string
	full     bool
}

func (a *app) backupCommand() *cobra.Command {
	var f backupFlags
	c := &cobra.Command{
		Use:   "backup (HANDLE... | VOLUME... | --all)",
		Short: "Back snapshots up, incrementally where the last backup's snapshot still exists",
		Long: `Back snapshots up into a remote. With volumes instead of snapshots, or with --all, one cut over all of them is made
first. The snapshot of such a cut stays as the base of the next increment and is deleted when that has succeeded;
snapshots that you made stay until you delete them. The backup's handle is printed when the backup is complete: its
manifest and a sample of its data have been read back.

A backup that was interrupted or killed is continued when its snapshot is named again. With volumes, what an earlier
run of this command left unfinished is finished first: the new cut needs only what has changed since then. Ctrl-C and
SIGTERM end with a checkpoint; a second one ends at once.`,
		Args: arguments(0, -1, "snapshots or volumes"),
		RunE: func(c *cobra.Command, args []string) error {
			cuts, err := wantsCut(args, f.cut.all)
			if err != nil {
				return err
			}
			if _, err := f.budget.budget(1); err != nil {
				return err
			}
			r, err := a.openRepository(c.Context(), f.remote, f.budget.open()) // before anything is frozen for it
			if err != nil {
				return err
			}
			m, err := a.meter(c.Context(), f.progress)
			if err == nil {
				if err = a.backup(c.Context(), r, m, args, cuts, f); c.Context().Err() == nil {
					err = errors.Join(err, m.remote(c.Context(), r))
				}
				err = errors.Join(err, m.Close())
			}
			return errors.Join(err, closeRepository(c.Context(), r))
		},
	}
	f.cut.register(c)
	f.budget.registerBackup(c)
	f.progress.register(c)
	remoteFlag(c, &f.remote)
	c.Flags().BoolVar(&f.full, "full", false, "reuse nothing: read everything that is allocated")
	return a.jsonFlag(c)
}

func remoteFlag(c *cobra.Command, remote *string) {
	c.Flags().StringVar(remote, "remote", defaultRemote, "the remote's `name`")
}

// closeRepository closes even when the context is over.
func closeRepository(ctx context.Context, r *repository.Repository) error {
	return r.Close(context.WithoutCancel(ctx))
}

// wantsCut tells whether volumes were named, over which a cut is to be made, or snapshots.
func wantsCut(args []string, all bool) (bool, error) {
	snapshots := 0
	for _, s := range args {
		h, err := adapters.ParseHandle(s)
		if err != nil {
			return false, err
		}
		if h.IsSnapshot() {
			snapshots++
		}
	}
	if snapshots > 0 && (all || snapshots < len(args)) {
		return false, fault.Errorf(fault.Invalid, "name snapshots or volumes, not both: a cut is made over the volumes")
	}
	return snapshots == 0, nil
}

func (a *app) backup(ctx context.Context, r *repository.Repository, m *meter, args []string, cuts bool, f backupFlags) error {
	if !cuts {
		return a.backupAll(ctx, r, m, args, false, f)
	}
	volumes, err := a.volumes(ctx, args, f.cut.all)
	if err != nil {
		return err
	}
	unfinished, err := a.unfinished(ctx, r, volumes)
	if err == nil && len(unfinished) > 0 {
		err = a.backupAll(ctx, r, m, unfinished, true, f)
	}
	if err != nil {
		return fmt.Errorf("finishing what was interrupted: %w", err)
	}
	snapshots, err := a.cutForBackup(ctx, volumes, f)
	if err != nil {
		return err
	}
	return a.backupAll(ctx, r, m, snapshots, true, f)
}

// unfinished finds the snapshots of own cuts whose backup has a checkpoint.
func (a *app) unfinished(ctx context.Context, r *repository.Repository, volumes []cut.Volume) (handles []string, err error) {
	for _, v := range volumes {
		found, err := v.Adapter.Volume(ctx, v.ID)
		if err != nil {
			return nil, err
		}
		left, err := r.Checkpoints(ctx, repository.Filter{Volume: found.ID})
		if err != nil {
			return nil, err
		}
		for _, c := range left {
			if s, err := v.Adapter.Snapshot(ctx, c.Snapshot); err == nil && isOwnCut(s.Wanted, r.Remote()) {
				handles = append(handles, c.Snapshot.String())
			}
		}
	}
	return handles, nil
}

// backupAll backs snapshots up, some at once, and tells of each in their order. own says that the command made them by
// itself.
func (a *app) backupAll(ctx context.Context, r *repository.Repository, m *meter, snapshots []string, own bool, f backupFlags) error {
	budget, err := f.budget.budget(len(snapshots))
	if err != nil {
		return err
	}
	pool := backup.StorePool(budget, r)
	defer pool.Close()
	type result struct {
		report backup.Report
		err    error
	}
	results := make([]chan result, len(snapshots))
	for i := range results {
		results[i] = make(chan result, 1)
	}
	var all, workers errgroup.Group
	workers.SetLimit(budget.Volumes)
	all.Go(func() error {
		for i, h := range snapshots {
			workers.Go(func() error {
				if ctx.Err() != nil {
					results[i] <- result{err: fmt.Errorf("not begun: %w", ctx.Err())}
					return nil
				}
				report, err := a.backupOne(ctx, r, m, pool, h, f.full)
				results[i] <- result{report, err}
				return nil
			})
		}
		return workers.Wait()
	})
	var errs []error
	for i, h := range snapshots {
		made := <-results[i]
		err := made.err
		if err == nil {
			err = a.printBackup(made.report)
		}
		if err == nil && own {
			err = a.retire(ctx, r.Remote(), made.report)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", h, err))
		}
	}
	return errors.Join(append(errs, all.Wait())...)
}

// cutForBackup makes the cut of a backup command that was given volumes.
func (a *app) cutForBackup(ctx context.Context, volumes []cut.Volume, f backupFlags) ([]string, error) {
	res, err := a.cut(ctx, f.cut.request(ownCut(time.Now(), f.remote), volumes))
	if err == nil && !a.json {
		a.printCut(res)
	}
	return res.Snapshots, err
}

func (a *app) backupOne(ctx context.Context, r *repository.Repository, m *meter, pool *backup.Pool, handle string, full bool) (report backup.Report, err error) {
	b, id, err := a.snapshot(ctx, handle)
	if err != nil {
		return report, err
	}
	distrust := ""
	if !full {
		distrust = a.distrust(ctx, b, id.Volume.Backend)
	}
	err = m.run("backup", id.String(), func(p *backup.Progress) (err error) {
		report, err = backup.Run(ctx, backup.Request{Adapter: b, Snapshot: id, Repository: r, Full: full, Distrust: distrust, Pool: pool, Progress: p})
		return err
	})
	if err == nil {
		m.metrics.Backup(id.Volume.String(), r.Remote(), report)
	}
	return report, err
}

func (a *app) printBackup(report backup.Report) error {
	for _, w := range report.Warnings {
		warn(a.stderr, "%s: %s", report.Snapshot, w)
	}
	if a.json {
		return a.printJSON(report)
	}
	a.say("%s", report.Backup)
	if report.Existed {
		a.say("  %s was backed up before", report.Snapshot)
		return nil
	}
	a.say("  %s backup of %s (%s)", report.Kind, report.Snapshot, report.Reason)
	if t := report.Tree; t != nil {
		a.say("  %d entries: %d directories walked, %d reused whole; in those walked %d files read, %d reused; %d files audited",
			t.Entries, t.DirsWalked, t.DirsReused, t.FilesRead, t.FilesReused, t.FilesAudited)
	}
	for _, s := range report.Suspect {
		a.say("  %s is suspect now", s)
	}
	a.say("  read %v, audited %v, new %v (stored as %v), reused %v of %v, in %.1f s", bytesize(report.BytesRead), bytesize(report.BytesAudited),
		bytesize(report.BytesNew), bytesize(report.BytesStored), bytesize(report.BytesReused), bytesize(report.Size), report.Seconds)
	return nil
}

// retire deletes the volume's snapshots that earlier cuts of the command backup made for this remote: the one that was just backed up is
// the next base.
func (a *app) retire(ctx context.Context, remote string, report backup.Report) error {
	b, newest, err := a.snapshot(ctx, report.Snapshot)
	if err != nil {
		return err
	}
	made, err := b.Snapshot(ctx, newest)
	if err != nil {
		return err
	}
	for s, err := range b.Snapshots(ctx, adapters.Filter{Volume: newest.Volume}) {
		if err != nil {
			return err
		}
		if isOwnCut(s.Wanted, remote) && s.Created.Before(made.Created) {
			if err := b.DeleteSnapshot(ctx, s.ID); err != nil {
				return err
			}
		}
	}
	return nil
}
