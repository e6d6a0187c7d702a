package repository

import (
	"cmp"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math/bits"
	"os"
	"strings"
	"time"

	"github.com/kopia/kopia/repo"
	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/blob/throttling"
	"github.com/kopia/kopia/repo/format"
	"github.com/kopia/kopia/repo/hashing"
	"github.com/kopia/kopia/repo/maintenance"
	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

// Options are fixed when a repository is created; they are stored in it.
type Options struct {
	// ChunkSize is the unit of change, in bytes: a power of two from MinChunkSize to MaxChunkSize, 0 for DefaultChunkSize.
	ChunkSize int64
	// Host is the cluster or host whose agents will run kopia's maintenance, the machine's host name if empty. It should
	// be the one that they open the repository with.
	Host string
	// Retain is for how long the store's object lock keeps each blob from being deleted or changed, by whomever, 0 for not at
	// all. Full maintenance begins the time anew for whatever is there then, so it must be MinRetain or longer. Only a bucket
	// with object lock can do it.
	Retain     time.Duration
	RetainMode RetainMode // Governance if empty

	derivation derivation
}

// RetainMode is how an object lock holds.
type RetainMode string

const (
	Governance RetainMode = "governance" // whoever has a special permission can break it
	Compliance RetainMode = "compliance" // nobody can, the store's owner included

	// MinRetain is a day longer than kopia lets pass between two full cycles of maintenance.
	MinRetain = 48 * time.Hour
)

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
	Uncached bool   // what is read comes from the remote and never from a copy on this machine
	Locks    string // a folder for locks between the processes of this host, see Lock; empty: there are none
	// UploadBytes and DownloadBytes bound what goes to the medium and comes from it, in bytes a second; 0: no limit.
	UploadBytes, DownloadBytes int64

	skews skews
}

// Repository is an open kopia repository. Its methods are safe in parallel. Close it. Nothing of it is kept on this
// machine but what S3.Cache asks for: kopia's index of all contents is in memory while the repository is open, about 60
// bytes for each chunk that is stored.
type Repository struct {
	at       Location
	medium   blob.Storage // what is really there, with no cache in between
	remote   string
	host     string
	settings settings
	kopia    repo.DirectRepository
	hash     hashing.HashFunc
	zeros    zeros
	locks    string
	locked   volumes
}

// settings is the manifest, of type settingsType, by which a kopia repository is one of ours.
type settings struct {
	Version   int   `json:"version"`    // of the layout of a backup; layoutVersion
	ChunkSize int64 `json:"chunk_size"` // bytes
}

const (
	settingsType  = "stillpoint"
	layoutVersion = 1
	userName      = "stillpoint" // in kopia's source, before the @
)

// Init creates an empty repository. A folder is made if it is not there, a bucket is not. Busy if there is a repository
// already, Invalid if there is anything else, the location is wrong or an option is out of range.
func Init(ctx context.Context, at Location, passphrase adapters.Secret, o Options) error {
	return within(ctx, func(ctx context.Context) error { return create(ctx, at, passphrase, o) })
}

func create(ctx context.Context, at Location, passphrase adapters.Secret, o Options) error {
	o.ChunkSize = cmp.Or(o.ChunkSize, DefaultChunkSize)
	if o.ChunkSize < MinChunkSize || o.ChunkSize > MaxChunkSize || bits.OnesCount64(uint64(o.ChunkSize)) != 1 {
		return fault.Errorf(fault.Invalid, "chunk size %d: must be a power of two from %d to %d", o.ChunkSize, MinChunkSize, MaxChunkSize)
	}
	if passphrase.Reveal() == "" {
		return fault.Errorf(fault.Invalid, "repository %s: the passphrase is empty", at)
	}
	retain, err := o.retention(at)
	if err != nil {
		return err
	}
	st, err := at.create(ctx)
	if err != nil {
		return err
	}
	defer st.Close(context.WithoutCancel(ctx))
	if b, ok := st.(*bucket); ok && retain.IsRetentionEnabled() {
		if err := b.locks(ctx); err != nil {
			return at.fault("creating", err)
		}
	}
	err = repo.Initialize(ctx, st, &repo.NewRepositoryOptions{
		FormatBlockKeyDerivationAlgorithm: string(cmp.Or(o.derivation, scrypt)),
		RetentionMode:                     retain.RetentionMode, RetentionPeriod: retain.RetentionPeriod,
		BlockFormat:  format.ContentFormat{Hash: "BLAKE3-256", Encryption: "AES256-GCM-HMAC-SHA256"},
		ObjectFormat: format.ObjectFormat{Splitter: "FIXED-1M"}, // of kopia's own files, and of our indexes' top level
	}, passphrase.Reveal())
	if errors.Is(err, repo.ErrAlreadyInitialized) {
		return fault.Errorf(fault.Busy, "repository %s: there is one already", at)
	} else if err != nil {
		return at.fault("creating", err)
	}
	if _, err := copyFormat(ctx, st, retain, false); err != nil {
		return at.fault("creating", err)
	}
	host, err := hostOr(o.Host)
	if err != nil {
		return err
	}
	k, err := connect(ctx, at, st, passphrase, OpenOptions{Host: host})
	if err != nil {
		return err
	}
	err = repo.WriteSession(ctx, k, repo.WriteSessionOptions{Purpose: "stillpoint init"}, func(ctx context.Context, w repo.RepositoryWriter) error {
		p := maintenance.DefaultParams()
		p.Owner = k.ClientOptions().UsernameAtHost()
		p.ExtendObjectLocks = retain.IsRetentionEnabled()
		if err := maintenance.SetParams(ctx, w, &p); err != nil {
			return err
		}
		_, err := w.PutManifest(ctx, map[string]string{"type": settingsType}, settings{Version: layoutVersion, ChunkSize: o.ChunkSize})
		return err
	})
	return at.fault("creating", errors.Join(err, k.Close(ctx)))
}

