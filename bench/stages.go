package main

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"time"
	"unsafe"

	"github.com/klauspost/compress/s2"
	"github.com/zeebo/blake3"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// stages measures, in the same run as the backup, what each of its stages costs alone: the device read past the page
// cache, the processor's work on one core, the medium written durably in packs. stored is what the backup wrote, in
// bytes. It returns how long the slowest of them takes for the whole image.
func (b *bench) stages(ctx context.Context, image string, stored int64) (time.Duration, error) {
	const data = 4 * gib // of makeImage: 2 GiB random, 2 GiB that compress
	read, err := readAlone(ctx, image, data)
	if err != nil {
		return 0, err
	}
	write, err := writeAlone(ctx, filepath.Join(b.lab.Dir, "packs"), stored)
	if err != nil {
		return 0, err
	}
	chunk, text := random(mib), compressible(mib)
	var key [32]byte
	hasher, err := blake3.NewKeyed(key[:])
	if err != nil {
		return 0, err
	}
	hash := perByte(func() { hasher.Reset(); hasher.Write(chunk); hasher.Sum(nil) })
	block, err := aes.NewCipher(key[:])
	if err != nil {
		return 0, err
	}
	sealer, err := cipher.NewGCM(block)
	if err != nil {
		return 0, err
	}
	sealed, nonce := make([]byte, 0, mib+64), make([]byte, sealer.NonceSize())
	encrypt := perByte(func() { sealer.Seal(sealed, nonce, chunk, nil) })
	packed := make([]byte, s2.MaxEncodedLen(mib))
	compress := perByte(func() { s2.Encode(packed, text) })
	processor := time.Duration(data*hash + data/2*compress + float64(stored)*encrypt)
	cores := processor / time.Duration(runtime.GOMAXPROCS(0))

	b.say("\n| stage alone | at most | for this image, s |")
	b.say("|---|---|---|")
	b.say("| read the device, past the page cache | %.0f MiB/s | %.2f |", data/read.Seconds()/mib, read.Seconds())
	b.say("| hash, compress, encrypt on %d cores | %.2f, %.2f and %.2f CPU s/GiB | %.2f |", runtime.GOMAXPROCS(0), hash*gib/1e9, compress*gib/1e9, encrypt*gib/1e9, cores.Seconds())
	b.say("| write packs of 20 MiB durably | %.0f MiB/s | %.2f |", float64(stored)/write.Seconds()/mib, write.Seconds())
	return max(read, write, cores), nil
}

// stageWorkers is how many read or write at once, as many as a backup has workers by default here.
const stageWorkers = 6

// readAlone reads the first n bytes of a file with direct reads of 1 MiB.
func readAlone(ctx context.Context, path string, n int64) (time.Duration, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	return inParallel(ctx, n/mib, func(i int64, p []byte) error {
		_, err := f.ReadAt(p[:mib], i*mib)
		return err
	})
}

// writeAlone writes n bytes into files of 20 MiB, each synced before the next.
func writeAlone(ctx context.Context, dir string, n int64) (time.Duration, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	return inParallel(ctx, n/pack, func(i int64, p []byte) error {
		f, err := os.OpenFile(filepath.Join(dir, fmt.Sprint(i)), os.O_WRONLY|os.O_CREATE|unix.O_DIRECT, 0o600)
		if err != nil {
			return err
		}
		defer f.Close()
		for off := 0; off < pack; off += mib {
			if _, err := f.Write(p[off : off+mib]); err != nil {
				return err
			}
		}
		return f.Sync()
	})
}

const pack = 20 * mib

// inParallel calls do for 0 to n-1 with an aligned buffer of a pack, and times it all.
func inParallel(ctx context.Context, n int64, do func(i int64, p []byte) error) (time.Duration, error) {
	g, ctx := errgroup.WithContext(ctx)
	var buffers [stageWorkers][]byte
	for w := range buffers {
		p := random(pack + 4096)
		buffers[w] = p[-uintptr(unsafe.Pointer(&p[0]))&4095:][:pack]
	}
	begin := time.Now()
	for w := range int64(stageWorkers) {
		g.Go(func() error {
			for i := w; i < n; i += stageWorkers {
				if ctx.Err() != nil {
					return ctx.Err()
				}
				if err := do(i, buffers[w]); err != nil {
					return err
				}
			}
			return nil
		})
	}
	err := g.Wait()
	return time.Since(begin), err
}

// perByte is how many nanoseconds of one core a stage takes for a byte, by calls that each take 1 MiB.
func perByte(do func()) float64 {
	const calls = 500
	begin := time.Now()
	for range calls {
		do()
	}
	return float64(time.Since(begin)) / (calls * mib)
}
