package repository

import (
	"context"
	"errors"

	"stillpoint.io/stillpoint/cbt"
)

// Image is a backup's disk image, open for reading. It is an adapters.Image.
type Image struct{}

// OpenImage opens the image of a backup.
func (r *Repository) OpenImage(ctx context.Context, b Backup) (*Image, error) {
	return nil, errors.ErrUnsupported
}

// ReadAt is safe in parallel and follows io.ReaderAt. Every chunk it touches is decrypted, hashed and compared with
// its id, and has the length that the index says; one that is not right, or not there, is Corrupt.
func (i *Image) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	return 0, errors.ErrUnsupported
}

// Size is the image's length in bytes.
func (i *Image) Size() int64 { return 0 }

// Extents gives the image's chunks as runs of data and zero, from offset 0 to its end without a gap.
func (i *Image) Extents(ctx context.Context) cbt.Seq { return nil }

// Close releases the image.
func (i *Image) Close() error { return nil }
