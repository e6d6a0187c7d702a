package repository

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"time"

	"github.com/kopia/kopia/repo"
	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/blob/readonly"
	"github.com/kopia/kopia/repo/content"
	"github.com/kopia/kopia/repo/format"
	"github.com/kopia/kopia/repo/maintenance"
	"github.com/kopia/kopia/repo/manifest"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

// Mended is a blob that was damaged or missing, and what became of it.
type Mended struct {
	Blob string `json:"blob"`
	Was  string `json:"was"`            // what was wrong with it
	Done string `json:"done"`           // what was done about it, or would be
	Left bool   `json:"left,omitempty"` // nothing could be done
	// Backups are the handles of those that were not listed because of it, and are now.
	Backups []string `json:"backups,omitempty"`
}

// Mend puts in order what makes a repository one: kopia's format and configuration, the indexes of all contents, the
// markers of epochs and sessions, the manifests. It works where Open fails, and Open works after it. What is damaged is
// made again from what else the repository has:
//
//   - kopia.repository from its copy, which Init makes;
//   - an index from the packs, each of which ends with an index of its own;
//   - manifests of backups from the directories that they point at.
//
// What is made again is durable before anything takes its place, so that whoever is killed here can begin anew. A damaged
// index is kept under another name that kopia does not look at. A dry run changes nothing, and says what would be done.
func Mend(ctx context.Context, at Location, passphrase adapters.Secret, o OpenOptions, dry bool) (mended []Mended, err error) {
	if o.Host, err = hostOr(o.Host); err != nil {
		return nil, err
	}
	st, err := at.open(ctx)
	if err != nil {
		return nil, at.fault("opening", err)
	}
	defer func() { err = errors.Join(err, at.fault("closing", st.Close(context.WithoutCancel(ctx)))) }()
	d := &mender{at: at, st: st, options: o, passphrase: passphrase, dry: dry}
	if dry {
		d.st = readonly.NewWrapper(st)
	}
	if err := d.everything(ctx); err != nil {
		return d.mended, err
	}
	if dry && len(d.mended) > 0 {
		return d.mended, nil
	}
	err = d.housekeeping(ctx)
	return d.mended, err
}

// diagnosed explains why a repository could not be opened, if it is damaged. What kopia says then may be something else: a
// byte that changed in kopia.repository looks like a wrong passphrase, an index that is gone like an empty repository.
func diagnosed(ctx context.Context, at Location, medium blob.Storage, passphrase adapters.Secret, o OpenOptions, failed error) error {
	switch fault.KindOf(failed) {
	case fault.Internal, fault.Corrupt, fault.Invalid, fault.NotFound:
	default:
		return failed
	}
	d := &mender{at: at, st: readonly.NewWrapper(medium), options: o, passphrase: passphrase, dry: true}
	if err := d.everything(ctx); len(d.mended) == 0 {
		if isCorrupt(err) {
			return err
		}
		return failed
	}
	first := d.mended[0]
	return fault.Errorf(fault.Corrupt, "repository %s is damaged: %s: %s (%d blobs; `stillpoint repair --all --dry-run` lists them and what can be done): %w", at, first.Blob, first.Was, len(d.mended), failed)
}

// mender is a repository under repair.
type mender struct {
	at         Location
	st         blob.Storage
	options    OpenOptions
	passphrase adapters.Secret
	dry        bool
	mended     []Mended
}

func (d *mender) note(m Mended) { d.mended = append(d.mended, m) }

// everything mends what Open needs, from the bottom to the top.
func (d *mender) everything(ctx context.Context) error {
	f, err := d.format(ctx)
	if err != nil {
		return err
	}
	if err := d.epoch(ctx); err != nil {
		return err
	}
	r := &Repository{at: d.at, remote: cmp.Or(d.options.Remote, "default"), host: d.options.Host, medium: d.st, hash: f.HashFunc()}
	shared, err := content.NewSharedManager(ctx, d.st, f, nil, &content.ManagerOptions{PermissiveCacheLoading: true}, nil, nil)
	if err != nil {
		return d.at.fault("opening", err)
	}
	contents := content.NewWriteManager(ctx, shared, content.SessionOptions{SessionUser: userName, SessionHost: d.options.Host}, "")
	m := &Medium{r: r, in: d.st, back: &reader{r: r, shared: shared, contents: contents}, packs: map[blob.ID]int64{}}
	defer m.back.close(context.WithoutCancel(ctx))
	if err := m.listPacks(ctx); err != nil {
		return err
	}
	if err := d.indexes(ctx, m); err != nil {
		return err
	}
	return d.manifests(ctx, m)
}

