package audit

import (
	"encoding/json"
	"errors"
	"math/rand/v2"
	"reflect"
	"slices"
	"testing"
	"time"

	"stillpoint.io/stillpoint/cbt"
	"stillpoint.io/stillpoint/fault"
)

func at(n int64) time.Time { return time.Unix(n, 0).UTC() }

// model is a coverage byte by byte: the second at which each was compared.
type model []int64

func (m model) resize(size int, at int64) model {
	for len(m) < size {
		m = append(m, at)
	}
	return m[:size]
}

func (m model) mark(from, to, at int64) {
	for i := max(0, from); i < min(to, int64(len(m))); i++ {
		m[i] = max(m[i], at)
	}
}

// step does the same random thing to both.
func step(rng *rand.Rand, c *Coverage, m model, most int) model {
	now := rng.Int64N(50)
	switch rng.IntN(20) {
	case 0:
		size := rng.IntN(most)
		c.Resize(int64(size), at(now))
		return m.resize(size, now)
	case 1:
		c.NotAfter(at(40))
		for i := range m {
			m[i] = min(m[i], 40)
		}
	default:
		from := rng.Int64N(int64(most)) - 10
		to := from + rng.Int64N(int64(most)/4)
		c.Mark(from, to, at(now))
		m.mark(from, to, now)
	}
	return m
}

// check compares all that a coverage says with the model; exact says that it cannot have forgotten anything.
func check(t *testing.T, c *Coverage, m model, exact bool) {
	t.Helper()
	if c.Size() != int64(len(m)) {
		t.Fatalf("%d bytes, want %d", c.Size(), len(m))
	}
	if len(c.spans) > coverageMax {
		t.Fatalf("%d stretches", len(c.spans))
	}
	for i := 1; i < len(c.spans); i++ {
		if c.spans[i].end <= c.spans[i-1].end || c.spans[i].at == c.spans[i-1].at {
			t.Fatalf("stretches %v", c.spans[i-1:i+1])
		}
	}
	if len(m) == 0 {
		if !c.Oldest().IsZero() {
			t.Fatalf("the oldest of nothing is %v", c.Oldest())
		}
		return
	}
	claimed := make(model, len(m))
	for i := range m {
		claimed[i] = c.At(int64(i)).Unix()
		if claimed[i] > m[i] || exact && claimed[i] != m[i] {
			t.Fatalf("byte %d of %d: compared at %d, want %d", i, len(m), claimed[i], m[i])
		}
	}
	if got, want := c.Oldest(), at(slices.Min(claimed)); !got.Equal(want) {
		t.Fatalf("the oldest is %v, want %v", got, want)
	}
	for _, before := range []int64{0, 10, 25, 60} {
		var want []cbt.Extent // oldest first, then by offset
		var total int64
		for s := range before {
			for i := 0; i < len(claimed); i++ {
				from := i
				for i < len(claimed) && claimed[i] == s {
					i++
				}
				if i > from {
					want = append(want, cbt.Extent{Offset: int64(from), Length: int64(i - from)})
					total += int64(i - from)
				}
			}
		}
		if got := slices.Collect(c.Stale(at(before))); !reflect.DeepEqual(got, want) {
			t.Fatalf("before %d: %v, want %v", before, got, want)
		}
		if got := c.Older(at(before)); got != total {
			t.Fatalf("before %d: %d bytes, want %d", before, got, total)
		}
		budget := total / 3
		next, sum := c.Next(budget, at(before)), int64(0)
		for i, e := range next {
			sum += e.Length
			if e.Offset != want[i].Offset || e.Length != want[i].Length && i != len(next)-1 {
				t.Fatalf("next is %v of %v", next, want)
			}
		}
		if sum != budget {
			t.Fatalf("next has %d bytes, want %d", sum, budget)
		}
	}
}

// Against the naive model, at every step: equal as long as it fits, and never more than is true when it does not.
func TestCoverageModel(t *testing.T) {
	for seed := range uint64(30) {
		rng := rand.New(rand.NewPCG(seed, 1))
		c, m := new(Coverage), model(nil)
		for range 100 {
			m = step(rng, c, m, 600)
			check(t, c, m, true)
		}
	}
}

