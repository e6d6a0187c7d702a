package backup

import (
	"context"
	"encoding/binary"
	"math/rand/v2"
	"strings"
	"testing"

	"stillpoint.io/stillpoint/cbt"
)

// stamped is an image of one content over and over, with the offset in every block of 4 KiB.
type stamped struct {
	p    []byte // 1 MiB
	size int64
	salt uint64
}

func (s stamped) ReadAt(_ context.Context, p []byte, off int64) (int, error) {
	p = p[:min(int64(len(p)), s.size-off)]
	for n := 0; n < len(p); {
		n += copy(p[n:], s.p[(off+int64(n))%int64(len(s.p)):])
	}
	for n := 0; n+16 <= len(p); n += 4096 {
		binary.LittleEndian.PutUint64(p[n:], uint64(off)+uint64(n))
		binary.LittleEndian.PutUint64(p[n+8:], s.salt)
	}
	return len(p), nil
}
func (s stamped) Size() int64  { return s.size }
func (s stamped) Close() error { return nil }

// The line with a source that costs next to nothing, into a folder: what hashing, compression, encryption and writing
// take.
func BenchmarkLine(b *testing.B) {
	text := make([]byte, 1<<20)
	words := strings.Fields("the volume snapshot block extent freeze thaw verify publish node backend journal inode superblock")
	for n, rng := 0, rand.New(rand.NewPCG(1, 2)); n < len(text); {
		n += copy(text[n:], words[rng.IntN(len(words))]+" ")
	}
	for name, p := range map[string][]byte{"random": random(rand.New(rand.NewPCG(1, 2)), 1<<20), "text": text} {
		b.Run(name, func(b *testing.B) {
			w := newWorld(b, 1<<20, 1<<20)
			const size = 1 << 30
			b.SetBytes(size)
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				writer, err := w.repo.NewWriter(b.Context())
				if err != nil {
					b.Fatal(err)
				}
				q := Request{Repository: w.repo, Pool: StorePool(Budget{}, w.repo)}
				l := newLine(q, stamped{p, size, uint64(i)}, nil, writer)
				if _, err := l.run(b.Context(), cbt.Of(cbt.Extent{Length: size})); err != nil {
					b.Fatal(err)
				}
				q.Pool.Close()
				if err := writer.Close(b.Context()); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
