package repository

import (
	"bytes"
	"context"
	"encoding/json"

	"github.com/kopia/kopia/repo/compression"
	"github.com/kopia/kopia/repo/content"
	"github.com/kopia/kopia/repo/object"
)

// storer stores a content, and names it.
type storer func(ctx context.Context, p []byte, prefix content.IDPrefix, comp compression.HeaderID) (content.ID, error)

// objectPiece is how kopia's FIXED-1M splitter, which the repository was made with, cuts an object, in bytes.
const objectPiece = 1 << 20

// objectWriter writes an object of ours byte for byte as kopia's writer would: in pieces, and if there are several, an object
// with their index. Kopia's belongs to one session until it is finished; this one's pieces may be in several, so that a
// checkpoint need not wait for who writes a large directory. It holds a piece, and 100 bytes for each that it wrote.
type objectWriter struct {
	put    storer
	prefix content.IDPrefix
	buf    []byte // what comes is appended; flush and finish store it
	index  []object.IndirectObjectEntry
	size   int64 // in bytes, of the pieces
}

// flush stores what is a whole piece.
func (o *objectWriter) flush(ctx context.Context) error {
	rest := o.buf
	for ; len(rest) >= objectPiece; rest = rest[objectPiece:] {
		if err := o.piece(ctx, rest[:objectPiece]); err != nil {
			return err
		}
	}
	o.buf = o.buf[:copy(o.buf, rest)]
	return nil
}

func (o *objectWriter) piece(ctx context.Context, p []byte) error {
	id, err := o.put(ctx, p, o.prefix, indexCompressor)
	o.index = append(o.index, object.IndirectObjectEntry{Start: o.size, Length: int64(len(p)), Object: object.DirectObjectID(id)})
	o.size += int64(len(p))
	return err
}

// finish stores what is left, and names the object.
func (o *objectWriter) finish(ctx context.Context) (object.ID, error) {
	if err := o.flush(ctx); err != nil {
		return object.EmptyID, err
	}
	if len(o.buf) > 0 || len(o.index) == 0 {
		if err := o.piece(ctx, o.buf); err != nil {
			return object.EmptyID, err
		}
	}
	if len(o.index) == 1 {
		return o.index[0].Object, nil
	}
	var text bytes.Buffer
	err := json.NewEncoder(&text).Encode(struct {
		Stream  string                       `json:"stream"`
		Entries []object.IndirectObjectEntry `json:"entries"`
	}{"kopia:indirect", o.index})
	if err != nil {
		return object.EmptyID, err
	}
	above := objectWriter{put: o.put, prefix: o.prefix, buf: text.Bytes()}
	id, err := above.finish(ctx)
	return indirect(id, err)
}

// indirect names the object of which another one is the index.
func indirect(index object.ID, err error) (object.ID, error) {
	if err != nil {
		return object.EmptyID, err
	}
	return object.ParseID("I" + index.String())
}
