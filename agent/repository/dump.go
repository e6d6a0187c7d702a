package repository

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/kopia/kopia/repo/content"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

// Dump writes a backup's index as text, for people who look into the format: the description, then of a disk image a line
// for each segment, and for each chunk of those that are not all zero; of a tree a line for each entry. Everything is read as it is stored, so a damaged index
// fails at the damage.
func (r *Repository) Dump(ctx context.Context, out io.Writer, b Backup) error {
	return within(ctx, func(ctx context.Context) error { return r.dump(ctx, out, b) })
}

func (r *Repository) dump(ctx context.Context, out io.Writer, b Backup) error {
	text, err := json.MarshalIndent(b, "", "  ")
	if err != nil {
		return err
	}
	if _, err := fmt.Fprintf(out, "%s\nmanifest %s, directory %s\n", text, b.manifest, b.root); err != nil {
		return err
	}
	if b.Form == adapters.TreeForm {
		tree, err := r.OpenTree(ctx, b)
		if err != nil {
			return err
		}
		return tree.dump(ctx, out, "", tree.Root())
	}
	image, err := r.OpenImage(ctx, b)
	if err != nil {
		return err
	}
	defer image.Close()
	for n := range image.Segments() {
		s, zero := image.Segment(n)
		at := int64(n) * SegmentSize
		if zero {
			if _, err := fmt.Fprintf(out, "%16d %12d I%s zero\n", at, s.Length, s.id); err != nil {
				return err
			}
			continue
		}
		if _, err := fmt.Fprintf(out, "%16d %12d I%s\n", at, s.Length, s.id); err != nil {
			return err
		}
		chunks, err := image.Chunks(ctx, n)
		if err != nil {
			return err
		}
		for k, c := range chunks {
			off := int64(k) * r.ChunkSize()
			length := min(r.ChunkSize(), s.Length-off)
			where := "zero"
			if c != r.ZeroChunk(length) {
				info, err := r.kopia.ContentInfo(ctx, c.id)
				if err != nil {
					return fmt.Errorf("chunk %s: %w", c, r.corrupt(err))
				}
				where = fmt.Sprintf("%s+%d %d", info.PackBlobID, info.PackOffset, info.PackedLength)
			}
			if _, err := fmt.Fprintf(out, "  %14d %12d %s %s\n", at+off, length, c, where); err != nil {
				return err
			}
		}
	}
	return nil
}

// Where tells in which blob a content lies, at which offset, and how many bytes it has there: for people who look into
// the format. NotFound if it is in no index.
func (r *Repository) Where(ctx context.Context, id string) (blobID string, offset, length int64, err error) {
	c, err := content.ParseID(id)
	if err != nil {
		return "", 0, 0, fault.Errorf(fault.Invalid, "content %q: %w", id, err)
	}
	info, err := r.kopia.ContentInfo(ctx, c)
	if errors.Is(err, content.ErrContentNotFound) {
		return "", 0, 0, fault.Errorf(fault.NotFound, "content %s: in no index of repository %s", id, r.at)
	}
	return string(info.PackBlobID), int64(info.PackOffset), int64(info.PackedLength), r.at.fault("reading", err)
}

func (t *Tree) dump(ctx context.Context, out io.Writer, path string, e TreeEntry) error {
	if _, err := fmt.Fprintf(out, "%-12s %s %q\n", e.Type, e.object, path); err != nil || e.Type != adapters.Directory {
		return err
	}
	for child, err := range t.Below(ctx, e) {
		if err == nil {
			err = t.dump(ctx, out, path+"/"+child.Name, child)
		}
		if err != nil {
			return err
		}
	}
	return nil
}
