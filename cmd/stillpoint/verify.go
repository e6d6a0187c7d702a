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
	var budget budgetFlags
	var progress progressFlags
	c := &cobra.Command{
		Use:   "verify BACKUP...",
		Short: "Read every chunk of backups back and check it",
		Args:  arguments(1, -1, "backups"),
		RunE: func(c *cobra.Command, args []string) (err error) {
			b, err := budget.budget(1)
			if err != nil {
				return err
			}
			m, err := a.meter(c.Context(), progress)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, m.Close()) }()
			return a.inRemotes(c.Context(), args, budget.open(), func(r *repository.Repository, id string) error {
				return a.verify(c.Context(), m, backup.VerifyRequest{Repository: r, ID: id, Budget: b})
			})
		},
	}
	budget.registerReading(c)
	progress.register(c)
	return a.jsonFlag(c)
}

func (a *app) verify(ctx context.Context, m *meter, q backup.VerifyRequest) error {
	var report backup.VerifyReport
	err := m.run("verify", q.ID, func(p *backup.Progress) (err error) {
		q.Progress = p
		report, err = backup.Verify(ctx, q)
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
