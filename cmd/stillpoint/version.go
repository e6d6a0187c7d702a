package main

import (
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"
)

// version is set by the linker: -X main.version=v1.2.3.
var version = "development"

func (a *app) versionCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  arguments(0, 0, "no arguments"),
		RunE: func(*cobra.Command, []string) error {
			kopia := ""
			if info, ok := debug.ReadBuildInfo(); ok {
				for _, d := range info.Deps {
					if d.Path == "github.com/kopia/kopia" {
						kopia = d.Version
					}
				}
			}
			if a.json {
				return a.printJSON(map[string]string{"version": version, "go": runtime.Version(), "platform": runtime.GOOS + "/" + runtime.GOARCH, "kopia": kopia})
			}
			a.say("stillpoint %s (%s, %s/%s, kopia %s)", version, runtime.Version(), runtime.GOOS, runtime.GOARCH, kopia)
			return nil
		},
	}
	return a.jsonFlag(c)
}
