package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"stillpoint.io/stillpoint/agent/backup"
	"stillpoint.io/stillpoint/agent/repository"
	"stillpoint.io/stillpoint/fault"
)

// ageFlag is a flag that takes an age: 36h, 30d, 2w.
type ageFlag time.Duration

func (f *ageFlag) String() string {
	if *f == 0 {
		return ""
	}
	return age(time.Duration(*f))
}
func (f *ageFlag) Type() string { return "age" }
func (f *ageFlag) Set(s string) error {
	for unit, hours := range map[string]int{"d": 24, "w": 7 * 24} {
		if number, ok := strings.CutSuffix(s, unit); ok {
			n, err := strconv.Atoi(number)
			if err == nil && n >= 0 && n < 100_000 {
				*f = ageFlag(time.Duration(n*hours) * time.Hour)
				return nil
			}
		}
	}
	d, err := time.ParseDuration(s)
	if err != nil || d < 0 {
		return fmt.Errorf("%q is no age, such as 36h, 30d or 2w", s)
	}
	*f = ageFlag(d)
	return nil
}

// verifyFlags say what to verify, and how.
type verifyFlags struct {
	all, quick bool
	olderThan  ageFlag
	against    string
	remote     string
}

func (a *app) verifyCommand() *cobra.Command {
	var flags verifyFlags
	var budget budgetFlags
	var progress progressFlags
	c := &cobra.Command{
		Use:   "verify (BACKUP... | --all)",
		Short: "Read every chunk of backups back and check it",
		Long: `Read every chunk of backups back from the remote, decrypt it and compare it with its digest. What backups share is read
once. With --all everything else in the remote is checked too: what no backup refers to any more, kopia's own blobs, and
whether an index is missing. When a backup was verified is recorded; "backups" and "remote status" show it.

--quick reads no data: everything that a backup needs must be in the index, and within a blob that is there and long
enough. --against compares a backup with a snapshot that still exists.`,
		Args: arguments(0, -1, "backups"),
		RunE: func(c *cobra.Command, args []string) (err error) {
			if err := flags.check(c, args); err != nil {
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
			if flags.against != "" {
				return a.inRemotes(c.Context(), args, budget.open(), func(r *repository.Repository, id string) error {
					return a.verifyAgainst(c.Context(), m, flags.against, backup.AgainstRequest{Repository: r, ID: id, Budget: b})
				})
			}
			return a.eachRemote(c.Context(), args, flags.remote, budget.open(), func(r *repository.Repository, ids []string) error {
				err := a.verify(c.Context(), m, backup.VerifyRequest{
					Repository: r, IDs: ids, All: flags.all, OlderThan: time.Duration(flags.olderThan), Quick: flags.quick, Budget: b,
				})
				return errors.Join(err, m.remote(c.Context(), r))
			})
		},
	}
	c.Flags().BoolVar(&flags.all, "all", false, "all backups in the remote, and everything else there")
	c.Flags().BoolVar(&flags.quick, "quick", false, "read no data, only look whether everything is there")
	c.Flags().Var(&flags.olderThan, "older-than", "with --all: only backups that were not verified for so long, such as 30d")
	c.Flags().StringVar(&flags.against, "against", "", "compare the one backup with the snapshot `HANDLE`, chunk by chunk")
	remoteFlag(c, &flags.remote)
	budget.registerReading(c)
	progress.register(c)
	return a.jsonFlag(c)
}

func (f *verifyFlags) check(c *cobra.Command, args []string) error {
	if err := allOrSome(c, f.all, args); err != nil {
		return err
	}
	switch {
	case f.olderThan != 0 && !f.all:
		return fault.Errorf(fault.Invalid, "--older-than chooses among all backups: give it with --all")
	case f.olderThan != 0 && f.quick:
		return fault.Errorf(fault.Invalid, "--older-than goes by the last full verification: not with --quick")
	case f.against != "" && (len(args) != 1 || f.quick || f.all):
		return fault.Errorf(fault.Invalid, "--against compares one backup with one snapshot: name one backup, without --all and --quick")
	}
	return nil
}

// allOrSome makes sure that either --all or something was given.
func allOrSome(c *cobra.Command, all bool, args []string) error {
	switch {
	case all && len(args) > 0:
		return fault.Errorf(fault.Invalid, "name backups or give --all, not both")
	case !all && len(args) == 0:
		return fault.Errorf(fault.Invalid, "%s wants backups, or --all; see `%s --help`", c.CommandPath(), c.CommandPath())
	}
	return nil
}

// eachRemote calls f once for each remote that the handles name, or for the one that was chosen if there are no handles.
func (a *app) eachRemote(ctx context.Context, handles []string, remote string, o repository.OpenOptions, f func(*repository.Repository, []string) error) error {
	remotes, ids, err := byRemote(handles, remote)
	if err != nil {
		return err
	}
	var errs []error
	for _, name := range remotes {
		r, err := a.openRepository(ctx, name, o)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		errs = append(errs, f(r, ids[name]), closeRepository(ctx, r))
	}
	return errors.Join(errs...)
}

// byRemote sorts backups by their remotes.
func byRemote(handles []string, remote string) (remotes []string, ids map[string][]string, err error) {
	ids = map[string][]string{}
	for _, s := range handles {
		h, err := repository.ParseHandle(s)
		if err != nil {
			return nil, nil, err
		}
		if _, ok := ids[h.Remote]; !ok {
			remotes = append(remotes, h.Remote)
		}
		ids[h.Remote] = append(ids[h.Remote], h.ID)
	}
	if len(handles) == 0 {
		remotes = []string{remote}
	}
	return remotes, ids, nil
}

func (a *app) verify(ctx context.Context, m *meter, q backup.VerifyRequest) error {
	subject := fmt.Sprintf("%d backups", len(q.IDs))
	switch {
	case q.All:
		subject = "the remote " + q.Repository.Remote()
	case len(q.IDs) == 1:
		subject = q.IDs[0]
	}
	var said []error
	var later []backup.VerifyReport // a bar and lines that come meanwhile do not go together
	q.Each = func(r backup.VerifyReport) {
		if m.bars != nil {
			later = append(later, r)
			return
		}
		said = append(said, a.printVerified(r))
	}
	var summary backup.VerifySummary
	err := m.run("verify", subject, func(p *backup.Progress) (err error) {
		q.Progress = p
		summary, err = backup.VerifyAll(ctx, q)
		return err
	})
	for _, r := range later {
		said = append(said, a.printVerified(r))
	}
	for _, rot := range summary.Rot {
		if a.json {
			said = append(said, a.printJSON(map[string]string{"rot": rot}))
		} else {
			a.say("bad: %s", rot)
		}
	}
	if q.All && err == nil && !a.json && q.OlderThan == 0 {
		is := "are sound"
		if q.Quick {
			is = "are there"
		}
		a.say("%d backups and all else in %s %s (%.1f s)", summary.Backups, q.Repository.Remote(), is, summary.Seconds)
	}
	return errors.Join(append(said, err)...)
}

func (a *app) printVerified(r backup.VerifyReport) error {
	for _, w := range r.Warnings {
		warn(a.stderr, "%s: %s", r.Backup, w)
	}
	if a.json {
		return a.printJSON(r)
	}
	for _, bad := range r.Bad {
		a.say("bad: %s: %s", r.Backup, bad)
	}
	switch {
	case r.Faults > 0:
		a.say("%s is damaged: %d faults, %v of it cannot be restored", r.Backup, r.Faults, bytesize(r.BytesBad))
	case r.Quick:
		a.say("%s: everything is there (%.1f s)", r.Backup, r.Seconds)
	default:
		a.say("%s is sound: %v of chunks checked, %v of them read now, in %.1f s", r.Backup, bytesize(r.BytesVerified), bytesize(r.BytesRead), r.Seconds)
	}
	return nil
}

func (a *app) verifyAgainst(ctx context.Context, m *meter, handle string, q backup.AgainstRequest) (err error) {
	if q.Adapter, q.Snapshot, err = a.snapshot(ctx, handle); err != nil {
		return err
	}
	var report backup.AgainstReport
	err = m.run("verify", q.ID, func(p *backup.Progress) (err error) {
		q.Progress = p
		report, err = backup.VerifyAgainst(ctx, q)
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
	for _, d := range report.Differences {
		a.say("differs: %s", d)
	}
	if !report.Same {
		a.say("%s is not the snapshot that %s was made of", report.Snapshot, report.Backup)
	}
	if err == nil {
		a.say("%s is sound and the same as %s: %v compared in %.1f s", report.Backup, report.Snapshot, bytesize(report.BytesCompared), report.Seconds)
	}
	return err
}
