// Package backup makes backups of snapshots, restores and verifies them.
package backup

import (
	"context"
	"errors"
	"sync/atomic"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/repository"
)

// Budget bounds what one backup, restore or verification uses. The zero Budget means DefaultBudget.
type Budget struct {
	Memory  int64 // bytes for buffers and for packs on their way to the repository
	Workers int   // chunks read, hashed and stored at once, 0 for what the memory and the processors suggest
}

// Progress is what a running backup, restore or verification has done so far; whoever shows it polls. All are bytes.
type Progress struct {
	Total atomic.Int64 // to do, as far as known: grows while the changed blocks are listed
	Done  atomic.Int64 // read or written so far
}

// Request asks for a backup of a snapshot.
type Request struct {
	Adapter    adapters.Adapter // must be able to open the snapshot
	Snapshot   adapters.SnapshotID
	Repository *repository.Repository
	ID         string // the backup's id; empty: derived from the snapshot's handle
	Full       bool   // reuse nothing
	Budget     Budget
	Progress   *Progress // may be nil
}

// Report is what a backup did. Counts are bytes.
type Report struct {
	Backup       string          `json:"backup"`         // its handle
	Snapshot     string          `json:"snapshot"`       // its handle
	Kind         repository.Kind `json:"kind"`           // full or incremental
	Base         string          `json:"base,omitempty"` // handle of the backup that an incremental reuses
	Reason       string          `json:"reason"`         // why it is full or incremental
	Size         int64           `json:"size"`           // of the volume
	BytesRead    int64           `json:"bytes_read"`     // from the snapshot, for the changed chunks
	BytesAudited int64           `json:"bytes_audited"`  // from the snapshot, to distrust the changed blocks
	BytesNew     int64           `json:"bytes_new"`      // in chunks that the repository did not have
	BytesReused  int64           `json:"bytes_reused"`   // in chunks that it had
	BytesStored  int64           `json:"bytes_stored"`   // written to the repository, compressed, with indexes
	Seconds      float64         `json:"seconds"`
	Existed      bool            `json:"existed,omitempty"` // the backup was there already, nothing was done
	Warnings     []string        `json:"warnings,omitempty"`
}

// Plan says what a backup will do and why.
type Plan struct {
	ID       string
	Snapshot adapters.Snapshot
	Kind     repository.Kind
	Base     *repository.Backup // of an incremental
	Reason   string
	Existing *repository.Backup // the backup is there already: nothing to do
}

// String is the plan in a sentence.
func (p Plan) String() string { return p.Reason }

// Prepare asks the backend and the repository what they have, and decides. It changes nothing.
func Prepare(ctx context.Context, q Request) (Plan, error) { return Plan{}, errors.ErrUnsupported }

// Run makes the backup.
func Run(ctx context.Context, q Request) (Report, error) { return Report{}, errors.ErrUnsupported }

// Source is what a restore reads: FromBackup or FromSnapshot.
type Source struct {
	repository *repository.Repository
	backup     string
	adapter    adapters.Adapter
	snapshot   adapters.SnapshotID
}

// FromBackup restores a backup, by its id in the repository.
func FromBackup(r *repository.Repository, id string) Source {
	return Source{repository: r, backup: id}
}

// FromSnapshot restores straight from a snapshot that still exists in its backend.
func FromSnapshot(a adapters.Adapter, id adapters.SnapshotID) Source {
	return Source{adapter: a, snapshot: id}
}

// RestoreRequest asks for a source as a volume.
type RestoreRequest struct {
	Source    Source
	Target    adapters.Adapter // must be a Restorer
	Volume    adapters.VolumeID
	Size      int64 // bytes; 0: the source's size. Smaller than the source is Invalid, more reads as zeros
	Overwrite bool  // write over an existing volume
	Budget    Budget
	Progress  *Progress // may be nil
}

// RestoreReport is what a restore did. Counts are bytes.
type RestoreReport struct {
	Source       string  `json:"source"` // handle of the backup or snapshot
	Volume       string  `json:"volume"` // handle of the volume that was made
	Path         string  `json:"path,omitempty"`
	Size         int64   `json:"size"`
	BytesWritten int64   `json:"bytes_written"` // data
	BytesZeroed  int64   `json:"bytes_zeroed"`  // zeros written because the target might have held something
	Seconds      float64 `json:"seconds"`
}

// Restore makes the source into a volume, or writes it over one.
func Restore(ctx context.Context, q RestoreRequest) (RestoreReport, error) {
	return RestoreReport{}, errors.ErrUnsupported
}

// VerifyRequest asks whether a backup can be restored.
type VerifyRequest struct {
	Repository *repository.Repository
	ID         string
	Budget     Budget
	Progress   *Progress // may be nil
}

// VerifyReport is what a verification found. A bad backup is a report with Bad, and an error of kind Corrupt.
type VerifyReport struct {
	Backup        string   `json:"backup"`
	Size          int64    `json:"size"`
	BytesVerified int64    `json:"bytes_verified"` // in chunks that were read, decrypted and compared with their hash
	Bad           []string `json:"bad,omitempty"`  // what is wrong, by offset; the first hundred
	BadBytes      int64    `json:"bad_bytes"`
	Seconds       float64  `json:"seconds"`
}

// Verify reads every chunk of a backup and checks it, and that its index and its description fit together.
func Verify(ctx context.Context, q VerifyRequest) (VerifyReport, error) {
	return VerifyReport{}, errors.ErrUnsupported
}
