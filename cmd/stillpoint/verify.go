package main

import (
	"context"
	"errors"

	"github.com/spf13/cobra"

	"stillpoint.io/stillpoint/agent/backup"
	"stillpoint.io/stillpoint/agent/repository"
	"stillpoint.io/stillpoint/fault"
)

func (a *app) verifyCommand() *cobra.Command {
	return a.jsonFlag(&cobra.Command{
		Use:   "verify BACKUP...",
		Short: "Read every chunk of backups back and check it",
		Args:  arguments(1, -1, "backups"),
		RunE: func(c *cobra.Command, args []string) error {
			return a.inRemotes(c.Context(), args, func(r *repository.Repository, id string) error {
				return a.verify(c.Context(), r, id)
			})
		},
	})
}

func (a *app) verify(ctx context.Context, r *repository.Repository, id string) error {
	var report backup.VerifyReport
	err := a.withProgress(ctx, "verifying "+id, func(p *backup.Progress) (err error) {
		report, err = backup.Verify(ctx, backup.VerifyRequest{Repository: r, ID: id, Progress: p})
		return err
	})
	if err != nil && !errors.Is(err, fault.Corrupt) {
		return err
	}
	if a.json {
		return errors.Join(err, a.printJSON(report))
	}
	for _, bad := range report.Bad {
		a.say("bad: %s", bad)
	}
	if err == nil {
		a.say("%s is sound: %v of chunks read and checked in %.1f s", report.Backup, bytesize(report.BytesVerified), report.Seconds)
	}
	return err
}