// format makes kopia.repository and kopia.blobcfg readable.
func (d *mender) format(ctx context.Context) (*format.Manager, error) {
	open := func(st blob.Storage) (*format.Manager, error) {
		return format.NewManager(ctx, st, "", format.DefaultRepositoryBlobCacheDuration, d.passphrase.Reveal(), time.Now)
	}
	f, first := open(d.st)
	if first == nil {
		_, err := d.st.GetMetadata(ctx, format.KopiaBlobCfgBlobID)
		if errors.Is(err, blob.ErrBlobNotFound) {
			return f, d.blobConfig(ctx, f, err)
		}
		return f, d.at.fault("opening", err)
	}
	if k := fault.KindOf(d.at.fault("opening", first)); k != fault.Internal && k != fault.Corrupt {
		return nil, d.at.fault("opening", first)
	}
	bare := overlay{Storage: d.st, blobs: map[blob.ID][]byte{format.KopiaBlobCfgBlobID: nil}}
	if f, err := open(bare); err == nil {
		return f, d.blobConfig(ctx, f, first)
	}
	var text blobBytes
	if err := d.st.GetBlob(ctx, formatCopyID, 0, -1, &text); err != nil && !errors.Is(err, blob.ErrBlobNotFound) {
		return nil, d.at.fault("reading", err)
	}
	bare.blobs[format.KopiaRepositoryBlobID] = text.Bytes()
	f, err := open(bare)
	switch {
	case err == nil:
	case errors.Is(first, format.ErrInvalidPassword):
		return nil, fault.Errorf(fault.Invalid, "repository %s: wrong passphrase", d.at)
	case text.Len() == 0:
		return nil, fault.Errorf(fault.NotFound, "repository %s: there is none; `stillpoint remote init` makes one", d.at)
	default:
		return nil, fault.Errorf(fault.Corrupt, "repository %s: %s cannot be read, and the passphrase does not open the copy of it either: %w", d.at, format.KopiaRepositoryBlobID, first)
	}
	d.note(Mended{Blob: format.KopiaRepositoryBlobID, Was: first.Error(), Done: "put back from " + formatCopyID})
	if !d.dry {
		if err := d.st.PutBlob(ctx, format.KopiaRepositoryBlobID, blobText(text.Bytes()), blob.PutOptions{}); err != nil {
			return nil, d.at.fault("writing to", err)
		}
	}
	delete(bare.blobs, format.KopiaBlobCfgBlobID)
	if whole, err := open(bare); err == nil {
		return whole, nil
	} else if k := fault.KindOf(d.at.fault("opening", err)); k != fault.Internal && k != fault.Corrupt {
		return nil, d.at.fault("opening", err)
	} else {
		return f, d.blobConfig(ctx, f, err)
	}
}

// formatCopyID is the blob with a copy of kopia.repository, which kopia does not know. Without the one or the other
// nothing in the repository can be decrypted by anybody.
const formatCopyID = format.KopiaRepositoryBlobID + ".copy"

// copyFormat makes the copy, or makes it anew after a change of the passphrase. It says whether there was anything to do.
func copyFormat(ctx context.Context, st blob.Storage, dry bool) (stale bool, err error) {
	var original, copied blobBytes
	if err := st.GetBlob(ctx, format.KopiaRepositoryBlobID, 0, -1, &original); err != nil {
		return false, err
	}
	err = st.GetBlob(ctx, formatCopyID, 0, -1, &copied)
	if err != nil && !errors.Is(err, blob.ErrBlobNotFound) {
		return false, err
	}
	if err == nil && bytes.Equal(original.Bytes(), copied.Bytes()) {
		return false, nil
	}
	if dry {
		return true, nil
	}
	return true, st.PutBlob(ctx, formatCopyID, blobText(original.Bytes()), blob.PutOptions{})
}

// blobConfig writes kopia.blobcfg as it is in a repository of ours.
func (d *mender) blobConfig(ctx context.Context, f *format.Manager, was error) error {
	d.note(Mended{Blob: format.KopiaBlobCfgBlobID, Was: was.Error(), Done: "written anew, without retention; who had configured one with kopia does so again"})
	if d.dry {
		return nil
	}
	var text blobBytes
	if err := d.st.GetBlob(ctx, format.KopiaRepositoryBlobID, 0, -1, &text); err != nil {
		return d.at.fault("reading", err)
	}
	j, err := format.ParseKopiaRepositoryJSON(text.Bytes())
	if err == nil {
		err = j.WriteBlobCfgBlob(ctx, d.st, format.BlobStorageConfiguration{}, f.FormatEncryptionKey())
	}
	return d.at.fault("writing to", err)
}