// retention is how kopia is told.
func (o Options) retention(at Location) (c format.BlobStorageConfiguration, err error) {
	mode := cmp.Or(o.RetainMode, Governance)
	switch {
	case o.Retain == 0 && o.RetainMode == "":
		return c, nil
	case mode != Governance && mode != Compliance:
		return c, fault.Errorf(fault.Invalid, "retention mode %q: must be %s or %s", mode, Governance, Compliance)
	case o.Retain < MinRetain:
		return c, fault.Errorf(fault.Invalid, "blobs retained for %v: must be %v or longer, so that maintenance, which begins the time anew every day, comes early enough", o.Retain, MinRetain)
	case at.S3 == nil:
		return c, fault.Errorf(fault.Unsupported, "repository %s: a folder has no object lock; a bucket can have it", at)
	}
	c.RetentionMode, c.RetentionPeriod = blob.RetentionMode(strings.ToUpper(string(mode))), o.Retain
	return c, nil
}

func hostOr(name string) (string, error) {
	if name != "" {
		return name, nil
	}
	name, err := os.Hostname()
	if err != nil {
		return "", fmt.Errorf("the name of this host: %w", err)
	}
	return name, nil
}

// Open opens a repository that Init made. NotFound if there is none, Invalid if the passphrase is wrong or the
// repository is not one of ours.
func Open(ctx context.Context, at Location, passphrase adapters.Secret, o OpenOptions) (r *Repository, err error) {
	err = within(ctx, func(ctx context.Context) error {
		r, err = open(ctx, at, passphrase, o)
		return err
	})
	return r, err
}

func open(ctx context.Context, at Location, passphrase adapters.Secret, o OpenOptions) (*Repository, error) {
	var err error
	if o.Host, err = hostOr(o.Host); err != nil {
		return nil, err
	}
	medium, err := at.open(ctx)
	if err != nil {
		return nil, err
	}
	k, err := connect(ctx, at, medium, passphrase, o)
	if err != nil {
		err = diagnosed(ctx, at, medium, passphrase, o, err)
		return nil, errors.Join(err, medium.Close(context.WithoutCancel(ctx)))
	}
	r := &Repository{
		at: at, medium: medium, remote: cmp.Or(o.Remote, "default"), host: o.Host, kopia: k,
		hash: k.FormatManager().HashFunc(), locks: o.Locks,
	}
	if err := r.loadSettings(ctx); err != nil {
		err = diagnosed(ctx, at, medium, passphrase, o, err)
		return nil, errors.Join(err, r.Close(context.WithoutCancel(ctx)))
	}
	return r, nil
}

func (r *Repository) loadSettings(ctx context.Context) error {
	found, err := r.kopia.FindManifests(ctx, map[string]string{"type": settingsType})
	if err != nil {
		return r.corrupt(err)
	}
	if len(found) == 0 {
		return fault.Errorf(fault.Invalid, "repository %s: a kopia repository that `stillpoint remote init` did not make; give Stillpoint one of its own", r.at)
	}
	if _, err := r.kopia.GetManifest(ctx, found[0].ID, &r.settings); err != nil {
		return r.corrupt(err)
	}
	if r.settings.Version != layoutVersion {
		return fault.Errorf(fault.Unsupported, "repository %s: its layout is version %d, this program knows %d; use a newer one", r.at, r.settings.Version, layoutVersion)
	}
	return nil
}

