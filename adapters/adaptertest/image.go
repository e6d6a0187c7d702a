package adaptertest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"testing"

	"stillpoint.io/stillpoint/adapters"
)

// image reads in every way at once: aligned, unaligned, across the end, past it.
func (s *suite) image(t *testing.T) {
	a, v, r := s.open(t), s.create(t, s.Size), seeded(t)
	v.scribble(t, r, 60)
	v.write(t, random(r, 100), s.Size-100)
	snap := s.snap(t, a, v.ID(), "image")
	o, _ := adapters.As[adapters.Opener](a)
	img, err := o.Open(t.Context(), snap.ID)
	succeed(t, "Open opens a snapshot that is ready", err)
	if img.Size() != s.Size {
		broken(t, "an image has the snapshot's size", "%d instead of %d", img.Size(), s.Size)
	}
	readers := make([]error, 8)
	var wg sync.WaitGroup
	for i := range readers {
		r := rand.New(rand.NewPCG(r.Uint64(), uint64(i)))
		wg.Go(func() {
			for range 100 {
				off := r.Int64N(s.Size + 8192)
				length := 1 + r.Int64N(min(s.Size, 256<<10))
				if r.IntN(2) == 0 {
					off, length = off&^4095, length&^4095
				}
				if err := readRight(t.Context(), img, v.bytes, off, length); err != nil {
					readers[i] = err
					return
				}
			}
		})
	}
	wg.Wait()
	succeed(t, "ReadAt is safe in parallel and follows io.ReaderAt", errors.Join(readers...))
	if n, err := img.ReadAt(t.Context(), make([]byte, 8), -8); err == nil {
		broken(t, "a read before the beginning fails", "%d bytes", n)
	}
	succeed(t, "an image closes", img.Close())

	one, err := o.Open(t.Context(), snap.ID)
	succeed(t, "a snapshot can be open twice", err)
	two, err := o.Open(t.Context(), snap.ID)
	succeed(t, "a snapshot can be open twice", err)
	succeed(t, "an image closes", one.Close())
	succeed(t, "the closing of one image leaves the other readable", readRight(t.Context(), two, v.bytes, 0, s.Size))
	succeed(t, "an image closes", two.Close())
}

// readRight reads a range and says how it is wrong.
func readRight(ctx context.Context, img adapters.Image, want []byte, off, length int64) error {
	p := bytes.Repeat([]byte{0xA5}, int(length))
	n, err := img.ReadAt(ctx, p, off)
	have := max(0, min(length, int64(len(want))-off))
	switch {
	case int64(n) != have:
		return fmt.Errorf("a read of %d bytes at %d of %d gave %d: %v", length, off, len(want), n, err)
	case have < length && err != io.EOF:
		return fmt.Errorf("a short read of %d bytes at %d of %d ended in %v instead of io.EOF", length, off, len(want), err)
	case have == length && err != nil && err != io.EOF:
		return fmt.Errorf("a read of %d bytes at %d: %v", length, off, err)
	case have > 0 && !bytes.Equal(p[:n], want[off:off+have]):
		return fmt.Errorf("a read of %d bytes at %d gave other bytes", length, off)
	}
	return nil
}

// still reads a snapshot while the live volume changes.
func (s *suite) still(t *testing.T) {
	a, v, r := s.open(t), s.create(t, s.Size), seeded(t)
	v.scribble(t, r, 60)
	want := bytes.Clone(v.bytes)
	snap := s.snap(t, a, v.ID(), "still")
	o, _ := adapters.As[adapters.Opener](a)
	img, err := o.Open(t.Context(), snap.ID)
	succeed(t, "Open opens a snapshot that is ready", err)
	stop, done := make(chan struct{}), make(chan error)
	go func() {
		var errs error
		for running := true; running; {
			select {
			case <-stop:
				running = false
			default:
			}
			errs = errors.Join(errs, readRight(t.Context(), img, want, 0, s.Size))
			if errs != nil {
				running = false
			}
		}
		done <- errs
	}()
	for range 10 {
		v.scribble(t, r, 10)
	}
	close(stop)
	succeed(t, "an image stays what it was while the volume is written", <-done)
	succeed(t, "an image closes", img.Close())
	content(t, "a snapshot stays what it was after the volume was written", s.read(t, s.open(t), snap.ID), want)
	content(t, "a later snapshot has the later bytes", s.read(t, a, s.snap(t, a, v.ID(), "later").ID), v.bytes)
}
