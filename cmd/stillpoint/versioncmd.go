package main

import (
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/adapters/registry"
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

func (a *app) adaptersCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "adapters",
		Short: "List the adapters, what they can do and their parameters",
		Args:  arguments(0, 0, "no arguments"),
		RunE: func(c *cobra.Command, _ []string) error {
			for i, k := range registry.Kinds() {
				if a.json {
					if err := a.printJSON(describe(k)); err != nil {
						return err
					}
					continue
				}
				if i > 0 {
					a.say("")
				}
				d := describe(k)
				a.say("%s: %s", d.Name, d.Summary)
				for _, key := range d.Parameters {
					needed := ""
					if key.Required {
						needed = " (required)"
					}
					a.say("  %s%s: %s", key.Name, needed, key.Usage)
				}
			}
			return nil
		},
	}
	return a.jsonFlag(c)
}

type adapterDescription struct {
	Name       string         `json:"name"`
	Summary    string         `json:"summary"`
	Parameters []adapters.Key `json:"parameters"`
}

func describe(k adapters.Kind) adapterDescription {
	return adapterDescription{k.Name, k.Summary, k.Keys}
}
