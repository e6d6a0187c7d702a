package repository

import (
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"runtime"
	"testing"
	"time"

	"github.com/kopia/kopia/repo"
	"github.com/kopia/kopia/repo/maintenance"
	"github.com/kopia/kopia/snapshot/snapshotgc"
)

// manyBackups is a repository of 50 backups of one volume of 100,000 chunks, 640 of which change each time.
func manyBackups(b *testing.B) *Repository {
	b.Helper()
	const chunks, backups, changed = 100_000, 50, 640
	r := mustOpen(b, mustInit(b, DefaultChunkSize), OpenOptions{})
	ctx := context.Background()
	rng := rand.New(rand.NewPCG(1, 2))
	each := int(SegmentSize / r.ChunkSize())
	all := make([]Chunk, chunks)
	segments := make([]Segment, chunksIn(chunks, int64(each)))
	p := make([]byte, r.ChunkSize())
	next := uint64(0)
	for n := range backups {
		w, err := r.NewWriter(ctx)
		if err != nil {
			b.Fatal(err)
		}
		dirty := map[int]bool{}
		write := func(i int) {
			next++
			binary.LittleEndian.PutUint64(p, next)
			if all[i], _, err = w.Write(ctx, p); err != nil {
				b.Fatal(err)
			}
			dirty[i/each] = true
		}
		if n == 0 {
			for i := range all {
				write(i)
			}
		} else {
			for range changed {
				write(rng.IntN(chunks))
			}
		}
		x := w.NewIndex(chunks * r.ChunkSize())
		for s := range segments {
			part := all[s*each : min(len(all), (s+1)*each)]
			if dirty[s] {
				if segments[s], err = w.WriteSegment(ctx, part, int64(len(part))*r.ChunkSize()); err != nil {
					b.Fatal(err)
				}
			}
			if err := x.Add(segments[s]); err != nil {
				b.Fatal(err)
			}
		}
		image, err := x.Finish(ctx)
		if err != nil {
			b.Fatal(err)
		}
		d := disk{name: "v"}
		made := d.describe(r, fmt.Sprint("b", n), time.Now())
		made.Size, made.Image = chunks*r.ChunkSize(), image
		if _, err := w.Commit(ctx, made, readsBack()); err != nil {
			b.Fatal(err)
		}
		if err := w.Close(ctx); err != nil {
			b.Fatal(err)
		}
	}
	return r
}

// What it costs to find out who refers to what: Stillpoint's way, for Space and for maintenance, and kopia's.
func BenchmarkReferences(b *testing.B) {
	r := manyBackups(b)
	ctx := context.Background()
	b.Run("space", func(b *testing.B) {
		for b.Loop() {
			s, err := r.Space(ctx)
			if err != nil || len(s.Volumes) != 1 {
				b.Fatal(s, err)
			}
		}
		b.ReportMetric(float64(heap())/(1<<20), "heap-MiB")
	})
	b.Run("kopia", func(b *testing.B) {
		for b.Loop() {
			err := repo.DirectWriteSession(ctx, r.kopia, repo.WriteSessionOptions{}, func(ctx context.Context, w repo.DirectRepositoryWriter) error {
				return snapshotgc.Run(ctx, w, false, maintenance.SafetyFull, time.Now())
			})
			if err != nil {
				b.Fatal(err)
			}
		}
	})
}

func heap() uint64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}
