package repository

import (
	"encoding/binary"
	"io"
	"sync"

	"github.com/klauspost/compress/s2"
	"github.com/kopia/kopia/repo/compression"
)

// plainS2 writes what kopia's "s2-default" writes and anybody's kopia reads, in the goroutine that asks for it.
// Kopia's own starts others for each chunk and keeps buffers for as many as there are processors; a backup has its workers
// already, and their memory is counted.
type plainS2 struct {
	compression.Compressor // kopia's, for all else
	header                 [4]byte
	writers                sync.Pool // of *s2.Writer
}

// usePlainS2 takes the place of kopia's compressor in its table, in which contents are looked up by their headers.
var usePlainS2 = sync.OnceFunc(func() {
	c := &plainS2{Compressor: compression.ByHeaderID[chunkCompressor]}
	binary.BigEndian.PutUint32(c.header[:], uint32(chunkCompressor))
	c.writers.New = func() any { return s2.NewWriter(nil, s2.WriterConcurrency(1)) }
	compression.ByHeaderID[chunkCompressor] = c
})

func (c *plainS2) Compress(to io.Writer, from io.Reader) error {
	if _, err := to.Write(c.header[:]); err != nil {
		return err
	}
	w := c.writers.Get().(*s2.Writer)
	defer c.writers.Put(w)
	w.Reset(to)
	if _, err := w.ReadFrom(from); err != nil {
		return err
	}
	return w.Close()
}
