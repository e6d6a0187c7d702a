package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"stillpoint.io/stillpoint/adapters"
)

// snapshotLine is a snapshot as `snapshots --json` prints it.
type snapshotLine struct {
	Snapshot    string               `json:"snapshot"`
	Volume      string               `json:"volume"`
	Name        string               `json:"name"` // the name that was asked for
	Size        int64                `json:"size"`
	Created     time.Time            `json:"created"`
	State       string               `json:"state"`
	Cut         string               `json:"cut"`
	Instant     string               `json:"instant"`
	Consistency adapters.Consistency `json:"consistency"`
	Unverified  []string             `json:"unverified,omitempty"`
}

func (a *app) snapshotsCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "snapshots [VOLUME | BACKEND:]",
		Short: "List the verified snapshots of a volume, a backend, or all backends",
		Args:  arguments(0, 1, "one volume or backend at most"),
		RunE: func(c *cobra.Command, args []string) error {
			found, err := a.findSnapshots(c.Context(), args)
			if err != nil {
				return err
			}
			slices.SortFunc(found, func(x, y adapters.Snapshot) int {
				if o := strings.Compare(x.ID.Volume.String(), y.ID.Volume.String()); o != 0 {
					return o
				}
				return x.Created.Compare(y.Created)
			})
			if a.json {
				for _, s := range found {
					line := snapshotLine{s.ID.String(), s.ID.Volume.String(), s.Wanted, s.Size, s.Created, s.State.String(), s.Notes.Cut, s.Notes.Instant, s.Notes.Consistency, s.Notes.Unverified}
					if err := a.printJSON(line); err != nil {
						return err
					}
				}
				return nil
			}
			row, flush := a.table("SNAPSHOT", "SIZE", "CREATED", "CONSISTENCY", "STATE")
			for _, s := range found {
				row(s.ID, bytesize(s.Size), s.Created.Local().Format(time.DateTime), s.Notes.Consistency, s.State)
			}
			return flush()
		},
	}
	return a.jsonFlag(c)
}

// findSnapshots lists by what was named: a volume, a backend ("reflink:"), or nothing for all backends.
func (a *app) findSnapshots(ctx context.Context, args []string) ([]adapters.Snapshot, error) {
	var filter adapters.Filter
	var backends []string
	switch name, isBackend := "", false; {
	case len(args) == 0:
		for name := range a.config.Backends {
			backends = append(backends, name)
		}
	default:
		if name, isBackend = strings.CutSuffix(args[0], ":"); isBackend {
			backends = []string{name}
			break
		}
		b, id, err := a.volume(ctx, args[0])
		if err != nil {
			return nil, err
		}
		v, err := b.Volume(ctx, id)
		if err != nil {
			return nil, err
		}
		filter.Volume, backends = v.ID, []string{v.ID.Backend}
	}
	var found []adapters.Snapshot
	for _, name := range backends {
		b, err := a.backend(ctx, name)
		if err != nil {
			return nil, err
		}
		for s, err := range b.Snapshots(ctx, filter) {
			if err != nil {
				return nil, fmt.Errorf("backend %q: %w", name, err)
			}
			found = append(found, s)
		}
	}
	return found, nil
}

func (a *app) deleteCommand() *cobra.Command {
	return a.jsonFlag(&cobra.Command{
		Use:   "delete HANDLE...",
		Short: "Delete snapshots that Stillpoint made",
		Args:  arguments(1, -1, "snapshots"),
		RunE: func(c *cobra.Command, args []string) error {
			var errs []error
			for _, s := range args {
				b, id, err := a.snapshot(c.Context(), s)
				if err == nil {
					_, err = b.Snapshot(c.Context(), id) // so that a mistyped handle is not success
				}
				if err == nil {
					err = b.DeleteSnapshot(c.Context(), id)
				}
				if err != nil {
					errs = append(errs, err)
					continue
				}
				if a.json {
					errs = append(errs, a.printJSON(map[string]string{"deleted": id.String()}))
				} else {
					a.say("deleted %s", id)
				}
			}
			return errors.Join(errs...)
		},
	})
}