// connect opens the repository with kopia. Kopia wants its configuration in a file: one in memory, without the
// passphrase. It says nothing about a cache, not even that there is none: then KOPIA_CACHE_DIRECTORY would make one, and
// what another repository left there would be taken for this one's. Our own cache is below kopia, in the storage.
func connect(ctx context.Context, at Location, medium blob.Storage, passphrase adapters.Secret, o OpenOptions) (repo.DirectRepository, error) {
	registerFolder()
	registerBucket()
	id, err := at.identify(ctx, medium)
	if err != nil {
		return nil, err
	}
	storage := at.connection(id, !o.Uncached)
	switch c := storage.Config.(type) {
	case *folderOptions:
		c.Skew = o.skews.medium
	case *bucketOptions:
		c.Skew = o.skews.medium
	}
	config, err := json.Marshal(repo.LocalConfig{
		Storage: storage,
		ClientOptions: repo.ClientOptions{
			Hostname: o.Host, Username: userName, Description: at.String(), ReadOnly: o.ReadOnly,
			Throttling:              &throttling.Limits{UploadBytesPerSecond: float64(o.UploadBytes), DownloadBytesPerSecond: float64(o.DownloadBytes)},
			FormatBlobCacheDuration: format.DefaultRepositoryBlobCacheDuration,
		},
	})
	if err != nil {
		return nil, err
	}
	fd, err := unix.MemfdCreate("stillpoint-kopia-config", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("memfd_create: %w", err)
	}
	file := os.NewFile(uintptr(fd), fmt.Sprintf("/proc/self/fd/%d", fd))
	defer file.Close()
	if _, err := file.Write(config); err != nil {
		return nil, err
	}
	usePlainS2()
	k, err := repo.Open(ctx, file.Name(), passphrase.Reveal(), &repo.Options{
		DisableRepositoryLog: true,
		TimeNowFunc:          o.skews.now(),
		DoNotWaitForUpgrade:  true,
		OnFatalError:         func(error) {}, // the same error is returned; kopia's default ends the process
	})
	if errors.Is(err, repo.ErrInvalidPassword) {
		return nil, fault.Errorf(fault.Invalid, "repository %s: wrong passphrase", at)
	} else if err != nil {
		return nil, at.fault("opening", err)
	}
	return k.(repo.DirectRepository), nil
}

// Close releases everything. No call may be under way, and none may follow.
func (r *Repository) Close(ctx context.Context) error {
	err := within(ctx, r.kopia.Close)
	return r.at.fault("closing", errors.Join(err, r.medium.Close(ctx)))
}

// Remote is the name that handles of this repository's backups begin with.
func (r *Repository) Remote() string { return r.remote }

// ChunkSize is the unit of change, in bytes.
func (r *Repository) ChunkSize() int64 { return r.settings.ChunkSize }

// Status is what a repository says about itself.
type Status struct {
	Remote    string    `json:"remote"`
	Location  string    `json:"location"`
	ID        string    `json:"id"`         // kopia's unique id, hexadecimal
	ChunkSize int64     `json:"chunk_size"` // bytes
	Backups   int       `json:"backups"`
	Volumes   int       `json:"volumes"`
	Newest    time.Time `json:"newest,omitzero"` // the instant of the newest snapshot that is backed up
	Stored    int64     `json:"stored_bytes"`    // all blobs together
	// Unverified is the backup that nobody has verified for the longest time, and since when: its last full verification,
	// or that it was made.
	Unverified      *Handle   `json:"unverified,omitempty"`
	UnverifiedSince time.Time `json:"unverified_since,omitzero"`
	NeverVerified   int       `json:"never_verified"` // backups
	Suspect         int       `json:"suspect"`        // backups
	// RetainMode and RetainSeconds are how the store keeps blobs from being deleted, if it was asked to.
	RetainMode    RetainMode `json:"retain_mode,omitempty"`
	RetainSeconds int64      `json:"retain_seconds,omitempty"`
}

// Status counts what is in the repository. It lists every blob.
func (r *Repository) Status(ctx context.Context) (Status, error) {
	backups, err := r.Backups(ctx, Filter{})
	if err != nil {
		return Status{}, err
	}
	s := Status{Remote: r.remote, Location: r.at.String(), ID: hex.EncodeToString(r.kopia.UniqueID()), ChunkSize: r.ChunkSize(), Backups: len(backups)}
	volumes := map[adapters.VolumeID]bool{}
	for _, b := range backups {
		volumes[b.Volume] = true
		if b.Created.After(s.Newest) {
			s.Newest = b.Created
		}
	}
	s.Volumes = len(volumes)
	s.standing(backups)
	c, err := r.kopia.FormatManager().BlobCfgBlob(ctx)
	if err != nil {
		return Status{}, r.corrupt(err)
	}
	if c.IsRetentionEnabled() {
		s.RetainMode, s.RetainSeconds = RetainMode(strings.ToLower(string(c.RetentionMode))), int64(c.RetentionPeriod/time.Second)
	}
	err = r.kopia.BlobReader().ListBlobs(ctx, "", func(m blob.Metadata) error {
		s.Stored += m.Length
		return nil
	})
	return s, r.at.fault("listing", err)
}
