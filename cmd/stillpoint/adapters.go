package main

import (
	"context"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/adapters/registry"
)

// adapterLine is an adapter as `adapters --json` prints it, with the backends that are configured for it.
type adapterLine struct {
	Name       string        `json:"name"`
	Summary    string        `json:"summary"`
	Parameters []keyLine     `json:"parameters"`
	Backends   []backendLine `json:"backends"`
}

type keyLine struct {
	Name     string `json:"name"`
	Usage    string `json:"usage"`
	Required bool   `json:"required"`
	Secret   bool   `json:"secret"`
}

type backendLine struct {
	Name string `json:"name"`
	adapters.Capabilities
	Error string `json:"error,omitempty"` // why it cannot be opened
}

func (a *app) adaptersCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "adapters",
		Short: "List the adapters, their parameters, and what the configured backends can do",
		Args:  arguments(0, 0, "no arguments"),
		RunE: func(c *cobra.Command, _ []string) error {
			for i, k := range registry.Kinds() {
				line := a.describe(c.Context(), k)
				if a.json {
					if err := a.printJSON(line); err != nil {
						return err
					}
					continue
				}
				if i > 0 {
					a.say("")
				}
				a.printAdapter(line)
			}
			return nil
		},
	}
	return a.jsonFlag(c)
}

// describe tells about an adapter. A backend that cannot be opened is part of the answer, not an error.
func (a *app) describe(ctx context.Context, k adapters.Kind) adapterLine {
	line := adapterLine{Name: k.Name, Summary: k.Summary, Parameters: []keyLine{}, Backends: []backendLine{}}
	for _, key := range k.Keys {
		line.Parameters = append(line.Parameters, keyLine{key.Name, key.Usage, key.Required, key.Secret})
	}
	for name, b := range a.config.Backends {
		if b.Adapter != k.Name {
			continue
		}
		opened, err := a.backend(ctx, name)
		if err != nil {
			line.Backends = append(line.Backends, backendLine{Name: name, Error: err.Error()})
			continue
		}
		line.Backends = append(line.Backends, backendLine{Name: name, Capabilities: adapters.CapabilitiesOf(opened)})
	}
	slices.SortFunc(line.Backends, func(x, y backendLine) int { return strings.Compare(x.Name, y.Name) })
	return line
}

func (a *app) printAdapter(line adapterLine) {
	a.say("%s: %s", line.Name, line.Summary)
	for _, key := range line.Parameters {
		words := ""
		if key.Required {
			words += ", required"
		}
		if key.Secret {
			words += ", secret"
		}
		a.say("  parameter %s%s: %s", key.Name, words, key.Usage)
	}
	for _, b := range line.Backends {
		if b.Error != "" {
			a.say("  backend %s: cannot be opened: %s", b.Name, b.Error)
			continue
		}
		var can []string
		for ability, has := range b.Abilities {
			if has {
				can = append(can, ability)
			}
		}
		slices.Sort(can)
		a.say("  backend %s can %s", b.Name, strings.Join(can, ", "))
		a.say("    quiesce         %s", b.Quiesce)
		a.say("    changed blocks  %s", b.Changed)
		a.say("    point in time   %s", b.PointInTime)
	}
}
