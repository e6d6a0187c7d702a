package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/backup"
	"stillpoint.io/stillpoint/fault"
)

func (a *app) canaryCommand() *cobra.Command {
	var size int64
	c := &cobra.Command{
		Use:   "canary VOLUME",
		Short: "Try a backend's changed blocks on a small volume of Stillpoint's own",
		Long: `Write a known pattern to VOLUME between two snapshots and demand that the backend lists every write as changed. VOLUME
is made if it does not exist and stays for the next time; one that is not a canary's is refused. Its snapshots are
deleted. Exit code 6 means that the backend missed something: its changed blocks are not to be trusted.

With canary: ID at a backend in the configuration file, the command backup does this first, once for each backend, and
makes full backups if it fails.`,
		Args: arguments(1, 1, "one volume"),
		RunE: func(c *cobra.Command, args []string) error {
			b, id, err := a.volume(c.Context(), args[0])
			if err != nil {
				return err
			}
			return a.canary(c.Context(), backup.CanaryRequest{Adapter: b, Volume: id, Size: size << 20})
		},
	}
	c.Flags().Int64Var(&size, "size", backup.CanarySize>>20, "size of a new volume, in `MiB`")
	return a.jsonFlag(c)
}

func (a *app) canary(ctx context.Context, q backup.CanaryRequest) error {
	report, err := backup.Canary(ctx, q)
	if err != nil && !errors.Is(err, fault.Corrupt) {
		return err
	}
	if a.json {
		return errors.Join(err, a.printJSON(report))
	}
	for _, m := range report.Missed {
		a.say("missed: %s", m)
	}
	if err == nil {
		a.say("%s sings: %s", report.Volume, report.Verdict)
	}
	return err
}

// distrust tries a backend's changed blocks before the first backup of a run uses them, if a canary is configured for
// it, and says why they are not to be used, if so. A canary that somebody else runs right now is no reason.
func (a *app) distrust(ctx context.Context, b adapters.Adapter, backend string) string {
	id := a.config.Backends[backend].Canary
	if id == "" {
		return ""
	}
	a.canariesMu.Lock() // backups of one backend wait for its canary
	defer a.canariesMu.Unlock()
	if why, ok := a.canaries[backend]; ok {
		return why
	}
	_, err := backup.Canary(ctx, backup.CanaryRequest{Adapter: b, Volume: adapters.VolumeID{Backend: backend, ID: id}})
	switch {
	case err == nil:
		a.canaries[backend] = ""
	case errors.Is(err, fault.Busy):
		warn(a.stderr, "the canary of backend %s was not asked: %v", backend, err)
		a.canaries[backend] = ""
	default:
		warn(a.stderr, "every backup of backend %s in this run is a full one: its canary failed: %v", backend, err)
		a.canaries[backend] = fmt.Sprintf("the canary of the backend failed: %v", err)
	}
	return a.canaries[backend]
}
