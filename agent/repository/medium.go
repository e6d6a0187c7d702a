package repository

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"time"

	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/blob/throttling"
	"github.com/kopia/kopia/repo/content"
	"github.com/kopia/kopia/repo/object"
	"github.com/kopia/kopia/snapshot"

	"stillpoint.io/stillpoint/fault"
)

// Medium is a repository as it lies on its medium: there is no cache in between, and nothing is known of what this
// process wrote. It is for whoever wants to know whether what is stored is sound. It sees what was committed before it
// was opened. Its methods are safe in parallel. Close it.
type Medium struct {
	r     *Repository
	in    blob.Reader
	back  *reader
	packs map[blob.ID]int64 // every pack that there is, with its length in bytes
}

// OpenMedium loads all indexes anew and lists all packs. An index that cannot be read is Corrupt, and named.
func (r *Repository) OpenMedium(ctx context.Context) (*Medium, error) {
	back, err := r.reopen(ctx)
	if err != nil {
		return nil, r.corrupt(err)
	}
	in, err := r.limited()
	if err != nil {
		return nil, errors.Join(err, back.close(ctx))
	}
	m := &Medium{r: r, in: in, back: back, packs: map[blob.ID]int64{}}
	if err := m.listPacks(ctx); err != nil {
		return nil, errors.Join(err, back.close(ctx))
	}
	return m, nil
}

// limited is the medium within the bandwidth that the repository was opened with. Kopia has a limit of its own.
func (r *Repository) limited() (blob.Reader, error) {
	l := r.kopia.ClientOptions().Throttling
	if l == nil || l.DownloadBytesPerSecond == 0 {
		return r.medium, nil
	}
	const window, filled = time.Minute, 0.1 // as kopia has them
	t, err := throttling.NewThrottler(throttling.Limits{DownloadBytesPerSecond: l.DownloadBytesPerSecond}, window, filled)
	return throttling.NewWrapper(r.medium, t), err
}

// listPacks comes after the indexes are loaded, so that each pack they name is listed.
func (m *Medium) listPacks(ctx context.Context) error {
	for _, prefix := range content.PackBlobIDPrefixes {
		err := m.in.ListBlobs(ctx, prefix, func(b blob.Metadata) error {
			m.packs[b.BlobID] = b.Length
			return nil
		})
		if err != nil {
			return m.r.at.fault("listing", err)
		}
	}
	return nil
}

// Close releases the indexes.
func (m *Medium) Close(ctx context.Context) error { return m.r.at.fault("closing", m.back.close(ctx)) }

// Repository is the one that lies there.
func (m *Medium) Repository() *Repository { return m.r }

// Backups lists the backups whose manifests are on the medium, newest snapshot first, without their standing. A manifest
// that cannot be read is Corrupt, and the blob it lies in is named: no backup is left out in silence.
func (m *Medium) Backups(ctx context.Context) ([]Backup, error) {
	return m.r.find(ctx, m.back, map[string]string{})
}

// OpenImage opens a backup's image. Its top level has been read and checked then.
func (m *Medium) OpenImage(ctx context.Context, b Backup) (*Image, error) {
	return m.r.openImage(ctx, m.back.contents, b)
}

// CheckDescription is Repository.CheckDescription on the medium.
func (m *Medium) CheckDescription(ctx context.Context, b Backup) error {
	return m.r.checkDescription(ctx, m.back.contents, b)
}

// CheckSegment reads a segment's index and makes sure that it is what its id says; what is in it is Image.Chunks'
// business.
func (m *Medium) CheckSegment(ctx context.Context, s Segment) error {
	_, err := m.r.read(ctx, m.back.contents, s.id)
	return err
}

// Locate is nil if a chunk is in the index and its bytes are within a pack that is there. Nothing is read. What is
// missing is Corrupt.
func (m *Medium) Locate(ctx context.Context, c Chunk) error {
	_, err := m.locate(ctx, c.id)
	return err
}

func (m *Medium) locate(ctx context.Context, id content.ID) (content.Info, error) {
	info, err := m.back.contents.ContentInfo(ctx, id)
	switch {
	case errors.Is(err, content.ErrContentNotFound):
		return info, fault.Errorf(fault.Corrupt, "content %s: in no index", id)
	case err != nil:
		return info, m.r.corrupt(err)
	}
	// One that is marked as deleted is there. A maintenance that ran before the backup was committed left the mark, and the
	// next takes it away.
	length, ok := m.packs[info.PackBlobID]
	if end := int64(info.PackOffset) + int64(info.PackedLength); !ok {
		return info, fault.Errorf(fault.Corrupt, "content %s: blob %s is missing", id, info.PackBlobID)
	} else if end > length {
		return info, fault.Errorf(fault.Corrupt, "content %s: blob %s has %d bytes, the index says at least %d", id, info.PackBlobID, length, end)
	}
	return info, nil
}

