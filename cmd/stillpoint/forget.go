package main

import (
	"context"
	"errors"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/backup"
	"stillpoint.io/stillpoint/agent/repository"
	"stillpoint.io/stillpoint/fault"
)

func (a *app) forgetCommand() *cobra.Command {
	var f forgetFlags
	c := &cobra.Command{
		Use:   "forget (BACKUP... | --keep-... N)",
		Short: "Remove backups from a remote, by name or by a policy; the space comes back with `stillpoint remote maintain`",
		Long: `Remove backups from a remote, by name or by a policy. A policy judges each volume by itself and shows what it keeps
and why before anything is forgotten. A rule keeps the newest backup of each of the last N hours, days, ISO weeks,
months or years in which there is one, and the oldest of all while it has some left; -1 keeps one of each. What no rule
keeps is forgotten.

The base of a volume's next incremental backup, which is the newest whose snapshot still exists or else the newest, is
never forgotten by a policy, and by name only with --force. Suspect backups count for no rule.`,
		Args: arguments(0, -1, "backups, or a policy"),
		RunE: func(c *cobra.Command, args []string) error {
			policy, err := f.policy()
			if err != nil {
				return err
			}
			named := len(args) > 0
			switch ruled := policy.Check() == nil; {
			case named && (ruled || f.volume != ""):
				return fault.Errorf(fault.Invalid, "name backups or give a policy, not both")
			case named:
				return a.forgetNamed(c.Context(), args, f)
			case f.force:
				return fault.Errorf(fault.Invalid, "a policy never forgets what the next incremental backup needs, --force or not; name the backup")
			}
			return a.forgetByPolicy(c.Context(), policy, f)
		},
	}
	f.register(c)
	return a.jsonFlag(c)
}

type forgetFlags struct {
	keep           backup.Policy
	within, zone   string
	volume, remote string
	dryRun, force  bool
}

func (f *forgetFlags) register(c *cobra.Command) {
	flags := c.Flags()
	flags.IntVar(&f.keep.Last, "keep-last", 0, "keep the newest `N`")
	flags.IntVar(&f.keep.Hourly, "keep-hourly", 0, "keep the newest of each of the last `N` hours that have one")
	flags.IntVar(&f.keep.Daily, "keep-daily", 0, "... of each of the last `N` days")
	flags.IntVar(&f.keep.Weekly, "keep-weekly", 0, "... of each of the last `N` ISO weeks")
	flags.IntVar(&f.keep.Monthly, "keep-monthly", 0, "... of each of the last `N` months")
	flags.IntVar(&f.keep.Yearly, "keep-yearly", 0, "... of each of the last `N` years")
	flags.StringVar(&f.within, "keep-within", "", "keep everything of this `duration` before the newest: 36h, 14d")
	flags.StringVar(&f.zone, "time-zone", "Local", "the `zone` whose hours, days and weeks count: Local, UTC, Europe/Berlin")
	flags.StringVar(&f.volume, "volume", "", "judge only this `volume`'s backups")
	flags.BoolVar(&f.dryRun, "dry-run", false, "only show what would be forgotten")
	flags.BoolVar(&f.force, "force", false, "forget named backups even if the next incremental one needs them")
	remoteFlag(c, &f.remote)
}

func (f *forgetFlags) policy() (p backup.Policy, err error) {
	p = f.keep
	if p.Zone, err = time.LoadLocation(f.zone); err != nil {
		return p, fault.Errorf(fault.Invalid, "--time-zone: %w", err)
	}
	p.Within, err = parseAge("--keep-within", f.within)
	return p, err
}

// parseAge reads a flag's duration, which may be in days.
func parseAge(flag, s string) (time.Duration, error) {
	if s == "" {
		return 0, nil
	}
	if days, ok := strings.CutSuffix(s, "d"); ok {
		if n, err := strconv.ParseUint(days, 10, 16); err == nil {
			return time.Duration(n) * 24 * time.Hour, nil
		}
	}
	d, err := time.ParseDuration(s)
	if err != nil || d <= 0 {
		return 0, fault.Errorf(fault.Invalid, "%s %q: not a duration such as 36h or 14d", flag, s)
	}
	return d, nil
}

