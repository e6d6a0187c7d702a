package main

import (
	"time"

	"github.com/spf13/cobra"

	"stillpoint.io/stillpoint/agent/backup"
	"stillpoint.io/stillpoint/agent/repository"
)

func (a *app) remoteCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "remote",
		Short: "Try a remote, create or look at its repository",
		Args:  cobra.ArbitraryArgs,
		RunE:  subcommand,
	}
	c.AddCommand(a.remoteInitCommand(), a.remoteStatusCommand(), a.remoteMaintainCommand(), a.remoteCheckCommand(), a.remotePassphraseCommand())
	return c
}

func (a *app) remoteInitCommand() *cobra.Command {
	var chunk int64
	var retain, mode string
	c := &cobra.Command{
		Use:   "init [NAME]",
		Short: "Create the repository of a remote",
		Args:  arguments(0, 1, "one remote at most"),
		RunE: func(c *cobra.Command, args []string) error {
			name := remoteName(args)
			at, passphrase, err := a.config.remote(name)
			if err != nil {
				return err
			}
			o := repository.Options{ChunkSize: chunk << 10, RetainMode: repository.RetainMode(mode)}
			if o.Retain, err = parseAge("--retain", retain); err != nil {
				return err
			}
			if err := repository.Init(c.Context(), at, passphrase, o); err != nil {
				return err
			}
			if a.json {
				return a.printJSON(map[string]string{"remote": name, "location": at.String()})
			}
			a.say("the remote %s is ready in %s; without its passphrase nobody can read it, you included", name, at)
			return nil
		},
	}
	c.Flags().Int64Var(&chunk, "chunk-size", repository.DefaultChunkSize>>10, "the unit of change in `KiB`, a power of two from 64 to 16384; it cannot be changed later")
	c.Flags().StringVar(&retain, "retain", "", "have the bucket's object lock keep every blob for a `time` such as 30d, which maintenance begins anew each day; 48h or longer")
	c.Flags().StringVar(&mode, "retain-mode", "", "how: `governance`, which a special permission breaks (the default), or compliance, which nobody can break")
	return a.jsonFlag(c)
}

func (a *app) remoteStatusCommand() *cobra.Command {
	return a.jsonFlag(&cobra.Command{
		Use:   "status [NAME]",
		Short: "Show what is in a remote's repository",
		Args:  arguments(0, 1, "one remote at most"),
		RunE: func(c *cobra.Command, args []string) error {
			r, err := a.repository(c.Context(), remoteName(args))
			if err != nil {
				return err
			}
			defer closeRepository(c.Context(), r)
			s, err := r.Status(c.Context())
			if err != nil {
				return err
			}
			looked, err := backup.OldestUnaudited(c.Context(), r)
			if err != nil {
				return err
			}
			if a.json {
				return a.printJSON(newStatusLine(s, looked))
			}
			a.say("remote      %s", s.Remote)
			a.say("location    %s", s.Location)
			a.say("repository  %s (kopia)", s.ID)
			a.say("chunk size  %v", bytesize(s.ChunkSize))
			a.say("backups     %d of %d volumes", s.Backups, s.Volumes)
			a.say("stored      %v", bytesize(s.Stored))
			if s.RetainMode != "" {
				a.say("retained    for %s each blob (%s), begun anew by full maintenance", age(time.Duration(s.RetainSeconds)*time.Second), s.RetainMode)
			}
			if len(looked) > 0 {
				a.say("unaudited   %s", describeUnaudited(looked[0], time.Now()))
			}
			if s.Unverified != nil {
				a.say("unverified  for %s at most: %s (%d of the backups were never verified)", age(time.Since(s.UnverifiedSince)), s.Unverified, s.NeverVerified)
			}
			a.say("suspect     %d", s.Suspect)
			return nil
		},
	})
}

func remoteName(args []string) string {
	if len(args) == 0 {
		return defaultRemote
	}
	return args[0]
}