// Parts names the contents of a backup that are neither segments nor chunks, as far as they can be known: its directory,
// its description, and its top level.
func (m *Medium) Parts(ctx context.Context, b Backup) []Chunk {
	var parts []Chunk
	add := func(id object.ID) {
		if c, _, ok := id.ContentID(); ok {
			parts = append(parts, Chunk{c})
		}
	}
	add(b.root)
	var directory snapshot.DirManifest
	if err := m.r.readJSON(ctx, m.back.contents, b.root, &directory); err == nil {
		for _, e := range directory.Entries {
			add(e.ObjectID)
		}
	}
	if made, err := m.r.description(ctx, b); err == nil {
		for _, p := range made {
			parts = append(parts, Chunk{p.id})
		}
	}
	top := b.Image.id
	if index, ok := top.IndexObjectID(); ok {
		top = index
	}
	if index, ok := top.IndexObjectID(); ok { // of a top level in several contents
		top = index
		var pieces struct {
			Entries []object.IndirectObjectEntry `json:"entries"`
		}
		if err := m.r.readJSON(ctx, m.back.contents, index, &pieces); err == nil {
			for _, e := range pieces.Entries {
				add(e.Object)
			}
		}
	}
	add(top)
	return parts
}

// Need is a chunk, and how many bytes it must have.
type Need struct {
	Chunk  Chunk
	Length int64
}

// ReadBuffer is what a reader of whole packs needs at once: what neighbours are read together, in bytes.
func (m *Medium) ReadBuffer() int64 { return max(4<<20, m.r.ChunkSize()+64<<10) }

// Reader reads chunks to check them. It is for one goroutine.
type Reader struct {
	m      *Medium
	unpack func(info content.Info, packed []byte) (length int64, err error)
	buf    []byte
	places []place
}

type place struct {
	content.Info
	length int64 // that the content must have, -1: any
}

// NewReader makes a reader with a buffer of at least ReadBuffer bytes.
func (m *Medium) NewReader(buf []byte) *Reader {
	return &Reader{m: m, unpack: m.r.unpacker(m.back.contents.ContentFormat().Encryptor()), buf: buf}
}

// Check reads chunks, in the order in which they lie in their packs and neighbours together, decrypts them, and makes sure
// that each is what its id says and as long as it must be. judge is told of each that is not, with an error of kind
// Corrupt that names the blob. An error means that the check could not be done.
func (x *Reader) Check(ctx context.Context, needs []Need, judge func(Chunk, error)) error {
	x.places = x.places[:0]
	for _, n := range needs {
		info, err := x.m.locate(ctx, n.Chunk.id)
		if fault.KindOf(err) == fault.Corrupt {
			judge(n.Chunk, err)
			continue
		} else if err != nil {
			return err
		}
		x.places = append(x.places, place{info, n.Length})
	}
	sortPlaces(x.places)
	return x.check(ctx, x.places, func(p content.Info, err error) { judge(Chunk{p.ContentID}, err) })
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
		if err := x.run(ctx, all[:n], end, judge); err != nil {
			return err
		}
		all = all[n:]
	}
	return nil
}

// run reads neighbours at once, and one by one if that cannot be done.
func (x *Reader) run(ctx context.Context, all []place, end int64, judge func(content.Info, error)) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	start := int64(all[0].PackOffset)
	if end-start > int64(len(x.buf)) { // a content of another's, larger than any of ours
		x.buf = make([]byte, end-start)
	}
	out := fixedBuffer{p: x.buf[:end-start]}
	err := x.m.in.GetBlob(ctx, all[0].PackBlobID, start, end-start, &out)
	if err == nil && out.n < len(out.p) {
		err = blob.ErrInvalidRange
	}
	if err != nil {
		if err = x.m.r.at.fault("reading", err); fault.KindOf(err) != fault.Corrupt {
			return err
		}
		if len(all) == 1 {
			judge(all[0].Info, fault.Errorf(fault.Corrupt, "content %s in blob %s: %w", all[0].ContentID, all[0].PackBlobID, err))
			return nil
		}
		for i, p := range all {
			if err := x.run(ctx, all[i:i+1], int64(p.PackOffset)+int64(p.PackedLength), judge); err != nil {
				return err
			}
		}
		return nil
	}
	for _, p := range all {
		at := int64(p.PackOffset) - start
		length, err := x.unpack(p.Info, out.p[at:at+int64(p.PackedLength)])
		if err == nil && p.length >= 0 && length != p.length {
			err = fault.Errorf(fault.Corrupt, "%d bytes long, the index says %d", length, p.length)
		}
		if err != nil {
			judge(p.Info, fault.Errorf(fault.Corrupt, "content %s in blob %s at %d: %w", p.ContentID, p.PackBlobID, p.PackOffset, err))
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
		all = append(all, place{located, -1})
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
