package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"stillpoint.io/stillpoint/agent/repository"
)

func (a *app) remoteMaintainCommand() *cobra.Command {
	var o repository.MaintainOptions
	c := &cobra.Command{
		Use:   "maintain [NAME]",
		Short: "Do what kopia's maintenance of a remote has due: free the space of what was forgotten, compact indexes",
		Long: `Do what kopia's maintenance of a remote has due: every hour the quick cycle, every 24 hours the full one. Call it as
often as you like, every hour from a timer for example: it does nothing when nothing is due. It may run beside backups
and restores, and may be killed.

Space comes back late, because a backup that runs right now may need what nobody else does: contents go that are 24
hours old and that two full cycles at least 4 hours apart found unused, and with the next cycles the packs that they
were in. With a cycle a day that is three to four days after "forget".

One host maintains a remote, by default the one that made it; the others refuse. --take-over makes this host the one.`,
		Args: arguments(0, 1, "one remote at most"),
		RunE: func(c *cobra.Command, args []string) error {
			return a.maintain(c.Context(), remoteName(args), o)
		},
	}
	c.Flags().BoolVar(&o.Full, "full", false, "the full cycle now, due or not, with the same safety times")
	c.Flags().BoolVar(&o.TakeOver, "take-over", false, "maintain from this host from now on: only if the owner never will again")
	c.Flags().BoolVar(&o.DryRun, "dry-run", false, "only say whose it is and what is due")
	return a.jsonFlag(c)
}

func (a *app) maintain(ctx context.Context, remote string, o repository.MaintainOptions) error {
	r, err := a.repository(ctx, remote)
	if err != nil {
		return err
	}
	defer closeRepository(ctx, r)
	if o.TakeOver && !o.DryRun {
		warn(a.stderr, "the remote %s is maintained from here from now on; see that nobody maintains it elsewhere", remote)
	}
	m, err := r.Maintain(ctx, o)
	if err != nil {
		return err
	}
	if a.json {
		return a.printJSON(m)
	}
	next := fmt.Sprintf("next quick cycle %s, full %s", clock(m.NextQuick), clock(m.NextFull))
	switch {
	case o.DryRun:
		a.say("owner    %s", m.Owner)
		a.say("due      %s", m.Mode)
		a.say("stored   %v", bytesize(m.Before))
		a.say("%s", next)
		return nil
	case m.Mode == "none":
		a.say("nothing is due; %s", next)
		return nil
	}
	row, flush := a.table("TASK", "SECONDS", "RESULT")
	for _, t := range m.Tasks {
		var results []string
		for name, v := range t.Stats {
			if n, ok := v.(float64); ok {
				results = append(results, fmt.Sprintf("%s %.0f", name, n))
			}
		}
		slices.Sort(results)
		row(t.Name, fmt.Sprintf("%.1f", t.Seconds), strings.Join(results, ", "))
	}
	if err := flush(); err != nil {
		return err
	}
	if m.Checkpoints > 0 {
		a.say("dropped %d checkpoints of backups that nobody will continue", m.Checkpoints)
	}
	a.say("%s cycle done: stored %v, before %v; %s", m.Mode, bytesize(m.After), bytesize(m.Before), next)
	return nil
}

// clock prints a time of the schedule.
func clock(t time.Time) string {
	if t.IsZero() {
		return "now"
	}
	return t.Local().Format(time.DateTime)
}
