package main

import (
	"github.com/spf13/cobra"

	"stillpoint.io/stillpoint/agent/repository"
)

func (a *app) remoteCheckCommand() *cobra.Command {
	var o repository.CheckOptions
	var size int64
	c := &cobra.Command{
		Use:   "check [NAME]",
		Short: "Prove that a remote can hold backups, before anyone trusts it",
		Long: `Writes, reads, lists and deletes objects of its own in a folder below the remote, and removes them again. Nothing else
there is touched, and there need not be a repository yet. Each step says what was found, or what is wrong and what to do
about it; the exit code is that of the first failure. A warning is no failure: backups will work.`,
		Args: arguments(0, 1, "one remote at most"),
		RunE: func(c *cobra.Command, args []string) error {
			at, err := a.config.location(remoteName(args))
			if err != nil {
				return err
			}
			o.Bytes = size << 20
			var printed error
			if !a.json {
				a.say("checking %s", at)
			}
			err = repository.Check(c.Context(), at, o, func(s repository.Step) {
				if a.json {
					if e := a.printJSON(s); e != nil {
						printed = e
					}
					return
				}
				a.say("%-8s %-12s %s", s.Result, s.Name, s.Text)
			})
			if err != nil {
				return err
			}
			return printed
		},
	}
	c.Flags().BoolVar(&o.ObjectLock, "object-lock", false, "the bucket must keep objects that are retained")
	c.Flags().Int64Var(&size, "size", repository.DefaultCheckBytes>>20, "how many `MiB` to write and read to measure the throughput")
	return a.jsonFlag(c)
}