func (a *app) forgetNamed(ctx context.Context, names []string, f forgetFlags) error {
	var remotes []*repository.Repository
	ids := map[*repository.Repository][]string{}
	collect := func(r *repository.Repository, id string) error {
		if ids[r] == nil {
			remotes = append(remotes, r)
		}
		if !slices.Contains(ids[r], id) {
			ids[r] = append(ids[r], id)
		}
		return nil
	}
	return a.inRemotesThen(ctx, names, repository.OpenOptions{}, collect, func() error {
		for _, r := range remotes { // all of them, before anything is forgotten
			if f.force {
				break
			}
			if err := backup.CheckForget(ctx, r, ids[r], a.backend); err != nil {
				return err
			}
		}
		for _, r := range remotes {
			if err := a.forget(ctx, r, ids[r], f.dryRun); err != nil {
				return err
			}
		}
		return nil
	})
}

func (a *app) forgetByPolicy(ctx context.Context, p backup.Policy, f forgetFlags) error {
	if err := p.Check(); err != nil {
		return err
	}
	filter, unknown := a.filter(ctx, f.volume)
	if errors.Is(unknown, fault.NotFound) { // what is left of a backend that is no longer configured can be forgotten too
		h, err := adapters.ParseHandle(f.volume)
		if err != nil {
			return err
		}
		filter.Volume = h.Volume
	} else if unknown != nil {
		return unknown
	}
	r, err := a.repository(ctx, f.remote)
	if err != nil {
		return err
	}
	defer closeRepository(ctx, r)
	verdicts, err := backup.Judge(ctx, r, filter, p, a.backend)
	if err != nil {
		return err
	}
	if unknown != nil && len(verdicts) == 0 {
		return unknown
	}
	if err := a.printVerdicts(verdicts, p.Zone); err != nil {
		return err
	}
	var doomed []string
	for _, v := range verdicts {
		if !v.Keep {
			doomed = append(doomed, v.Backup.ID)
		}
	}
	return a.forget(ctx, r, doomed, f.dryRun)
}

// verdict is a line of the policy's answer in JSON.
type verdict struct {
	Backup  string    `json:"backup"`
	Volume  string    `json:"volume"`
	Created time.Time `json:"created"`
	Keep    bool      `json:"keep"`
	Reasons []string  `json:"reasons"`
}

func (a *app) printVerdicts(verdicts []backup.Verdict, zone *time.Location) error {
	if a.json {
		for _, v := range verdicts {
			if err := a.printJSON(verdict{v.Backup.Handle.String(), v.Backup.Volume.String(), v.Backup.Created.UTC(), v.Keep, v.Reasons}); err != nil {
				return err
			}
		}
		return nil
	}
	row, flush := a.table("", "BACKUP", "CREATED ("+zone.String()+")", "VOLUME", "WHY")
	for _, v := range verdicts {
		what := "forget"
		if v.Keep {
			what = "keep"
		}
		row(what, v.Backup.Handle, v.Backup.Created.In(zone).Format(time.DateTime), v.Backup.Volume, strings.Join(v.Reasons, "; "))
	}
	return flush()
}

// forget forgets backups of one repository and says so, or says that it would.
func (a *app) forget(ctx context.Context, r *repository.Repository, ids []string, dryRun bool) error {
	say := func(done string) func([]string) error {
		return func(ids []string) error {
			for _, id := range ids {
				h := repository.Handle{Remote: r.Remote(), ID: id}
				if !a.json {
					a.say("%s %s", strings.ReplaceAll(done, "_", " "), h)
				} else if err := a.printJSON(map[string]string{done: h.String()}); err != nil {
					return err
				}
			}
			return nil
		}
	}
	if dryRun {
		return say("would_forget")(ids)
	}
	return backup.Forget(ctx, r, ids, say("forgotten"))
}
