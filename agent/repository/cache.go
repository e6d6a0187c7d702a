package repository

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"hash/maphash"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/kopia/kopia/repo/blob"
)

// cached keeps copies of a bucket's index blobs in a folder of this machine: kopia's indexes, and the packs with our
// indexes and the manifests. It never keeps data. Such a blob is never rewritten, so a copy is not outdated, and it is
// encrypted as in the bucket. Only what is known to be right is kept: what this process uploaded, and what came with the
// checksum (or an ETag that is one) that the store keeps of it.
//
// Nothing depends on the cache. What is damaged in it is fetched again; when it cannot be written, as on a full disk, that
// is said once and reads go to the store. (Kopia's own cache cannot be had without data, waits on a full disk for every
// blob, and hands damaged copies on.)
type cached struct {
	*bucket
	dir       string
	limit     int64
	held      atomic.Int64 // bytes in dir, about: other processes may use it too
	broken    atomic.Bool  // it cannot be written
	unchecked atomic.Bool  // the store keeps no checksum that can be had
	sweeping  sync.Mutex
	fetching  [64]sync.Mutex // by blob, so that none is fetched twice at the same time
	fetches   chan struct{}  // bounds the memory for blobs that are fetched
	seed      maphash.Seed
}

// withCache puts a cache before a bucket. dir belongs to one repository.
func withCache(ctx context.Context, b *bucket, dir string, limit int64) *cached {
	c := &cached{bucket: b, dir: dir, limit: limit, fetches: make(chan struct{}, 4), seed: maphash.MakeSeed()}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		c.giveUp(ctx, err)
	} else {
		c.sweep(ctx)
	}
	return c
}

// worthCaching tells index blobs from data by kopia's letters: q for packs of indexes and manifests, xn, xs and xr for
// indexes of contents.
func worthCaching(id blob.ID) bool {
	return strings.HasPrefix(string(id), "q") || len(id) > 2 && id[0] == 'x' && strings.IndexByte("nsr", id[1]) >= 0
}

