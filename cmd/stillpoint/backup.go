package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/backup"
	"stillpoint.io/stillpoint/agent/repository"
	"stillpoint.io/stillpoint/fault"
)

// The cuts that the command backup makes by itself are named by their time. A snapshot with such a name is deleted once
// a newer backup has taken its place as the base of the next increment.
const ownCutLayout = "backup-20060102t150405"

func isOwnCut(name string) bool {
	_, err := time.Parse(ownCutLayout, name)
	return err == nil
}

func (a *app) backupCommand() *cobra.Command {
	var flags cutFlags
	var remote string
	var full bool
	c := &cobra.Command{
		Use:   "backup (HANDLE... | VOLUME... | --all)",
		Short: "Back snapshots up, incrementally where the last backup's snapshot still exists",
		Long: `Back snapshots up into a remote. With volumes instead of snapshots, or with --all, one cut over all of them is made
first. The snapshot of such a cut stays as the base of the next increment and is deleted when that has succeeded;
snapshots that you made stay until you delete them. The backup's handle is printed when the backup is complete: its
manifest and a sample of its data have been read back.`,
		Args: arguments(0, -1, "snapshots or volumes"),
		RunE: func(c *cobra.Command, args []string) error {
			cuts, err := wantsCut(args, flags.all)
			if err != nil {
				return err
			}
			r, err := a.repository(c.Context(), remote) // before anything is frozen for it
			if err != nil {
				return err
			}
			err = a.backup(c.Context(), r, args, cuts, flags, full)
			return errors.Join(err, closeRepository(c.Context(), r))
		},
	}
	flags.register(c)
	remoteFlag(c, &remote)
	c.Flags().BoolVar(&full, "full", false, "reuse nothing: read everything that is allocated")
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

func (a *app) backup(ctx context.Context, r *repository.Repository, args []string, cuts bool, flags cutFlags, full bool) error {
	snapshots := args
	if cuts {
		var err error
		if snapshots, err = a.cutForBackup(ctx, args, flags); err != nil {
			return err
		}
	}
	var errs []error
	for i, h := range snapshots {
		if ctx.Err() != nil {
			return errors.Join(append(errs, fmt.Errorf("%d of %d backups were not begun: %w", len(snapshots)-i, len(snapshots), ctx.Err()))...)
		}
		report, err := a.backupOne(ctx, r, h, full)
		if err == nil && cuts {
			err = a.retire(ctx, r, report)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", h, err))
		}
	}
	return errors.Join(errs...)
}

// cutForBackup makes the cut of a backup command that was given volumes.
func (a *app) cutForBackup(ctx context.Context, args []string, flags cutFlags) ([]string, error) {
	volumes, err := a.volumes(ctx, args, flags.all)
	if err != nil {
		return nil, err
	}
	res, err := a.cut(ctx, flags.request(time.Now().UTC().Format(ownCutLayout), volumes))
	if err == nil && !a.json {
		a.printCut(res)
	}
	return res.Snapshots, err
}

func (a *app) backupOne(ctx context.Context, r *repository.Repository, handle string, full bool) (backup.Report, error) {
	b, id, err := a.snapshot(ctx, handle)
	if err != nil {
		return backup.Report{}, err
	}
	var report backup.Report
	distrust := ""
	if !full {
		distrust = a.distrust(ctx, b, id.Volume.Backend)
	}
	err = a.withProgress(ctx, "backup of "+id.Name, func(p *backup.Progress) (err error) {
		report, err = backup.Run(ctx, backup.Request{Adapter: b, Snapshot: id, Repository: r, Full: full, Distrust: distrust, Progress: p})
		return err
	})
	if err != nil {
		return report, err
	}
	for _, w := range report.Warnings {
		warn(a.stderr, "%s: %s", report.Snapshot, w)
	}
	if a.json {
		return report, a.printJSON(report)
	}
	a.say("%s", report.Backup)
	if report.Existed {
		a.say("  %s was backed up before", report.Snapshot)
		return report, nil
	}
	a.say("  %s backup of %s (%s)", report.Kind, report.Snapshot, report.Reason)
	for _, s := range report.Suspect {
		a.say("  %s is suspect now", s)
	}
	a.say("  read %v, audited %v, new %v (stored as %v), reused %v of %v, in %.1f s", bytesize(report.BytesRead), bytesize(report.BytesAudited),
		bytesize(report.BytesNew), bytesize(report.BytesStored), bytesize(report.BytesReused), bytesize(report.Size), report.Seconds)
	return report, nil
}

// retire deletes the snapshot that was the base of an incremental backup, if a cut of the command backup had made it:
// the new snapshot is the next base.
func (a *app) retire(ctx context.Context, r *repository.Repository, report backup.Report) error {
	if report.Base == "" {
		return nil
	}
	h, err := repository.ParseHandle(report.Base)
	if err != nil {
		return err
	}
	base, err := r.Backup(ctx, h.ID)
	if err != nil {
		return err
	}
	if !isOwnCut(base.Snapshot.Name) {
		return nil
	}
	b, err := a.backend(ctx, base.Snapshot.Volume.Backend)
	if err != nil {
		return err
	}
	return b.DeleteSnapshot(ctx, base.Snapshot)
}
