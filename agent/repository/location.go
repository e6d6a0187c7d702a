package repository

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/content"
	"github.com/kopia/kopia/repo/format"
	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/fault"
)

// Location says where a repository is: in a folder or in a bucket, not in both.
type Location struct {
	Path string // a folder of a filesystem
	S3   *S3    // a bucket of an S3 store
}

// String returns the location as messages show it; no secret is in it.
func (l Location) String() string {
	if l.S3 != nil {
		return l.S3.String()
	}
	return l.Path
}

// check finds what is wrong with a location without going there.
func (l Location) check() error {
	switch {
	case l.S3 != nil && l.Path != "":
		return fault.Errorf(fault.Invalid, "a repository is either in the folder %s or in %s: name one of them", l.Path, l.S3)
	case l.S3 != nil:
		return l.S3.check()
	case l.Path == "":
		return fault.Errorf(fault.Invalid, "a repository needs a place: a folder or an S3 bucket")
	}
	return nil
}

// open gives the blobs of a location as they are there, with no cache in between. Close them.
func (l Location) open(ctx context.Context) (blob.Storage, error) {
	if err := l.check(); err != nil {
		return nil, err
	}
	if l.S3 != nil {
		return openBucket(l.S3)
	}
	return openFolder(ctx, &folderOptions{Path: l.Path}, false)
}

// create opens a location where nothing is yet; a folder is made. Busy if there is a repository, Invalid if there is
// anything else.
func (l Location) create(ctx context.Context) (blob.Storage, error) {
	if err := l.check(); err != nil {
		return nil, err
	}
	if l.S3 != nil {
		b, err := openBucket(l.S3)
		if err != nil {
			return nil, err
		}
		if err := l.vacant(ctx, b.impatient(60)); err != nil {
			return nil, errors.Join(err, b.Close(ctx))
		}
		return b, nil
	}
	entries, err := os.ReadDir(l.Path)
	switch {
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return nil, l.fault("creating", err)
	case len(entries) > 0:
		if _, err := os.Stat(filepath.Join(l.Path, format.KopiaRepositoryBlobID+".f")); err == nil {
			return nil, fault.Errorf(fault.Busy, "repository %s: there is one already", l)
		}
		return nil, fault.Errorf(fault.Invalid, "repository %s: the folder is not empty; choose an empty or a new one", l)
	}
	st, err := openFolder(ctx, &folderOptions{Path: l.Path}, true)
	return st, l.fault("creating", err)
}

// vacant makes sure that there is no object under the prefix.
func (l Location) vacant(ctx context.Context, b blob.Lister) error {
	found, enough := blob.ID(""), errors.New("enough")
	err := b.ListBlobs(ctx, "", func(m blob.Metadata) error {
		if found == "" || m.BlobID == format.KopiaRepositoryBlobID {
			found = m.BlobID
		}
		if m.BlobID >= format.KopiaRepositoryBlobID { // they come in order
			return enough
		}
		return nil
	})
	switch {
	case err != nil && !errors.Is(err, enough):
		return l.fault("creating", err)
	case found == format.KopiaRepositoryBlobID:
		return fault.Errorf(fault.Busy, "repository %s: there is one already", l)
	case found != "":
		return fault.Errorf(fault.Invalid, "repository %s: there are other objects, such as %q; choose another prefix or bucket", l, found)
	}
	return nil
}

// connection is how kopia is told of the location of the repository with this id. Its JSON may hold secrets.
func (l Location) connection(id string, cached bool) *blob.ConnectionInfo {
	if l.S3 != nil {
		return &blob.ConnectionInfo{Type: bucketType, Config: l.S3.options(id, cached)}
	}
	return &blob.ConnectionInfo{Type: folderType, Config: &folderOptions{Path: l.Path}}
}

// identify reads the id that kopia gave the repository when it was made, hexadecimal. NotFound if there is none.
func (l Location) identify(ctx context.Context, st blob.Storage) (string, error) {
	none := fault.Errorf(fault.NotFound, "repository %s: there is none; `stillpoint remote init` makes one", l)
	if l.S3 == nil { // kopia's storage would leave a file where nothing is
		if _, err := os.Stat(filepath.Join(l.Path, format.KopiaRepositoryBlobID+".f")); errors.Is(err, fs.ErrNotExist) {
			return "", none
		} else if err != nil {
			return "", l.fault("opening", err)
		}
	}
	if b, ok := st.(*bucket); ok {
		st = b.impatient(5)
	}
	var text blobBytes
	err := st.GetBlob(ctx, format.KopiaRepositoryBlobID, 0, -1, &text)
	if errors.Is(err, blob.ErrBlobNotFound) {
		return "", none
	} else if err != nil {
		return "", l.fault("opening", err)
	}
	var head struct {
		UniqueID []byte `json:"uniqueID"`
	}
	if err := json.Unmarshal(text.Bytes(), &head); err != nil || len(head.UniqueID) == 0 {
		return "", fault.Errorf(fault.Corrupt, "repository %s: %s is not what kopia writes there", l, format.KopiaRepositoryBlobID)
	}
	return hex.EncodeToString(head.UniqueID), nil
}

// blobBytes is a blob in memory.
type blobBytes struct{ bytes.Buffer }

func (b *blobBytes) Length() int { return b.Len() }

// sweep removes what killed writers left half-written. A bucket has nothing of the kind: an object is there or not.
func (l Location) sweep() error {
	if l.S3 != nil {
		return nil
	}
	return sweepPartial(l.Path)
}

// fault gives an error of kopia or of the medium its kind. doing says what failed, as in "opening".
func (l Location) fault(doing string, err error) error {
	if err == nil {
		return nil
	}
	kind, remedy := fault.KindOf(err), ""
	switch {
	case kind != fault.Internal:
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		kind, remedy = fault.Exhausted, "; make room, or forget backups and run maintenance"
	case errors.Is(err, unix.EROFS), errors.Is(err, fs.ErrPermission):
		kind, remedy = fault.Invalid, "; it cannot be written from here"
	case errors.Is(err, unix.ENOTDIR):
		kind, remedy = fault.Invalid, "; a repository is a folder"
	case errors.Is(err, blob.ErrBlobNotFound), errors.Is(err, content.ErrContentNotFound), errors.Is(err, blob.ErrInvalidRange),
		strings.Contains(err.Error(), "message authentication failed"): // crypto/cipher exports no error for it
		kind = fault.Corrupt
	case errors.Is(err, unix.ENOTCONN), errors.Is(err, unix.ESTALE), errors.Is(err, unix.ETIMEDOUT), errors.Is(err, unix.EIO):
		kind = fault.Unavailable
	}
	return fault.Errorf(kind, "%s repository %s: %w%s", doing, l, err, remedy)
}
