package repository

import (
	"context"
	"errors"

	"stillpoint.io/stillpoint/adapters"
)

// Location says where a repository is.
type Location struct {
	Path string // a folder of a filesystem
}

// String returns the location as messages show it.
func (l Location) String() string { return l.Path }

// Options are fixed when a repository is created; they are stored in it.
type Options struct {
	// ChunkSize is the unit of change, in bytes: a power of two from MinChunkSize to MaxChunkSize, 0 for DefaultChunkSize.
	ChunkSize int64
}

const (
	MinChunkSize     = 64 << 10
	DefaultChunkSize = 1 << 20
	MaxChunkSize     = 16 << 20
)

// OpenOptions says as whom and how a repository is opened.
type OpenOptions struct {
	Remote   string // the remote's name in handles, "default" if empty
	Host     string // the cluster or host that backups are filed under, the machine's host name if empty
	ReadOnly bool   // every change is refused, also by kopia
}

// Repository is an open kopia repository. Its methods are safe in parallel. Close it.
type Repository struct{}

// Init creates an empty repository. The folder is made if it is not there; Busy if there is a repository already,
// Invalid if there is anything else or an option is out of range.
func Init(ctx context.Context, at Location, passphrase adapters.Secret, o Options) error {
	return errors.ErrUnsupported
}

// Open opens a repository that Init made. NotFound if there is none, Invalid if the passphrase is wrong or the
// repository is not one of ours.
func Open(ctx context.Context, at Location, passphrase adapters.Secret, o OpenOptions) (*Repository, error) {
	return nil, errors.ErrUnsupported
}

// Close releases everything. No call may be under way, and none may follow.
func (r *Repository) Close(ctx context.Context) error { return nil }

// Remote is the name that handles of this repository's backups begin with.
func (r *Repository) Remote() string { return "" }

// ChunkSize is the unit of change, in bytes.
func (r *Repository) ChunkSize() int64 { return 0 }

// Status is what a repository says about itself.
type Status struct {
	Remote    string `json:"remote"`
	Location  string `json:"location"`
	ID        string `json:"id"`         // kopia's unique id, hexadecimal
	ChunkSize int64  `json:"chunk_size"` // bytes
	Backups   int    `json:"backups"`
	Volumes   int    `json:"volumes"`
	Stored    int64  `json:"stored_bytes"` // everything in the folder, bytes
}

// Status counts what is in the repository. It lists every blob.
func (r *Repository) Status(ctx context.Context) (Status, error) {
	return Status{}, errors.ErrUnsupported
}
