package main

import (
	"context"
	"errors"
	"strings"

	"github.com/spf13/cobra"

	"stillpoint.io/stillpoint/agent/backup"
	"stillpoint.io/stillpoint/agent/repository"
)

func (a *app) restoreCommand() *cobra.Command {
	var overwrite, giveUp bool
	var budget budgetFlags
	var progress progressFlags
	c := &cobra.Command{
		Use:   "restore BACKUP|HANDLE TARGET-VOLUME",
		Short: "Make a backup or a snapshot into a new volume, or write it over an existing one",
		Long: `Make a backup or a snapshot into a new volume, or write it over an existing one. Every chunk is checked.

A restore that was interrupted or killed keeps what it wrote, and the same command again continues it; --give-up
removes it instead. Over an existing volume only what differs is fetched and written.`,
		Args: arguments(2, 2, "a backup or snapshot, and the volume to make of it"),
		RunE: func(c *cobra.Command, args []string) (err error) {
			target, id, err := a.volume(c.Context(), args[1])
			if err != nil {
				return err
			}
			q := backup.RestoreRequest{Target: target, Volume: id, Overwrite: overwrite, GiveUp: giveUp}
			if q.Budget, err = budget.budget(1); err != nil {
				return err
			}
			m, err := a.meter(c.Context(), progress)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, m.Close()) }()
			if !strings.HasPrefix(args[0], "backup:") {
				b, snapshot, err := a.snapshot(c.Context(), args[0])
				if err != nil {
					return err
				}
				q.Source = backup.FromSnapshot(b, snapshot)
				return a.restore(c.Context(), m, q)
			}
			return a.inRemotes(c.Context(), args[:1], budget.open(), func(r *repository.Repository, id string) error {
				q.Source = backup.FromBackup(r, id)
				return a.restore(c.Context(), m, q)
			})
		},
	}
	c.Flags().BoolVar(&overwrite, "overwrite", false, "write over the existing volume TARGET-VOLUME, which must not be in use")
	c.Flags().BoolVar(&giveUp, "give-up", false, "remove what an interrupted restore of this backup to TARGET-VOLUME left")
	budget.registerReading(c)
	progress.register(c)
	return a.jsonFlag(c)
}

func (a *app) restore(ctx context.Context, m *meter, q backup.RestoreRequest) error {
	var report backup.RestoreReport
	err := m.run("restore", q.Volume.String(), func(p *backup.Progress) (err error) {
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
	if q.GiveUp {
		a.say("  the interrupted restore from %s is removed", report.Source)
		return nil
	}
	a.say("  restored from %s: %v written, %v there already, %v zeroed, of %v, in %.1f s", report.Source, bytesize(report.BytesWritten), bytesize(report.BytesFound), bytesize(report.BytesZeroed), bytesize(report.Size), report.Seconds)
	return nil
}
