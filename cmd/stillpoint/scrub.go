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

func (a *app) scrubCommand() *cobra.Command {
	var remote string
	var all, whole bool
	var days float64
	var budget budgetFlags
	var progress progressFlags
	c := &cobra.Command{
		Use:   "scrub (VOLUME... | --all)",
		Short: "Compare what nobody looked at for longest with the snapshots, whatever the backends say of changed blocks",
		Long: `Read a part of each volume's newest snapshot that has a backup, and compare it with that backup: what was looked at
longest ago, and so much that everything is looked at within the given days when the command runs regularly. Where they
differ, the backup and those that may be wrong with it are marked suspect, the snapshot is backed up anew as a whole, and
the exit code is 6.`,
		Args: arguments(0, -1, "volumes"),
		RunE: func(c *cobra.Command, args []string) error {
			if all == (len(args) > 0) {
				return fault.Errorf(fault.Invalid, "name volumes, or all that have backups with --all")
			}
			if days <= 0 {
				return fault.Errorf(fault.Invalid, "--days %v: must be more than 0", days)
			}
			b, err := budget.budget(1)
			if err != nil {
				return err
			}
			r, err := a.openRepository(c.Context(), remote, budget.open())
			if err != nil {
				return err
			}
			m, err := a.meter(c.Context(), progress)
			if err == nil {
				q := backup.ScrubRequest{Repository: r, Within: time.Duration(days * 24 * float64(time.Hour)), All: whole, Budget: b}
				err = errors.Join(a.scrubs(c.Context(), m, q, args, all), m.remote(c.Context(), r), m.Close())
			}
			return errors.Join(err, closeRepository(c.Context(), r))
		},
	}
	budget.register(c)
	c.Flags().Var(&budget.read, "read-limit", "bytes a second read from snapshots (default: no limit)")
	progress.register(c)
	remoteFlag(c, &remote)
	c.Flags().BoolVar(&all, "all", false, "every volume that has backups in the remote")
	c.Flags().BoolVar(&whole, "whole", false, "compare everything now, not only what is due")
	c.Flags().Float64Var(&days, "days", backup.ScrubWithin.Hours()/24, "look at everything within so many `days`")
	return a.jsonFlag(c)
}

// scrubs scrubs the volumes that were named, or all. With all, a volume whose backups have no snapshot any more is a
// warning: there is nothing to compare with.
func (a *app) scrubs(ctx context.Context, m *meter, q backup.ScrubRequest, args []string, all bool) error {
	volumes := args
	if all {
		found, err := q.Repository.Backups(ctx, repository.Filter{})
		if err != nil {
			return err
		}
		seen := map[adapters.VolumeID]bool{}
		for _, b := range found {
			if _, ours := a.config.Backends[b.Volume.Backend]; ours && !seen[b.Volume] && b.Form == adapters.BlockForm {
				volumes = append(volumes, b.Volume.String())
			}
			seen[b.Volume] = true
		}
	}
	var errs []error
	for _, h := range volumes {
		if ctx.Err() != nil {
			return errors.Join(append(errs, ctx.Err())...)
		}
		err := a.scrub(ctx, m, q, h)
		if all && errors.Is(err, fault.NotFound) {
			warn(a.stderr, "%v", err)
			continue
		}
		if err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func (a *app) scrub(ctx context.Context, m *meter, q backup.ScrubRequest, handle string) error {
	b, id, err := a.volume(ctx, handle)
	if err != nil {
		return err
	}
	if v, err := b.Volume(ctx, id); err == nil {
		id = v.ID
	} else if !errors.Is(err, fault.NotFound) && !errors.Is(err, fault.Unavailable) {
		return err // a volume that is gone may have backups under its canonical id
	}
	q.Adapter, q.Volume = b, id
	var report backup.ScrubReport
	err = m.run("scrub", id.String(), func(p *backup.Progress) (err error) {
		q.Progress = p
		report, err = backup.Scrub(ctx, q)
		return err
	})
	if report.Backup == "" {
		return err
	}
	if a.json {
		return errors.Join(err, a.printJSON(report))
	}
	for _, w := range report.Wrong {
		a.say("differs: %s", w)
	}
	for _, s := range report.Suspect {
		a.say("suspect: %s", s)
	}
	if report.Healed != "" {
		a.say("healed: %s", report.Healed)
	}
	if err == nil {
		a.say("%s", report.Volume)
		a.say("  %v of %s compared with %s, all right, in %.1f s; %s", bytesize(report.BytesScrubbed), report.Snapshot, report.Backup, report.Seconds, oldest(report.Oldest))
	}
	return err
}

// oldest says since when some stretch was not looked at.
func oldest(since time.Time) string {
	return fmt.Sprintf("every byte was looked at in a snapshot of %s or later", since.Local().Format(time.DateTime))
}
