package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"stillpoint.io/stillpoint/agent/repository"
	"stillpoint.io/stillpoint/fault"
)

func (a *app) backupsCommand() *cobra.Command {
	var remote string
	c := &cobra.Command{
		Use:   "backups [VOLUME]",
		Short: "List the backups in a remote",
		Args:  arguments(0, 1, "one volume at most"),
		RunE: func(c *cobra.Command, args []string) error {
			return a.listBackups(c.Context(), remote, args)
		},
	}
	remoteFlag(c, &remote)
	return a.jsonFlag(c)
}

func (a *app) listBackups(ctx context.Context, remote string, args []string) error {
	volume := ""
	if len(args) == 1 {
		volume = args[0]
	}
	filter, err := a.filter(ctx, volume)
	if err != nil {
		return err
	}
	r, err := a.repository(ctx, remote)
	if err != nil {
		return err
	}
	defer closeRepository(ctx, r)
	found, err := r.Backups(ctx, filter)
	if err != nil {
		return err
	}
	if a.json {
		for _, b := range found {
			if err := a.printJSON(b); err != nil {
				return err
			}
		}
		return nil
	}
	row, flush := a.table("BACKUP", "KIND", "SIZE", "DATA", "CREATED", "VERIFIED", "SNAPSHOT")
	for _, b := range found {
		row(b.Handle, b.Kind, bytesize(b.Size), bytesize(b.Data), b.Created.Local().Format(time.DateTime), verified(b), b.Snapshot)
	}
	return flush()
}

// verified tells how long ago a backup was verified, and that it is suspect.
func verified(b repository.Backup) string {
	s := "never"
	if !b.Verified.IsZero() {
		s = age(time.Since(b.Verified)) + " ago"
	}
	if b.Suspect != "" {
		s += ", SUSPECT"
	}
	return s
}

// filter narrows a listing to a volume, if it is not empty.
func (a *app) filter(ctx context.Context, volume string) (repository.Filter, error) {
	if volume == "" {
		return repository.Filter{}, nil
	}
	b, id, err := a.volume(ctx, volume)
	if err != nil {
		return repository.Filter{}, err
	}
	v, err := b.Volume(ctx, id)
	switch {
	case err == nil:
		id = v.ID
	case !errors.Is(err, fault.NotFound) && !errors.Is(err, fault.Unavailable):
		return repository.Filter{}, err // a volume that is gone may have backups under its canonical id
	}
	return repository.Filter{Volume: id}, nil
}

// inRemotes calls f for each backup handle with its repository, opening each remote once.
func (a *app) inRemotes(ctx context.Context, handles []string, o repository.OpenOptions, f func(*repository.Repository, string) error) error {
	return a.inRemotesThen(ctx, handles, o, f, func() error { return nil })
}

// inRemotesThen is inRemotes, with something to do at the end if all went well, while the remotes are still open.
func (a *app) inRemotesThen(ctx context.Context, handles []string, o repository.OpenOptions, f func(*repository.Repository, string) error, then func() error) (err error) {
	var parsed []repository.Handle
	for _, s := range handles {
		h, err := repository.ParseHandle(s)
		if err != nil {
			return err
		}
		parsed = append(parsed, h)
	}
	open := map[string]*repository.Repository{}
	defer func() {
		for _, r := range open {
			err = errors.Join(err, closeRepository(ctx, r))
		}
	}()
	var errs []error
	for _, h := range parsed {
		r, ok := open[h.Remote]
		if !ok {
			var err error
			if r, err = a.openRepository(ctx, h.Remote, o); err != nil {
				return err
			}
			open[h.Remote] = r
		}
		if err := f(r, h.ID); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", h, err))
		}
	}
	if len(errs) == 0 {
		errs = append(errs, then())
	}
	return errors.Join(errs...)
}
