package main

import (
	"errors"

	"github.com/spf13/cobra"

	"stillpoint.io/stillpoint/fault"
)

func (a *app) remotePassphraseCommand() *cobra.Command {
	var file string
	c := &cobra.Command{
		Use:   "passphrase [NAME] --new-passphrase-file FILE",
		Short: "Make another passphrase open a remote's repository",
		Long: `Make another passphrase open a remote's repository, and the present one no longer. Put the new one where the
configuration says before the next command. Interrupted at any point, one of the two opens it. The key of the data stays
the same: it does not help against somebody who has both the old passphrase and a copy of kopia.repository.`,
		Args: arguments(0, 1, "one remote at most"),
		RunE: func(c *cobra.Command, args []string) (err error) {
			if file == "" {
				return fault.Errorf(fault.Invalid, "name the file with the new passphrase: --new-passphrase-file")
			}
			name := remoteName(args)
			_, old, err := a.config.remote(name)
			if err != nil {
				return err
			}
			next, err := readSecret(file)
			if err != nil {
				return err
			}
			r, err := a.repository(c.Context(), name)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, closeRepository(c.Context(), r)) }()
			if err := r.ChangePassphrase(c.Context(), old, next); err != nil {
				return err
			}
			if a.json {
				return a.printJSON(map[string]string{"remote": name, "passphrase": "changed"})
			}
			a.say("the remote %s opens with the new passphrase now: put it where the configuration says", name)
			return nil
		},
	}
	c.Flags().StringVar(&file, "new-passphrase-file", "", "the `file` that holds the new passphrase")
	return a.jsonFlag(c)
}
