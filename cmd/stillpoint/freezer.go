package main

import (
	"os"
	"syscall"

	"github.com/spf13/cobra"

	"stillpoint.io/stillpoint/fault"
)

// freezerCommand becomes the freezer's own program, which is small enough to be locked in memory.
func freezerCommand() *cobra.Command {
	var socket string
	c := &cobra.Command{
		Use:   "freezer --socket PATH",
		Short: "Run the freezer, the small separate program that alone freezes and thaws",
		Long: `Run stillpoint-freezer, which freezes filesystems under a lease for clients of its socket and thaws them whatever
happens. cut starts one for itself; a service runs it once for the node. "freezer sweep" thaws what killed freezers
left frozen.`,
		Args: arguments(0, 0, "no arguments"),
		RunE: func(*cobra.Command, []string) error {
			if socket == "" {
				return fault.Errorf(fault.Invalid, "give the freezer a socket with --socket, in a folder that only root may enter, or say `stillpoint freezer sweep`")
			}
			return become("serve", "--socket", socket, "--records", records())
		},
	}
	c.Flags().StringVar(&socket, "socket", "", "the unix socket to serve")
	c.AddCommand(&cobra.Command{
		Use:   "sweep",
		Short: "Thaw what killed freezers left frozen",
		Args:  arguments(0, 0, "no arguments"),
		RunE:  func(*cobra.Command, []string) error { return become("sweep", "--records", records()) },
	})
	return c
}

// become replaces this process.
func become(args ...string) error {
	program, err := freezerBinary()
	if err != nil {
		return err
	}
	if err := syscall.Exec(program, append([]string{program}, args...), os.Environ()); err != nil {
		return fault.Errorf(fault.Unavailable, "starting %s: %w", program, err)
	}
	return nil
}