// epoch puts the marker of the current epoch back.
func (d *mender) epoch(ctx context.Context) error {
	n, err := missingEpoch(ctx, d.st)
	if err != nil || n == 0 {
		return d.at.fault("listing", err)
	}
	id := fmt.Sprint(epochMarkerPrefix, n)
	d.note(Mended{Blob: id, Was: "the marker of the current epoch is missing; kopia overlooks newer indexes", Done: "put back"})
	if d.dry {
		d.st = overlay{Storage: d.st, blobs: map[blob.ID][]byte{blob.ID(id): []byte("epoch-marker")}}
		return nil
	}
	return d.at.fault("writing to", d.st.PutBlob(ctx, blob.ID(id), blobText("epoch-marker"), blob.PutOptions{}))
}

// indexes makes a new index of what the damaged and the missing ones knew, and moves the damaged ones away.
func (d *mender) indexes(ctx context.Context, m *Medium) error {
	active, err := m.back.shared.IndexBlobs(ctx, false)
	if err != nil {
		return d.at.fault("listing", err)
	}
	bad := map[blob.ID]error{}
	for _, b := range active {
		err := m.r.checkNamed(ctx, d.st, m.back.contents.ContentFormat().Encryptor(), b.BlobID)
		if err = m.r.corrupt(err); isCorrupt(err) {
			bad[b.BlobID] = err
		} else if err != nil {
			return err
		}
	}
	sessions, err := m.sessions(ctx)
	if err != nil {
		return err
	}
	lost, err := m.unclaimed(ctx, sessions)
	if err != nil {
		return err
	}
	for _, u := range lost {
		if u.err != nil {
			d.note(Mended{Blob: string(u.pack), Was: u.String(), Done: "nothing; what it holds stays unknown", Left: true})
			continue
		}
		if _, err := m.back.contents.RecoverIndexFromPackBlob(ctx, u.pack, u.length, true); err != nil {
			return m.r.corrupt(err)
		}
		d.note(Mended{Blob: string(u.pack), Was: u.String(), Done: fmt.Sprintf("%d contents indexed again", len(u.contents))})
	}
	if !d.dry && len(lost) > 0 {
		if err := m.back.contents.Flush(ctx); err != nil {
			return d.at.fault("writing to", err)
		}
	}
	for id, was := range bad {
		d.note(Mended{Blob: string(id), Was: was.Error(), Done: "kept as " + damagedName(id) + ", which kopia does not look at"})
		if !d.dry {
			if err := d.moveAway(ctx, id); err != nil {
				return err
			}
		}
	}
	return nil
}

func damagedName(id blob.ID) string { return "damaged-" + string(id) }

func (d *mender) moveAway(ctx context.Context, id blob.ID) error {
	var text blobBytes
	err := d.st.GetBlob(ctx, id, 0, -1, &text)
	if err == nil {
		err = d.st.PutBlob(ctx, blob.ID(damagedName(id)), blobText(text.Bytes()), blob.PutOptions{})
	}
	if err == nil {
		err = d.st.DeleteBlob(ctx, id)
	}
	return d.at.fault("writing to", err)
}

