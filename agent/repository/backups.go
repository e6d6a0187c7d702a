package repository

import (
	"context"
	"errors"
	"time"

	"stillpoint.io/stillpoint/adapters"
)

// Handle names a backup: backup:<remote>/<id>.
type Handle struct{ Remote, ID string }

// String returns the handle.
func (h Handle) String() string { return "backup:" + h.Remote + "/" + h.ID }

// ParseHandle reads a backup's handle. Errors are Invalid.
func ParseHandle(s string) (Handle, error) { return Handle{}, errors.ErrUnsupported }

// Kind is how a backup came about. Every backup is complete by itself.
type Kind string

const (
	Full        Kind = "full"
	Incremental Kind = "incremental"
)

// Backup is the content of a snapshot in a repository, complete by itself.
type Backup struct {
	Handle      Handle               `json:"-"`
	ID          string               `json:"id"` // chosen by whoever started it
	Volume      adapters.VolumeID    `json:"-"`
	Snapshot    adapters.SnapshotID  `json:"-"`
	Kind        Kind                 `json:"kind"`
	Base        string               `json:"base,omitempty"` // id of the backup whose index was reused
	Size        int64                `json:"size"`           // of the volume, bytes
	ChunkSize   int64                `json:"chunk_size"`     // bytes
	Data        int64                `json:"data"`           // bytes in chunks that are not all zero
	Created     time.Time            `json:"created"`        // the snapshot's instant
	Started     time.Time            `json:"started"`
	Finished    time.Time            `json:"finished"`
	Cut         string               `json:"cut,omitempty"`
	Consistency adapters.Consistency `json:"consistency,omitempty"`
	Unverified  []string             `json:"unverified,omitempty"`
}

// Filter narrows a listing. The zero Filter lists everything.
type Filter struct {
	Volume adapters.VolumeID // only this volume's, if not zero
}

// Backups lists the committed backups, newest snapshot first.
func (r *Repository) Backups(ctx context.Context, f Filter) ([]Backup, error) {
	return nil, errors.ErrUnsupported
}

// Backup looks one up by its id. NotFound if there is none.
func (r *Repository) Backup(ctx context.Context, id string) (Backup, error) {
	return Backup{}, errors.ErrUnsupported
}

// Forget deletes the backup's manifest; its data goes with kopia's maintenance as far as no other backup needs it.
// NotFound if there is no such backup.
func (r *Repository) Forget(ctx context.Context, id string) error { return errors.ErrUnsupported }
