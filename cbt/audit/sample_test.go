package audit

import (
	"math"
	"math/rand/v2"
	"slices"
	"testing"
)

// drawn takes a sample, keeping the contract of Known, and fails if a chunk comes twice or must not come.
func drawn(t *testing.T, f Field, listed map[int64]bool, rng *rand.Rand) []int64 {
	t.Helper()
	known := map[int64]bool{}
	f.Known = func(c int64) bool { return listed[c] || known[c] }
	var got []int64
	for c := range f.Sample(rng) {
		if c < 0 || c >= f.chunks() || listed[c] || known[c] {
			t.Fatalf("chunk %d of %d: listed %v, given before %v", c, f.chunks(), listed[c], known[c])
		}
		known[c] = true
		got = append(got, c)
	}
	return got
}

func TestSampleParts(t *testing.T) {
	const chunk = 1 << 20
	rng := rand.New(rand.NewPCG(1, 1))
	c := new(Coverage)
	c.Resize(1<<40, at(100))
	c.Mark(500<<30, 500<<30+100<<20, at(101))
	c.Mark(0, 500<<30, at(200))
	c.Mark(501<<30, 1<<40, at(200))
	f := Field{Size: 1 << 40, Chunk: chunk, Data: []int{5, 77}, Stretch: 64 << 20, Coverage: c, Instant: at(300)}
	got := drawn(t, f, nil, rng)
	want := f.Wanted()
	if want != 64 {
		t.Fatalf("%d chunks wanted", want)
	}
	for _, off := range Superblocks {
		if !slices.Contains(got, off/chunk) {
			t.Errorf("the superblock at %d is left out", off)
		}
	}
	if !slices.Contains(got, 1<<20-1) {
		t.Error("the last chunk is left out")
	}
	const fixed = 7 - 1 // 0 and 64 KiB are in one chunk
	if int64(len(got)) != fixed+want {
		t.Fatalf("%d chunks", len(got))
	}
	data, rest := got[fixed:fixed+want/2], got[len(got)-int(want/4):]
	for _, n := range data {
		if s := n * chunk / f.Stretch; s != 5 && s != 77 {
			t.Errorf("chunk %d was to be where data is", n)
		}
	}
	for i, n := range rest { // what was compared longest ago, in order
		if n != 500<<10+100+int64(i) {
			t.Errorf("chunk %d, %d-th of the rotation", n, i)
		}
	}
	f.Listed = 1 << 34
	if f.Wanted() != 1<<34/20/chunk {
		t.Errorf("%d chunks for a large delta", f.Wanted())
	}
}

// Sizes and deltas of all kinds: no chunk twice, none that is listed, all of a small volume, enough of a large one.
func TestSampleProperties(t *testing.T) {
	for seed := range uint64(200) {
		rng := rand.New(rand.NewPCG(seed, 9))
		chunk := int64(1) << (16 + rng.IntN(9))
		f := Field{Size: 1 + rng.Int64N(600*chunk), Chunk: chunk, Stretch: 64 << 20, Instant: at(50)}
		if rng.IntN(2) == 0 {
			f.Coverage = new(Coverage)
			f.Coverage.Resize(f.Size, at(rng.Int64N(100)))
			f.Coverage.Mark(0, f.Size/2, at(rng.Int64N(100)))
		}
		for n := range int((f.Size + f.Stretch - 1) / f.Stretch) {
			if rng.IntN(2) == 0 {
				f.Data = append(f.Data, n)
			}
		}
		listed := map[int64]bool{}
		for range rng.IntN(int(f.chunks())) {
			listed[rng.Int64N(f.chunks())] = true
		}
		got := int64(len(drawn(t, f, listed, rng)))
		free := f.chunks() - int64(len(listed))
		if f.Wanted() >= f.chunks() && got != free {
			t.Errorf("seed %d: %d of %d chunks of a small volume", seed, got, free)
		}
		if got > f.Wanted()+int64(len(Superblocks))+1 {
			t.Errorf("seed %d: %d chunks, %d wanted", seed, got, f.Wanted())
		}
	}
}

// The chance to find a fraction f of missed changes is the formula's: counted over many samples, for several f, within
// four standard deviations; and the rotation alone finds what stays in as many backups as it says.
func TestDetection(t *testing.T) {
	const chunk, chunks, trials = 1 << 20, 1 << 14, 4000
	f := Field{Size: chunks * chunk, Chunk: chunk, Stretch: 64 << 20, Instant: at(9)}
	n := float64(f.Wanted())
	fixed := map[int64]bool{chunks - 1: true}
	for _, off := range Superblocks {
		fixed[off/chunk] = true
	}
	for _, missed := range []int64{16, 128, 512, 2048} {
		rng := rand.New(rand.NewPCG(uint64(missed), 11))
		found := 0
		for range trials {
			bad := map[int64]bool{}
			for int64(len(bad)) < missed {
				if c := rng.Int64N(chunks); !fixed[c] {
					bad[c] = true
				}
			}
			for _, c := range drawn(t, f, nil, rng) {
				if bad[c] {
					found++
					break
				}
			}
		}
		fraction := float64(missed) / float64(chunks-int64(len(fixed)))
		want := 1 - math.Pow(1-fraction, n)
		got := float64(found) / trials
		sigma := math.Sqrt(want * (1 - want) / trials)
		t.Logf("%.2f %% of %d chunks missed: found in %.1f %% of %d samples of %.0f, 1-(1-f)^n = %.1f %%", 100*fraction, chunks, 100*got, trials, n, 100*want)
		if got < want-4*sigma || got > want+4*sigma+0.005 { // without replacement it is a little more
			t.Errorf("found in %.4f, want %.4f ± %.4f", got, want, sigma)
		}
	}

	rng := rand.New(rand.NewPCG(5, 5))
	f.Coverage = new(Coverage)
	f.Coverage.Resize(f.Size, at(1))
	backups := 0
	for ; f.Coverage.Oldest().Equal(at(1)); backups++ {
		f.Instant = at(10 + int64(backups))
		for _, c := range drawn(t, f, nil, rng) {
			f.Coverage.Mark(c*chunk, (c+1)*chunk, f.Instant)
		}
	}
	most := int(chunks/(f.Wanted()/4)) + 1
	t.Logf("the rotation has looked at all of %d chunks after %d backups", chunks, backups)
	if backups > most {
		t.Errorf("after %d backups something was never looked at; at most %d expected", backups, most)
	}
}