// Of more stretches than fit, it forgets the least.
func TestCoverageBound(t *testing.T) {
	const size = 40_000
	rng := rand.New(rand.NewPCG(7, 7))
	c := new(Coverage)
	c.Resize(size, at(1))
	m := model(nil).resize(size, 1)
	c.Mark(30_000, 40_000, at(1000)) // what a scrub did
	m.mark(30_000, 40_000, 1000)
	for i := range int64(20_000) {
		off, now := rng.Int64N(30_000), 2+i%7
		c.Mark(off, off+1, at(now))
		m.mark(off, off+1, now)
	}
	if len(c.spans) > coverageMax {
		t.Fatalf("%d stretches", len(c.spans))
	}
	lost := 0
	for i := range m {
		switch got := c.At(int64(i)).Unix(); {
		case got > m[i]:
			t.Fatalf("byte %d: compared at %d, want at most %d", i, got, m[i])
		case got < m[i] && i >= 30_000:
			t.Fatalf("byte %d of the scrub's was forgotten", i)
		case got < m[i]:
			lost++
		}
	}
	if lost == 0 {
		t.Error("nothing was forgotten: the bound was not met")
	}
}

func TestCoverageJSON(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 3))
	c, m := new(Coverage), model(nil)
	for range 200 {
		m = step(rng, c, m, 500)
		text, err := json.Marshal(c)
		if err != nil {
			t.Fatal(err)
		}
		back := new(Coverage)
		if err := json.Unmarshal(text, back); err != nil {
			t.Fatal(err)
		}
		check(t, back, m, true)
	}
	for text, kind := range map[string]fault.Kind{
		`{"version":2,"spans":[[1,1]]}`:       fault.Unsupported,
		`{"version":1,"spans":[[5,1],[5,2]]}`: fault.Corrupt,
		`{"version":1,"spans":[[0,1]]}`:       fault.Corrupt,
		`{"version":1,"spans":"all"}`:         fault.Corrupt,
	} {
		if err := json.Unmarshal([]byte(text), new(Coverage)); !errors.Is(err, kind) {
			t.Errorf("%s: %v, want %s", text, err, kind)
		}
	}
}

// Whatever is done, in whatever order: the coverage is the model's.
func FuzzCoverage(f *testing.F) {
	f.Add([]byte{0, 100, 1, 10, 20, 5, 15, 9})
	f.Add([]byte{0, 200, 3, 1, 0, 200, 7, 0, 50, 4, 1, 49, 2, 8})
	f.Fuzz(func(t *testing.T, ops []byte) {
		c, m := new(Coverage), model(nil)
		for len(ops) >= 4 {
			a, b, s := int64(ops[1]), int64(ops[2]), int64(ops[3]%50)
			if ops[0]%4 == 0 {
				c.Resize(a, at(s))
				m = m.resize(int(a), s)
			} else {
				c.Mark(a, b, at(s))
				m.mark(a, b, s)
			}
			ops = ops[4:]
		}
		check(t, c, m, true)
	})
}

// Scrubs at any pace look at every byte within the time, and read what they must and not everything each time.
func TestDue(t *testing.T) {
	const size, least, day = 1000, 10, 24 * time.Hour
	for _, every := range []time.Duration{time.Hour, day, 10 * day, 40 * day} {
		const within = 30 * day
		c := new(Coverage)
		begin := at(1_000_000_000)
		c.Resize(size, begin)
		last, read := begin, int64(0)
		for now := begin.Add(every); now.Before(begin.Add(100 * day)); now = now.Add(every) {
			due := Due(c, least, now, now, last, within)
			for _, e := range c.Next(due, now) {
				c.Mark(e.Offset, e.End(), now)
				read += e.Length
			}
			if last = now; every < within && now.Sub(c.Oldest()) > within {
				t.Fatalf("every %v: after %v something was compared %v ago", every, now.Sub(begin), now.Sub(c.Oldest()))
			}
		}
		// At the pace of size a period, and a few times that with a floor that is more than its share.
		if most := max(5*size, int64(100*day/every)*least); read > most {
			t.Errorf("every %v: %d bytes read in 100 days, at most %d expected", every, read, most)
		}
	}
	c := new(Coverage)
	c.Resize(size, at(1))
	c.Mark(0, 600, at(100))
	if got := Due(c, least, at(100), at(100), at(99), day); got != least {
		t.Errorf("%d bytes are due at once after a scrub", got)
	}
	c.Mark(0, size, at(100))
	if got := Due(c, least, at(100), at(100).Add(90*day), at(1), day); got != 0 {
		t.Errorf("%d bytes are due of a snapshot that was looked at everywhere", got)
	}
}
