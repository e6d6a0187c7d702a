package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"stillpoint.io/stillpoint/agent/backup"
	"stillpoint.io/stillpoint/agent/repository"
)

func (a *app) repairCommand() *cobra.Command {
	var all, dry bool
	var remote string
	var budget budgetFlags
	var progress progressFlags
	c := &cobra.Command{
		Use:   "repair (BACKUP... | --all)",
		Short: "Say which backups are hurt, and store again what snapshots still have",
		Long: `Say which backups are hurt by what is lost or has rotted in a remote, at which offsets or paths, and store it again where
it can be found: the bytes of a volume, and the files and directories of a tree, in any snapshot of it that still exists,
indexes from the blobs they are about, descriptions from one another. Everything gets the name that it had, so that all
backups that share it are whole again. What cannot be repaired is said, and the backups are marked as suspect.

First the remote as a whole is put in order, as far as that is needed to open it. Then the named backups, or all, are
read and checked; at the end those that were hurt are checked once more. It may be interrupted at any time and begun
anew.

A dry run reads the same and looks into the same snapshots. What a lost index or directory refers to shows only when that
is whole, so there may be more to be stored again than it says.`,
		Args: arguments(0, -1, "backups"),
		RunE: func(c *cobra.Command, args []string) (err error) {
			if err := allOrSome(c, all, args); err != nil {
				return err
			}
			b, err := budget.budget(1)
			if err != nil {
				return err
			}
			m, err := a.meter(c.Context(), progress)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, m.Close()) }()
			remotes, ids, err := byRemote(args, remote)
			if err != nil {
				return err
			}
			var errs []error
			for _, name := range remotes {
				errs = append(errs, a.repair(c.Context(), m, name, budget.open(), backup.RepairRequest{
					IDs: ids[name], All: all, DryRun: dry, Budget: b, Adapter: a.backend,
				}))
			}
			return errors.Join(errs...)
		},
	}
	c.Flags().BoolVar(&all, "all", false, "all backups in the remote, and everything else there")
	c.Flags().BoolVar(&dry, "dry-run", false, "change nothing, say what would be done")
	remoteFlag(c, &remote)
	budget.registerReading(c)
	progress.register(c)
	return a.jsonFlag(c)
}

func (a *app) repair(ctx context.Context, m *meter, remote string, o repository.OpenOptions, q backup.RepairRequest) (err error) {
	at, passphrase, err := a.config.remote(remote)
	if err != nil {
		return err
	}
	o.Remote, o.Locks = remote, locks()
	mended, err := repository.Mend(ctx, at, passphrase, o, q.DryRun)
	for _, b := range mended {
		err = errors.Join(err, a.printMended(b))
	}
	if err != nil {
		return fmt.Errorf("remote %q: %w", remote, err)
	}
	r, err := a.openRepository(ctx, remote, o)
	if err != nil {
		if q.DryRun && len(mended) > 0 {
			a.note("the backups can be looked at when this has been done: repair without --dry-run")
			return nil
		}
		return err
	}
	defer func() { err = errors.Join(err, closeRepository(ctx, r)) }()
	q.Repository = r
	subject := "the remote " + remote
	if !q.All {
		subject = fmt.Sprintf("%d backups", len(q.IDs))
	}
	var report backup.RepairReport
	err = m.run("repair", subject, func(p *backup.Progress) (err error) {
		q.Progress = p
		report, err = backup.Repair(ctx, q)
		return err
	})
	return errors.Join(a.printRepaired(report), err)
}

// note is for people only.
func (a *app) note(format string, args ...any) {
	if !a.json {
		a.say(format, args...)
	}
}

func (a *app) printMended(b repository.Mended) error {
	if a.json {
		return a.printJSON(b)
	}
	a.say("%s: %s", b.Blob, b.Was)
	a.say("  %s", b.Done)
	for _, h := range b.Backups {
		a.say("  listed again: %s", h)
	}
	return nil
}

func (a *app) printRepaired(r backup.RepairReport) error {
	if a.json {
		return a.printJSON(r)
	}
	for _, h := range r.Hurt {
		for _, bad := range h.Bad {
			a.say("bad: %s: %s", h.Backup, bad)
		}
	}
	for _, h := range r.Hurt {
		switch {
		case h.Healed && r.DryRun:
			a.say("%s is hurt (%v) and can be made whole", h.Backup, bytesize(h.BytesBad))
		case h.Healed:
			a.say("%s is whole again: %v stored anew, and all of it verified", h.Backup, bytesize(h.BytesBad))
		default:
			a.say("%s stays hurt:", h.Backup)
			for _, left := range h.Left {
				a.say("  %s", left)
			}
			for _, why := range h.Why {
				a.say("  because %s", why)
			}
		}
	}
	for _, d := range r.Dropped {
		a.say("no backup refers to it, and none will: %s", d)
	}
	for _, l := range r.Loose {
		a.say("left as it is until what is hurt is whole: %s", l)
	}
	switch {
	case len(r.Hurt) == 0 && r.Looked > 0:
		a.say("nothing is wrong with the %d backups (%.1f s)", r.Looked, r.Seconds)
	case r.DryRun:
		a.say("%d contents could be stored again (%.1f s)", r.Stored, r.Seconds)
	default:
		a.say("%d contents stored again (%.1f s)", r.Stored, r.Seconds)
	}
	return nil
}
