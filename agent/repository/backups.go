package repository

import (
	"context"
	"encoding/json"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/kopia/kopia/repo"
	"github.com/kopia/kopia/repo/manifest"
	"github.com/kopia/kopia/repo/object"
	"github.com/kopia/kopia/snapshot"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

// Handle names a backup: backup:<remote>/<id>.
type Handle struct{ Remote, ID string }

// String returns the handle.
func (h Handle) String() string { return "backup:" + h.Remote + "/" + h.ID }

// MarshalText makes a Handle a string in JSON.
func (h Handle) MarshalText() ([]byte, error) { return []byte(h.String()), nil }

// UnmarshalText reads it back.
func (h *Handle) UnmarshalText(text []byte) (err error) {
	*h, err = ParseHandle(string(text))
	return err
}

var (
	remoteName = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?$`)
	backupID   = regexp.MustCompile(`^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$`)
)

// ParseHandle reads a backup's handle. Errors are Invalid.
func ParseHandle(s string) (Handle, error) {
	rest, ok := strings.CutPrefix(s, "backup:")
	remote, id, ok2 := strings.Cut(rest, "/")
	if !ok || !ok2 || !remoteName.MatchString(remote) || !backupID.MatchString(id) {
		return Handle{}, fault.Errorf(fault.Invalid, "backup %q: a backup is written backup:REMOTE/ID, as `stillpoint backups` lists it", s)
	}
	return Handle{remote, id}, nil
}

// CheckID is nil if id can be a backup's: at most 63 of [a-z0-9.-], beginning and ending with a letter or digit.
func CheckID(id string) error {
	if !backupID.MatchString(id) {
		return fault.Errorf(fault.Invalid, "backup id %q: must be at most 63 of [a-z0-9.-] and begin and end with one of [a-z0-9]", id)
	}
	return nil
}

// Kind is how a backup came about. Every backup is complete by itself.
type Kind string

const (
	Full        Kind = "full"
	Incremental Kind = "incremental"
)

// Backup is the content of a snapshot in a repository, complete by itself.
type Backup struct {
	Handle      Handle              // not stored: a remote's name is its user's business
	ID          string              // chosen by whoever started it
	Volume      adapters.VolumeID   // what it was
	Snapshot    adapters.SnapshotID // of Volume
	Form        adapters.Form       // of the volume: Image or Tree is set by it
	Kind        Kind
	Base        string    // id of the backup whose index was reused, of an incremental
	BaseImage   ImageID   // and what it was then, should another ever bear its id
	Size        int64     // of the volume, bytes
	ChunkSize   int64     // bytes
	Data        int64     // bytes in chunks that are not all zero
	Created     time.Time // the snapshot's instant
	Started     time.Time
	Finished    time.Time
	Cut         string
	Consistency adapters.Consistency
	Unverified  []string
	Image       ImageID // of disk.img: a digest of all of it
	Tree        TreeID  // of the tree: a digest of all of it
	Count       Count   // what is in the tree
	Believed    int     // how many backups of trees in a row, up to this one, took the backend's word for what is unchanged

	Standing // what was learnt since; not stored with it

	manifest manifest.ID
	root     object.ID
	tree     *TreeEntry // of a tree: its root
}

// description is a Backup in JSON: volume.json, the manifest's tag, and what `stillpoint backups --json` prints.
type description struct {
	Version      int                  `json:"version"`
	Backup       *Handle              `json:"backup,omitempty"`
	ID           string               `json:"id"`
	Volume       string               `json:"volume"`
	Snapshot     string               `json:"snapshot"`
	SnapshotName string               `json:"snapshot_name"`
	Kind         Kind                 `json:"kind"`
	Base         string               `json:"base,omitempty"`
	BaseImage    *ImageID             `json:"base_image,omitempty"`
	Size         int64                `json:"size"`
	ChunkSize    int64                `json:"chunk_size"`
	Data         int64                `json:"data"`
	Created      time.Time            `json:"created"`
	Started      time.Time            `json:"started"`
	Finished     time.Time            `json:"finished"`
	Cut          string               `json:"cut,omitempty"`
	Consistency  adapters.Consistency `json:"consistency,omitempty"`
	Unverified   []string             `json:"unverified,omitempty"`
	Image        *ImageID             `json:"image,omitempty"`
	Form         string               `json:"form,omitempty"` // "tree", with the two below; of a disk image nothing
	Tree         *treeEntry           `json:"tree,omitempty"` // as it is in the directory beside volume.json
	Believed     int                  `json:"believed,omitempty"`

	// Of a listing, not stored:
	Verified time.Time `json:"verified,omitzero"`
	Suspect  string    `json:"suspect,omitempty"`
}

// MarshalJSON writes a description.
func (b Backup) MarshalJSON() ([]byte, error) {
	d := description{
		Version: layoutVersion, ID: b.ID, Volume: b.Volume.String(), Snapshot: b.Snapshot.String(), SnapshotName: b.Snapshot.Name,
		Kind: b.Kind, Base: b.Base, Size: b.Size, ChunkSize: b.ChunkSize, Data: b.Data,
		Created: b.Created.UTC(), Started: b.Started.UTC(), Finished: b.Finished.UTC(),
		Cut: b.Cut, Consistency: b.Consistency, Unverified: b.Unverified,
	}
	if b.Form == adapters.TreeForm {
		tree, err := b.tree.json()
		if err != nil {
			return nil, err
		}
		d.Form, d.Tree, d.Believed = b.Form.String(), &tree, b.Believed
	} else {
		d.Image = &b.Image
	}
	if b.Handle != (Handle{}) {
		d.Backup, d.Verified, d.Suspect = &b.Handle, b.Verified, b.Suspect
	}
	if b.Base != "" && b.Form == adapters.BlockForm {
		d.BaseImage = &b.BaseImage
	}
	return json.Marshal(d)
}

// UnmarshalJSON reads a description.
func (b *Backup) UnmarshalJSON(p []byte) error {
	var d description
	if err := json.Unmarshal(p, &d); err != nil {
		return err
	}
	if d.Version != layoutVersion {
		return fault.Errorf(fault.Unsupported, "its layout is version %d, this program knows %d; use a newer one", d.Version, layoutVersion)
	}
	v, err := adapters.ParseHandle(d.Volume)
	if err != nil {
		return err
	}
	*b = Backup{
		ID: d.ID, Volume: v.Volume, Snapshot: adapters.SnapshotID{Volume: v.Volume, Name: d.SnapshotName},
		Kind: d.Kind, Base: d.Base, Size: d.Size, ChunkSize: d.ChunkSize, Data: d.Data,
		Created: d.Created, Started: d.Started, Finished: d.Finished,
		Cut: d.Cut, Consistency: d.Consistency, Unverified: d.Unverified,
	}
	switch {
	case d.Form == adapters.TreeForm.String() && d.Tree != nil:
		tree, err := d.Tree.entry()
		if err != nil || tree.summary == nil {
			return fault.Errorf(fault.Corrupt, "its tree is not one: %w", err)
		}
		b.Form, b.tree, b.Tree, b.Count, b.Believed = adapters.TreeForm, &tree, TreeID{tree.object}, tree.Count(), d.Believed
	case d.Form == "" && d.Image != nil:
		b.Image = *d.Image
	default:
		return fault.Errorf(fault.Unsupported, "it is of the form %q, which this program does not know; use a newer one", d.Form)
	}
	if d.BaseImage != nil {
		b.BaseImage = *d.BaseImage
	}
	return nil
}

// Labels of kopia's manifest, beside its own. Kopia shows labels that begin with "tag:" as a snapshot's tags, and
// keeps them when it edits a manifest.
const (
	idLabel          = "tag:backup"
	volumeLabel      = "tag:volume"
	descriptionLabel = "tag:stillpoint"
)

// Filter narrows a listing. The zero Filter lists everything.
type Filter struct {
	Volume adapters.VolumeID // only this volume's, if not zero
}

// Backups lists the committed backups, newest snapshot first. It sees what other processes committed.
func (r *Repository) Backups(ctx context.Context, f Filter) (found []Backup, err error) {
	err = within(ctx, func(ctx context.Context) error {
		found, err = r.backups(ctx, f)
		return err
	})
	return found, err
}

func (r *Repository) backups(ctx context.Context, f Filter) ([]Backup, error) {
	labels := map[string]string{}
	if f.Volume != (adapters.VolumeID{}) {
		labels[volumeLabel] = f.Volume.String()
	}
	if err := r.kopia.Refresh(ctx); err != nil {
		return nil, r.corrupt(err)
	}
	found, err := r.find(ctx, r.kopia, labels)
	if err != nil {
		return nil, err
	}
	return found, r.standings(ctx, found)
}

// Backup looks one up by its id. NotFound if there is none.
func (r *Repository) Backup(ctx context.Context, id string) (b Backup, err error) {
	err = within(ctx, func(ctx context.Context) error {
		b, err = r.backup(ctx, id)
		return err
	})
	return b, err
}

func (r *Repository) backup(ctx context.Context, id string) (Backup, error) {
	if err := CheckID(id); err != nil {
		return Backup{}, err
	}
	if err := r.kopia.Refresh(ctx); err != nil {
		return Backup{}, r.corrupt(err)
	}
	b, err := r.lookup(ctx, r.kopia, id)
	if err != nil {
		return Backup{}, err
	}
	one := []Backup{b}
	err = r.standings(ctx, one)
	return one[0], err
}

func (r *Repository) lookup(ctx context.Context, from manifests, id string) (Backup, error) {
	found, err := r.find(ctx, from, map[string]string{idLabel: id})
	if err != nil {
		return Backup{}, err
	}
	if len(found) == 0 {
		return Backup{}, r.noBackup(id)
	}
	return found[0], nil
}

func (r *Repository) noBackup(id string) error {
	return fault.Errorf(fault.NotFound, "backup %s: not in repository %s; `stillpoint backups` lists what is", Handle{r.remote, id}, r.at)
}

// manifests is the part of kopia's repository that lists and reads manifests.
type manifests interface {
	FindManifests(ctx context.Context, labels map[string]string) ([]*manifest.EntryMetadata, error)
	GetManifest(ctx context.Context, id manifest.ID, data any) (*manifest.EntryMetadata, error)
}

// find lists the backups with these labels. Of two with one id, which two processes committed at one moment, the first
// counts.
func (r *Repository) find(ctx context.Context, from manifests, labels map[string]string) ([]Backup, error) {
	labels[manifest.TypeLabelKey] = snapshot.ManifestType
	entries, err := from.FindManifests(ctx, labels)
	if err != nil {
		return nil, r.corrupt(err)
	}
	slices.SortFunc(entries, func(a, b *manifest.EntryMetadata) int {
		if c := a.ModTime.Compare(b.ModTime); c != 0 {
			return c
		}
		return strings.Compare(string(a.ID), string(b.ID))
	})
	gone, err := r.forgottenIn(ctx, from)
	if err != nil {
		return nil, err
	}
	var found []Backup
	seen := map[string]bool{}
	for _, e := range entries {
		if e.Labels[descriptionLabel] == "" || seen[e.Labels[idLabel]] || gone[e.ID] {
			continue // a snapshot that somebody made with kopia itself, or forgotten
		}
		var m snapshot.Manifest
		if _, err := from.GetManifest(ctx, e.ID, &m); err != nil {
			return nil, r.corrupt(err)
		}
		b, err := r.backupOf(e.ID, &m)
		if err != nil {
			return nil, err
		}
		seen[b.ID] = true
		found = append(found, b)
	}
	slices.SortStableFunc(found, func(a, b Backup) int {
		if c := b.Created.Compare(a.Created); c != 0 {
			return c
		}
		return b.Finished.Compare(a.Finished)
	})
	return found, nil
}

func (r *Repository) backupOf(id manifest.ID, m *snapshot.Manifest) (Backup, error) {
	var b Backup
	if err := json.Unmarshal([]byte(m.Tags[descriptionLabel]), &b); err != nil {
		return Backup{}, fault.Errorf(fault.Corrupt, "repository %s: manifest %s: %w", r.at, id, err)
	}
	b.Handle = Handle{r.remote, b.ID}
	b.manifest, b.root = id, m.RootObjectID()
	return b, nil
}

func (r *Repository) deleteManifest(ctx context.Context, id manifest.ID) error {
	return r.session(ctx, "forget", func(ctx context.Context, w repo.RepositoryWriter) error {
		return w.DeleteManifest(ctx, id)
	})
}