// housekeeping mends what an open repository can do without.
func (d *mender) housekeeping(ctx context.Context) (err error) {
	r, err := Open(ctx, d.at, d.passphrase, d.options)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Close(context.WithoutCancel(ctx))) }()
	stale, err := copyFormat(ctx, d.st, d.dry)
	if err != nil {
		return d.at.fault("writing to", err)
	}
	if stale {
		d.note(Mended{Blob: formatCopyID, Was: "not the same as " + format.KopiaRepositoryBlobID, Done: "written anew"})
	}
	m, err := r.OpenMedium(ctx)
	if err != nil {
		return err
	}
	defer m.Close(context.WithoutCancel(ctx))
	sessions, err := m.sessions(ctx)
	if err != nil {
		return err
	}
	for _, s := range sessions {
		if s.err == nil {
			continue
		}
		age, expired := time.Since(s.blob.Timestamp), maintenance.SafetyFull.SessionExpirationAge
		if age < expired {
			d.note(Mended{Blob: string(s.blob.BlobID), Was: s.err.Error(), Left: true,
				Done: fmt.Sprintf("nothing: its session may be under way; it can be removed when it is %s old, now it is %s", expired, age.Round(time.Second))})
			continue
		}
		d.note(Mended{Blob: string(s.blob.BlobID), Was: s.err.Error(), Done: "removed: its session ended long ago"})
		if !d.dry {
			if err := d.st.DeleteBlob(ctx, s.blob.BlobID); err != nil {
				return d.at.fault("writing to", err)
			}
		}
	}
	if _, err := maintenance.GetSchedule(ctx, r.kopia); err != nil {
		if err = r.corrupt(err); !isCorrupt(err) {
			return err
		}
		d.note(Mended{Blob: maintenanceBlob, Was: err.Error(), Done: "written anew: maintenance is due"})
		if err := d.change(ctx, r, func(ctx context.Context, w repo.DirectRepositoryWriter) error {
			return maintenance.SetSchedule(ctx, w, &maintenance.Schedule{})
		}); err != nil {
			return err
		}
	}
	p, err := maintenance.GetParams(ctx, r.kopia)
	if err != nil {
		return r.corrupt(err)
	}
	if p.Owner == "" {
		d.note(Mended{Blob: "the parameters of maintenance", Was: "missing", Done: "written anew, owned by this host"})
		return d.change(ctx, r, func(ctx context.Context, w repo.DirectRepositoryWriter) error {
			p := maintenance.DefaultParams()
			p.Owner = r.kopia.ClientOptions().UsernameAtHost()
			return maintenance.SetParams(ctx, w, &p)
		})
	}
	return nil
}

func (d *mender) change(ctx context.Context, r *Repository, f func(context.Context, repo.DirectRepositoryWriter) error) error {
	if d.dry {
		return nil
	}
	return r.at.fault("writing to", repo.DirectWriteSession(ctx, r.kopia, repo.WriteSessionOptions{Purpose: "stillpoint repair"}, f))
}

// manifestsOf opens the manifests, but for those that are passed over.
func manifestsOf(ctx context.Context, c *content.WriteManager, but map[content.ID]error) (*manifest.Manager, error) {
	return manifest.NewManager(ctx, tolerant{c, but}, manifest.ManagerOptions{AutoCompactionThreshold: math.MaxInt}, nil)
}

// tolerant shows kopia's manager of manifests all contents but the bad ones: it would show nothing because of one.
type tolerant struct {
	*content.WriteManager
	but map[content.ID]error
}

func (t tolerant) IterateContents(ctx context.Context, o content.IterateOptions, f content.IterateCallback) error {
	return t.WriteManager.IterateContents(ctx, o, func(i content.Info) error {
		if t.but[i.ContentID] != nil {
			return nil
		}
		return f(i)
	})
}

// overlay is a storage in which some blobs are other than they are; nil: they are not there.
type overlay struct {
	blob.Storage
	blobs map[blob.ID][]byte
}

func (o overlay) GetBlob(ctx context.Context, id blob.ID, off, length int64, out blob.OutputBuffer) error {
	text, ok := o.blobs[id]
	switch {
	case !ok:
		return o.Storage.GetBlob(ctx, id, off, length, out)
	case text == nil:
		return blob.ErrBlobNotFound
	case length < 0:
		off, length = 0, int64(len(text))
	case off+length > int64(len(text)):
		return blob.ErrInvalidRange
	}
	out.Reset()
	_, err := out.Write(text[off : off+length])
	return err
}

func (o overlay) ListBlobs(ctx context.Context, prefix blob.ID, f func(blob.Metadata) error) error {
	for id, text := range o.blobs {
		if bytes.HasPrefix([]byte(id), []byte(prefix)) && text != nil {
			if err := f(blob.Metadata{BlobID: id, Length: int64(len(text)), Timestamp: time.Now()}); err != nil {
				return err
			}
		}
	}
	return o.Storage.ListBlobs(ctx, prefix, f)
}

// blobText is a blob to be written.
type blobText []byte

func (b blobText) Length() int { return len(b) }

func (b blobText) WriteTo(w io.Writer) (int64, error) {
	n, err := w.Write(b)
	return int64(n), err
}

func (b blobText) Reader() io.ReadSeekCloser { return textReader{bytes.NewReader(b)} }

type textReader struct{ *bytes.Reader }

func (textReader) Close() error { return nil }
