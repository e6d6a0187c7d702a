package repository

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"slices"

	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/content"

	"stillpoint.io/stillpoint/fault"
)

// Need is a chunk, how many bytes it must have, and where they go.
type Need struct {
	Chunk  Chunk
	Length int64
	Into   []byte // of Length bytes, or nil: nowhere
}

// ReadBuffer is what a Reader needs: how much of neighbours is read together, in bytes.
func (r *Repository) ReadBuffer() int64 { return max(4<<20, r.ChunkSize()+64<<10) }

// Reader reads chunks with few requests: neighbours in a pack together. It is for one goroutine.
type Reader struct {
	r      *Repository
	in     blob.Reader
	locate func(context.Context, content.ID) (content.Info, error)
	unpack unpack
	buf    []byte
	places []place
}

type place struct {
	content.Info
	length int64 // that the content must have, -1: any
	into   []byte
}

// end is where the content ends in its pack.
func (p place) end() int64 { return int64(p.PackOffset) + int64(p.PackedLength) }

// NewReader makes a reader that checks what is on the medium, with a buffer of at least ReadBuffer bytes.
func (m *Medium) NewReader(buf []byte) *Reader {
	return &Reader{r: m.r, in: m.in, locate: m.locate, unpack: m.r.unpacker(m.back.contents.ContentFormat().Encryptor()), buf: buf}
}

// NewReader makes a reader of the image's chunks, with a buffer of at least ReadBuffer bytes.
func (i *Image) NewReader(buf []byte) *Reader {
	return &Reader{r: i.r, in: i.r.kopia.BlobReader(), locate: i.locate, unpack: i.r.unpacker(i.r.kopia.ContentReader().ContentFormat().Encryptor()), buf: buf}
}

func (i *Image) locate(ctx context.Context, id content.ID) (content.Info, error) {
	info, err := i.contents.ContentInfo(ctx, id)
	if err != nil {
		return info, i.r.corrupt(fmt.Errorf("content %s: %w", id, err))
	}
	return info, nil
}

// Read reads chunks, in the order in which they lie in their packs and neighbours together, decrypts them, and makes sure
// that each is what its id says and as long as it must be. judge is told of each that is not, with an error of kind
// Corrupt that names the blob. An error means that it could not be done.
func (x *Reader) Read(ctx context.Context, needs []Need, judge func(Chunk, error)) error {
	x.places = x.places[:0]
	for _, n := range needs {
		info, err := x.locate(ctx, n.Chunk.id)
		if fault.KindOf(err) == fault.Corrupt {
			judge(n.Chunk, err)
			continue
		} else if err != nil {
			return err
		}
		x.places = append(x.places, place{info, n.Length, n.Into})
	}
	sortPlaces(x.places)
	return x.check(ctx, x.places, func(p content.Info, err error) { judge(Chunk{p.ContentID}, damaged(p.ContentID, err)) })
}

func sortPlaces(all []place) {
	slices.SortFunc(all, func(a, b place) int {
		return cmp.Or(cmp.Compare(a.PackBlobID, b.PackBlobID), cmp.Compare(a.PackOffset, b.PackOffset))
	})
}

// runGap is how many bytes that nobody asked for are read to save a request.
const runGap = 32 << 10

// check reads sorted places.
func (x *Reader) check(ctx context.Context, all []place, judge func(content.Info, error)) error {
	for len(all) > 0 {
		first, n := all[0], 1
		end := int64(first.PackOffset) + int64(first.PackedLength)
		for ; n < len(all); n++ {
			next := all[n]
			stop := int64(next.PackOffset) + int64(next.PackedLength)
			if next.PackBlobID != first.PackBlobID || int64(next.PackOffset) > end+runGap || stop-int64(first.PackOffset) > int64(len(x.buf)) {
				break
			}
			end = max(end, stop)
		}
		if err := x.run(ctx, all[:n], end, x.r.at.S3 == nil, judge); err != nil {
			return err
		}
		all = all[n:]
	}
	return nil
}

