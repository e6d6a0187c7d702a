package repository

import (
	"bytes"
	"context"
	"errors"
	"time"

	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/format"

	"stillpoint.io/stillpoint/fault"
)

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
		if err := d.st.PutBlob(ctx, format.KopiaRepositoryBlobID, slice(text.Bytes()), blob.PutOptions{}); err != nil {
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

// copyFormat makes the copy, or makes it anew after a change of the passphrase. It is retained as kopia retains
// the original. It says whether there was anything to do.
func copyFormat(ctx context.Context, st blob.Storage, retain format.BlobStorageConfiguration, dry bool) (stale bool, err error) {
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
	return true, st.PutBlob(ctx, formatCopyID, slice(original.Bytes()), blob.PutOptions{RetentionMode: retain.RetentionMode, RetentionPeriod: retain.RetentionPeriod})
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
