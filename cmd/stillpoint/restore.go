package main

import (
	"context"
	"strings"

	"github.com/spf13/cobra"

	"stillpoint.io/stillpoint/agent/backup"
	"stillpoint.io/stillpoint/agent/repository"
)

func (a *app) restoreCommand() *cobra.Command {
	var overwrite, suspect bool
	c := &cobra.Command{
		Use:   "restore BACKUP|HANDLE TARGET-VOLUME",
		Short: "Make a backup or a snapshot into a new volume, or write it over an existing one",
		Args:  arguments(2, 2, "a backup or snapshot, and the volume to make of it"),
		RunE: func(c *cobra.Command, args []string) error {
			target, id, err := a.volume(c.Context(), args[1])
			if err != nil {
				return err
			}
			q := backup.RestoreRequest{Target: target, Volume: id, Overwrite: overwrite, Suspect: suspect}
			if !strings.HasPrefix(args[0], "backup:") {
				b, snapshot, err := a.snapshot(c.Context(), args[0])
				if err != nil {
					return err
				}
				q.Source = backup.FromSnapshot(b, snapshot)
				return a.restore(c.Context(), q)
			}
			return a.inRemotes(c.Context(), args[:1], func(r *repository.Repository, id string) error {
				q.Source = backup.FromBackup(r, id)
				return a.restore(c.Context(), q)
			})
		},
	}
	c.Flags().BoolVar(&overwrite, "overwrite", false, "write over the existing volume TARGET-VOLUME, which must not be in use")
	c.Flags().BoolVar(&suspect, "suspect", false, "restore a backup even if it is suspect: it may differ from its snapshot")
	return a.jsonFlag(c)
}

func (a *app) restore(ctx context.Context, q backup.RestoreRequest) error {
	var report backup.RestoreReport
	err := a.withProgress(ctx, "restore of "+q.Volume.ID, func(p *backup.Progress) (err error) {
		q.Progress = p
		report, err = backup.Restore(ctx, q)
		return err
	})
	if err != nil {
		return err
	}
	if a.json {
		return a.printJSON(report)
	}
	a.say("%s", report.Volume)
	a.say("  restored from %s: %v written, %v zeroed, of %v, in %.1f s", report.Source, bytesize(report.BytesWritten), bytesize(report.BytesZeroed), bytesize(report.Size), report.Seconds)
	return nil
}