func (c *cached) GetBlob(ctx context.Context, id blob.ID, offset, length int64, output blob.OutputBuffer) error {
	if !worthCaching(id) {
		return c.bucket.GetBlob(ctx, id, offset, length, output)
	}
	if c.read(id, offset, length, output) {
		return nil
	}
	lock := &c.fetching[maphash.String(c.seed, string(id))%uint64(len(c.fetching))]
	lock.Lock()
	defer lock.Unlock()
	if c.read(id, offset, length, output) {
		return nil
	}
	if c.broken.Load() || c.unchecked.Load() { // then whole blobs are not fetched for their parts
		return c.bucket.GetBlob(ctx, id, offset, length, output)
	}
	select {
	case c.fetches <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { <-c.fetches }()
	var whole blobBytes
	verified, err := c.bucket.get(ctx, id, 0, -1, &whole)
	if err != nil {
		return err
	}
	p := whole.Bytes()
	if verified { // what was spoilt on its way must not stay
		c.store(ctx, id, func(w io.Writer) error { _, err := w.Write(p); return err })
	} else {
		c.unchecked.Store(true)
	}
	if length >= 0 {
		if offset < 0 || offset+length > int64(len(p)) {
			return fmt.Errorf("reading %s: %w", id, blob.ErrInvalidRange)
		}
		p = p[offset : offset+length]
	}
	output.Reset()
	_, err = output.Write(p)
	return err
}

func (c *cached) PutBlob(ctx context.Context, id blob.ID, data blob.Bytes, o blob.PutOptions) error {
	err := c.bucket.PutBlob(ctx, id, data, o)
	if err == nil && worthCaching(id) && !c.broken.Load() {
		c.store(ctx, id, func(w io.Writer) error { _, err := data.WriteTo(w); return err })
	}
	return err
}

func (c *cached) DeleteBlob(ctx context.Context, id blob.ID) error {
	os.Remove(c.path(id)) // a copy that stays is of no harm
	return c.bucket.DeleteBlob(ctx, id)
}

func (c *cached) path(id blob.ID) string { return filepath.Join(c.dir, string(id)) }

// A copy is in blocks of copyBlock bytes, the last one shorter, each with a checksum behind it that also covers its
// number and whether it is the last. So a part can be read and checked alone, and a copy cut short is not taken for whole.
const copyBlock = 64 << 10

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func copySum(p []byte, number int64, last bool) uint32 {
	n := uint64(number) << 1
	if last {
		n |= 1
	}
	return crc32.Update(crc32.Checksum(p, castagnoli), castagnoli, binary.LittleEndian.AppendUint64(nil, n))
}

// read gives what is wanted from the copy, if there is one. A damaged copy is removed.
func (c *cached) read(id blob.ID, offset, length int64, output blob.OutputBuffer) bool {
	file, err := os.Open(c.path(id))
	if err != nil {
		return false
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil || info.Size() == 0 {
		return false
	}
	blocks := (info.Size() + copyBlock + 3) / (copyBlock + 4)
	size := info.Size() - 4*blocks
	if length < 0 {
		offset, length = 0, size
	}
	output.Reset()
	if offset < 0 || offset+length > size {
		return false
	}
	p := make([]byte, copyBlock+4)
	for n := offset / copyBlock; length > 0; n++ {
		got, err := file.ReadAt(p, n*(copyBlock+4))
		if err != nil && !errors.Is(err, io.EOF) {
			return false
		}
		data := p[:max(got-4, 0)]
		if got < 5 || binary.LittleEndian.Uint32(p[got-4:]) != copySum(data, n, n == blocks-1) {
			os.Remove(file.Name())
			return false
		}
		data = data[offset-n*copyBlock:]
		data = data[:min(int64(len(data)), length)]
		if _, err := output.Write(data); err != nil {
			return false
		}
		offset, length = offset+int64(len(data)), length-int64(len(data))
	}
	if now := time.Now(); now.Sub(info.ModTime()) > time.Hour {
		os.Chtimes(file.Name(), now, now) // when it was used last, for the sweep
	}
	return true
}

// newCopy is how the names of copies begin that are being written.
const newCopy = ".new-"

// store writes a copy, if it can.
func (c *cached) store(ctx context.Context, id blob.ID, write func(io.Writer) error) {
	file, err := os.CreateTemp(c.dir, newCopy)
	if err != nil {
		c.giveUp(ctx, err)
		return
	}
	defer file.Close()
	w := &copyWriter{file: file, buf: make([]byte, 0, copyBlock+4)}
	err = write(w)
	if err == nil {
		err = w.flush(true)
	}
	if err == nil {
		err = os.Rename(file.Name(), c.path(id))
	}
	if err != nil {
		os.Remove(file.Name())
		c.giveUp(ctx, err)
		return
	}
	if c.held.Add(w.written) > c.limit {
		c.sweep(ctx)
	}
}

// copyWriter cuts what is written into blocks with their checksums.
type copyWriter struct {
	file    *os.File
	buf     []byte
	number  int64
	written int64
}

func (w *copyWriter) Write(p []byte) (int, error) {
	total := len(p)
	for len(p) > 0 {
		if len(w.buf) == copyBlock {
			if err := w.flush(false); err != nil {
				return 0, err
			}
		}
		n := min(len(p), copyBlock-len(w.buf))
		w.buf, p = append(w.buf, p[:n]...), p[n:]
	}
	return total, nil
}

func (w *copyWriter) flush(last bool) error {
	w.buf = binary.LittleEndian.AppendUint32(w.buf, copySum(w.buf, w.number, last))
	n, err := w.file.Write(w.buf)
	w.buf, w.number, w.written = w.buf[:0], w.number+1, w.written+int64(n)
	return err
}

func (c *cached) giveUp(ctx context.Context, err error) {
	if !c.broken.Swap(true) {
		slog.WarnContext(ctx, "the cache cannot be written; going on without it", "cache", c.dir, "error", err.Error())
	}
}

// sweep removes the copies that were used least recently, until a tenth of the limit is free, and what killed writers
// left.
func (c *cached) sweep(ctx context.Context) {
	c.sweeping.Lock()
	defer c.sweeping.Unlock()
	entries, err := os.ReadDir(c.dir)
	if err != nil {
		c.giveUp(ctx, err)
		return
	}
	var held int64
	var copies []fs.FileInfo
	for _, e := range entries {
		info, err := e.Info()
		switch {
		case err != nil: // somebody else swept it
		case !strings.HasPrefix(e.Name(), newCopy):
			held += info.Size()
			copies = append(copies, info)
		case time.Since(info.ModTime()) > time.Hour:
			os.Remove(filepath.Join(c.dir, e.Name()))
		}
	}
	if held > c.limit {
		slices.SortFunc(copies, func(a, b fs.FileInfo) int { return a.ModTime().Compare(b.ModTime()) })
		for _, info := range copies {
			if held <= c.limit-c.limit/10 {
				break
			}
			if os.Remove(filepath.Join(c.dir, info.Name())) == nil {
				held -= info.Size()
			}
		}
	}
	c.held.Store(held)
}