// run reads neighbours at once, and one by one if that cannot be done. Unless it is the last try, what is not right is
// asked for once more: over a network it may have been spoilt on its way.
func (x *Reader) run(ctx context.Context, all []place, end int64, last bool, judge func(content.Info, error)) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	start := int64(all[0].PackOffset)
	if end-start > int64(len(x.buf)) { // a content of another's, larger than any of ours
		x.buf = make([]byte, end-start)
	}
	out := fixedBuffer{p: x.buf[:end-start]}
	err := x.in.GetBlob(ctx, all[0].PackBlobID, start, end-start, &out)
	if err == nil && out.n < len(out.p) {
		err = blob.ErrInvalidRange
	}
	if err != nil {
		if err = x.r.at.fault("reading", err); fault.KindOf(err) != fault.Corrupt {
			return err
		}
		if len(all) == 1 {
			judge(all[0].Info, fault.Errorf(fault.Corrupt, "content %s in blob %s: %w", all[0].ContentID, all[0].PackBlobID, err))
			return nil
		}
		for i, p := range all {
			if err := x.run(ctx, all[i:i+1], p.end(), last, judge); err != nil {
				return err
			}
		}
		return nil
	}
	var spoilt []place
	for _, p := range all {
		at := int64(p.PackOffset) - start
		length, err := x.unpack(p.Info, out.p[at:at+int64(p.PackedLength)], p.into)
		if err == nil && p.length >= 0 && length != p.length {
			err = fault.Errorf(fault.Corrupt, "%d bytes long, the index says %d", length, p.length)
		}
		switch {
		case err != nil && !last:
			spoilt = append(spoilt, p)
		case err != nil:
			judge(p.Info, fault.Errorf(fault.Corrupt, "content %s in blob %s at %d: %w", p.ContentID, p.PackBlobID, p.PackOffset, err))
		}
	}
	for i, p := range spoilt {
		came := true
		err := x.run(ctx, spoilt[i:i+1], p.end(), true, func(i content.Info, err error) {
			came = false
			judge(i, err)
		})
		if err != nil {
			return err
		}
		if came {
			slog.WarnContext(ctx, "a content was spoilt on its way from the store, and came right the second time", "repository", x.r.at.String(), "content", p.ContentID.String())
		}
	}
	return nil
}

// fixedBuffer takes what a blob storage reads, and no more than it has room for.
type fixedBuffer struct {
	p []byte
	n int
}

func (b *fixedBuffer) Reset()      { b.n = 0 }
func (b *fixedBuffer) Length() int { return b.n }

func (b *fixedBuffer) Write(p []byte) (int, error) {
	n := copy(b.p[b.n:], p)
	b.n += n
	if n < len(p) {
		return n, blob.ErrInvalidRange
	}
	return n, nil
}

// Rest gives the work of checking what the index of all contents has and was not seen before: what no backup refers to,
// and all that is not a chunk. Whoever dedupes a new chunk against one that nobody reads any more must be able to rely on
// it. What is missing is judged at once.
func (m *Medium) Rest(ctx context.Context, seen *ChunkSet, judge func(Chunk, error)) ([]func(context.Context, *Reader) error, error) {
	var all []place
	err := m.back.contents.IterateContents(ctx, content.IterateOptions{}, func(i content.Info) error {
		if !i.ContentID.HasPrefix() && seen.Has(Chunk{i.ContentID}) {
			return nil
		}
		located, err := m.locate(ctx, i.ContentID)
		if fault.KindOf(err) == fault.Corrupt {
			judge(Chunk{i.ContentID}, err)
			return nil
		} else if err != nil {
			return err
		}
		all = append(all, place{Info: located, length: -1})
		return nil
	})
	if err != nil {
		return nil, m.r.corrupt(err)
	}
	sortPlaces(all)
	var work []func(context.Context, *Reader) error
	for part := range slices.Chunk(all, 64) {
		work = append(work, func(ctx context.Context, x *Reader) error {
			return x.check(ctx, part, func(p content.Info, err error) { judge(Chunk{p.ContentID}, err) })
		})
	}
	return work, nil
}

// ChunkSet is a set of chunks, of about 25 bytes for each. It is not safe in parallel.
type ChunkSet struct{ m map[[16]byte]struct{} }

// half is enough of a chunk's name: 128 bits of a digest.
func half(c Chunk) (h [16]byte) {
	copy(h[:], c.id.Hash())
	return h
}

// Add says whether the chunk is new.
func (s *ChunkSet) Add(c Chunk) bool {
	if s.Has(c) {
		return false
	}
	if s.m == nil {
		s.m = map[[16]byte]struct{}{}
	}
	s.m[half(c)] = struct{}{}
	return true
}

// Has says whether the chunk is in the set.
func (s *ChunkSet) Has(c Chunk) bool {
	_, ok := s.m[half(c)]
	return ok
}
