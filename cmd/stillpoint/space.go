package main

import (
	"context"
	"time"

	"github.com/spf13/cobra"

	"stillpoint.io/stillpoint/agent/repository"
)

func (a *app) spaceCommand() *cobra.Command {
	var remote string
	c := &cobra.Command{
		Use:   "space [VOLUME]",
		Short: "Show what backups take up in a remote, and what forgetting each would free",
		Long: `Show what backups take up in a remote: bytes as they are stored, compressed and encrypted. UNIQUE is what only that
backup or volume refers to: what comes back when only it is forgotten, with the maintenance.`,
		Args: arguments(0, 1, "one volume at most"),
		RunE: func(c *cobra.Command, args []string) error {
			volume := ""
			if len(args) == 1 {
				volume = args[0]
			}
			return a.space(c.Context(), remote, volume)
		},
	}
	remoteFlag(c, &remote)
	return a.jsonFlag(c)
}

// volumeSpace and backupSpace are lines in JSON, beside repository.Space.
type volumeSpace struct {
	Volume  string `json:"volume"`
	Backups int    `json:"backups"`
	Logical int64  `json:"logical_bytes"`
	Stored  int64  `json:"stored_bytes"`
	Unique  int64  `json:"unique_bytes"`
}

type backupSpace struct {
	Backup  string    `json:"backup"`
	Volume  string    `json:"volume"`
	Created time.Time `json:"created"`
	Size    int64     `json:"size"`
	Unique  int64     `json:"unique_bytes"`
	Shared  int64     `json:"shared_bytes"`
}

func (a *app) space(ctx context.Context, remote, volume string) error {
	filter, err := a.filter(ctx, volume)
	if err != nil {
		return err
	}
	r, err := a.repository(ctx, remote)
	if err != nil {
		return err
	}
	defer closeRepository(ctx, r)
	s, err := r.Space(ctx)
	if err != nil {
		return err
	}
	var wanted []repository.VolumeSpace
	for _, v := range s.Volumes {
		if filter == (repository.Filter{}) || v.Volume == filter.Volume {
			wanted = append(wanted, v)
		}
	}
	if a.json {
		return a.printSpaceJSON(s, wanted)
	}
	row, flush := a.table("VOLUME", "BACKUPS", "LOGICAL", "STORED", "UNIQUE")
	for _, v := range wanted {
		row(v.Volume, len(v.Backups), bytesize(v.Logical), bytesize(v.Stored), bytesize(v.Unique))
	}
	if err := flush(); err != nil {
		return err
	}
	a.say("")
	row, flush = a.table("BACKUP", "CREATED", "SIZE", "UNIQUE", "SHARED")
	for _, v := range wanted {
		for _, b := range v.Backups {
			row(b.Backup.Handle, b.Backup.Created.Local().Format(time.DateTime), bytesize(b.Backup.Size), bytesize(b.Unique), bytesize(b.Shared))
		}
	}
	if err := flush(); err != nil {
		return err
	}
	a.say("")
	a.say("backups      %v", bytesize(s.Backups))
	a.say("unfinished   %v (of interrupted backups, and of kopia's own snapshots)", bytesize(s.Unfinished))
	a.say("manifests    %v", bytesize(s.Manifests))
	a.say("reclaimable  %v (nothing refers to it; maintenance frees it in time)", bytesize(s.Reclaimable))
	a.say("stored       %v (all of the remote, with what waits to be deleted)", bytesize(s.Medium))
	return nil
}

func (a *app) printSpaceJSON(s repository.Space, wanted []repository.VolumeSpace) error {
	if err := a.printJSON(s); err != nil {
		return err
	}
	for _, v := range wanted {
		if err := a.printJSON(volumeSpace{v.Volume.String(), len(v.Backups), v.Logical, v.Stored, v.Unique}); err != nil {
			return err
		}
		for _, b := range v.Backups {
			if err := a.printJSON(backupSpace{b.Backup.Handle.String(), v.Volume.String(), b.Backup.Created.UTC(), b.Backup.Size, b.Unique, b.Shared}); err != nil {
				return err
			}
		}
	}
	return nil
}
