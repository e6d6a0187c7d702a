package main

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"encoding/json"
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

// stages backs an image up and measures, in the same run, what each stage of that costs alone: the device read past the
// page cache, the processor's work on one core, the medium written durably in packs.
func (b *bench) stages(ctx context.Context) error {
	image := filepath.Join(b.pool.Mount, "disk.img")
	if err := makeImage(image); err != nil {
		return err
	}
	b.say("\n## The stages of a full backup\n")
	b.say("The image of the part above.")
	if _, err := b.stillpoint(ctx, false, "remote", "init"); err != nil {
		return err
	}
	cut, err := b.stillpoint(ctx, false, "cut", "--json", "--name", "only", "reflink:"+image)
	if err != nil {
		return err
	}
	var made struct{ Snapshots []string }
	if err := json.Unmarshal(cut.text, &made); err != nil {
		return err
	}
	full, err := b.stillpoint(ctx, true, "backup", "--json", made.Snapshots[0])
	if err != nil {
		return err
	}
	var r struct {
		BytesStored int64 `json:"bytes_stored"`
	}
	if err := json.Unmarshal(full.text, &r); err != nil {
		return err
	}
	stored := r.BytesStored
	const data = 4 * gib // of makeImage: 2 GiB random, 2 GiB that compress
	read, readCPU, err := readAlone(ctx, image, data)
	if err != nil {
		return err
	}
	write, writeCPU, err := writeAlone(ctx, filepath.Join(b.lab.Dir, "packs"), stored)
	if err != nil {
		return err
	}
	// The image and the folder lie on one disk here, which does both at once in a backup.
	together, err := readAndWrite(ctx, image, data, filepath.Join(b.lab.Dir, "packs"), stored)
	if err != nil {
		return err
	}
	chunk, text := random(mib), compressible(mib)
	var key [32]byte
	hasher, err := blake3.NewKeyed(key[:])
	if err != nil {
		return err
	}
	hash := perByte(func() { hasher.Reset(); hasher.Write(chunk); hasher.Sum(nil) })
	block, err := aes.NewCipher(key[:])
	if err != nil {
		return err
	}
	sealer, err := cipher.NewGCM(block)
	if err != nil {
		return err
	}
	sealed, nonce := make([]byte, 0, mib+64), make([]byte, sealer.NonceSize())
	encrypt := perByte(func() { sealer.Seal(sealed, nonce, chunk, nil) })
	packed := make([]byte, s2.MaxEncodedLen(mib))
	compress := perByte(func() { s2.Encode(packed, text) })
	processor := readCPU + writeCPU + time.Duration(data*hash+data/2*compress+float64(stored)*encrypt)
	cores := processor / time.Duration(runtime.GOMAXPROCS(0))

	b.say("\n| stage alone | at most | for this image, s |")
	b.say("|---|---|---|")
	b.say("| read the device, past the page cache | %.0f MiB/s | %.2f |", data/read.Seconds()/mib, read.Seconds())
	b.say("| write packs of 20 MiB durably | %.0f MiB/s | %.2f |", float64(stored)/write.Seconds()/mib, write.Seconds())
	b.say("| both at once, which are on one disk here | | %.2f |", together.Seconds())
	perGiB := func(d time.Duration, n int64) float64 { return d.Seconds() * gib / float64(n) }
	b.say("| the processors' part: read %.2f, hash %.2f, compress %.2f, encrypt %.2f, write %.2f CPU s/GiB | on %d cores | %.2f |",
		perGiB(readCPU, data), hash*gib/1e9, compress*gib/1e9, encrypt*gib/1e9, perGiB(writeCPU, stored), runtime.GOMAXPROCS(0), cores.Seconds())
	slowest := max(read, write, cores)
	percent := func(limit time.Duration) float64 { return 100 * limit.Seconds() / full.wall.Seconds() }
	b.say("\nThe backup took %.2f s. The slowest stage alone takes %.2f s, so that is %.0f %% of the limit; of the limit of a disk that reads and writes at once it is %.0f %%. Per GiB of data the backup takes %.2f CPU s, its stages alone %.2f.",
		full.wall.Seconds(), slowest.Seconds(), percent(slowest), percent(max(slowest, together)), full.cpu.Seconds()/4, processor.Seconds()/4)
	return nil
}

// stageWorkers is how many read or write at once, as many as a backup has workers by default here.
const stageWorkers = 6

// readAlone reads the first n bytes of a file with direct reads of 1 MiB.
func readAlone(ctx context.Context, path string, n int64) (wall, cpu time.Duration, err error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		return 0, 0, err
	}
	defer f.Close()
	return inParallel(ctx, n/mib, func(i int64, p []byte) error {
		_, err := f.ReadAt(p[:mib], i*mib)
		return err
	})
}

// writeAlone writes n bytes into files of 20 MiB, each synced before the next.
func writeAlone(ctx context.Context, dir string, n int64) (wall, cpu time.Duration, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return 0, 0, err
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

// readAndWrite does what readAlone and writeAlone do, at once.
func readAndWrite(ctx context.Context, path string, read int64, dir string, written int64) (time.Duration, error) {
	begin := time.Now()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { _, _, err := readAlone(ctx, path, read); return err })
	g.Go(func() error { _, _, err := writeAlone(ctx, dir, written); return err })
	err := g.Wait()
	return time.Since(begin), err
}

// inParallel calls do for 0 to n-1 with an aligned buffer of a pack, and measures it all.
func inParallel(ctx context.Context, n int64, do func(i int64, p []byte) error) (wall, cpu time.Duration, err error) {
	g, ctx := errgroup.WithContext(ctx)
	var buffers [stageWorkers][]byte
	for w := range buffers {
		p := random(pack + 4096)
		buffers[w] = p[-uintptr(unsafe.Pointer(&p[0]))&4095:][:pack]
	}
	begin, used := time.Now(), processorTime()
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
	err = g.Wait()
	return time.Since(begin), processorTime() - used, err
}

// processorTime is what this process has used of the processors.
func processorTime() time.Duration {
	var u unix.Rusage
	unix.Getrusage(unix.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
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
