package main

import (
	"cmp"
	"context"
	"errors"
	"strings"

	"github.com/spf13/cobra"

	"stillpoint.io/stillpoint/agent/backup"
	"stillpoint.io/stillpoint/agent/repository"
)

func (a *app) restoreCommand() *cobra.Command {
	var overwrite, duplicate, suspect, giveUp bool
	var only string
	var budget budgetFlags
	var progress progressFlags
	c := &cobra.Command{
		Use:   "restore BACKUP|HANDLE TARGET-VOLUME|DIRECTORY",
		Short: "Make a backup or a snapshot into a new volume, or write it over an existing one",
		Long: `Make a backup or a snapshot into a new volume, or write it over an existing one. Every chunk is checked.

A restore that was interrupted or killed keeps what it wrote, and the same command again continues it; --give-up
removes it instead. Over an existing volume only what differs is fetched and written.

A snapshot becomes a new volume of the same backend at once where the two can share blocks; --copy copies it all the same.

A tree of files becomes a new volume, or a new directory anywhere on this machine, if the target is a path like /new or
./new. With --path only one directory or file of it is restored: a directory's content, or a directory with just the file.
Nothing is written over and nothing is ever written outside of the target. What an interrupted
restore left of a file is compared with the backup, and only what differs is fetched.`,
		Args: arguments(2, 2, "a backup or snapshot, and the volume to make of it"),
		RunE: func(c *cobra.Command, args []string) (err error) {
			q := backup.RestoreRequest{Overwrite: overwrite, Copy: duplicate, Suspect: suspect, GiveUp: giveUp, Only: treePath(only)}
			if strings.HasPrefix(args[1], "/") || strings.HasPrefix(args[1], ".") {
				q.Directory = args[1]
			} else if q.Target, q.Volume, err = a.volume(c.Context(), args[1]); err != nil {
				return err
			}
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
	c.Flags().StringVar(&only, "path", "", "of a tree of files, restore only what is at this `path` in it")
	c.Flags().BoolVar(&overwrite, "overwrite", false, "write over the existing volume TARGET-VOLUME, which must not be in use")
	c.Flags().BoolVar(&duplicate, "copy", false, "copy a snapshot's bytes even where the new volume could share its blocks")
	c.Flags().BoolVar(&suspect, "suspect", false, "restore a backup even if it is suspect: it may differ from its snapshot")
	c.Flags().BoolVar(&giveUp, "give-up", false, "remove what an interrupted restore of this backup to TARGET-VOLUME left")
	budget.registerReading(c)
	progress.register(c)
	return a.jsonFlag(c)
}

func (a *app) restore(ctx context.Context, m *meter, q backup.RestoreRequest) error {
	var report backup.RestoreReport
	err := m.run("restore", cmp.Or(q.Directory, q.Volume.String()), func(p *backup.Progress) (err error) {
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
	if report.Cloned {
		a.say("  cloned from %s: nothing copied of %v, in %.1f s", report.Source, bytesize(report.Size), report.Seconds)
		return nil
	}
	if report.Entries > 0 {
		a.say("  restored from %s: %d files, directories and links, %v written of %v, in %.1f s", report.Source, report.Entries, bytesize(report.BytesWritten), bytesize(report.Size), report.Seconds)
		return nil
	}
	a.say("  restored from %s: %v written, %v there already, %v zeroed, of %v, in %.1f s", report.Source, bytesize(report.BytesWritten), bytesize(report.BytesFound), bytesize(report.BytesZeroed), bytesize(report.Size), report.Seconds)
	return nil
}
