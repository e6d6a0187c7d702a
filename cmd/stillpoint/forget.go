package main

import (
	"github.com/spf13/cobra"

	"stillpoint.io/stillpoint/agent/repository"
)

func (a *app) forgetCommand() *cobra.Command {
	return a.jsonFlag(&cobra.Command{
		Use:   "forget BACKUP...",
		Short: "Remove backups from a remote; the space comes back with the repository's maintenance",
		Args:  arguments(1, -1, "backups"),
		RunE: func(c *cobra.Command, args []string) error {
			return a.inRemotes(c.Context(), args, repository.OpenOptions{}, func(r *repository.Repository, id string) error {
				if err := r.Forget(c.Context(), id); err != nil {
					return err
				}
				h := repository.Handle{Remote: r.Remote(), ID: id}
				if a.json {
					return a.printJSON(map[string]string{"forgotten": h.String()})
				}
				a.say("forgotten %s", h)
				return nil
			})
		},
	})
}
