package cbt_test

import (
	"errors"
	"math"
	"runtime"
	"slices"
	"strings"
	"testing"

	"stillpoint.io/stillpoint/cbt"
	"stillpoint.io/stillpoint/fault"
)

func TestCheckNamesWhatIsWrong(t *testing.T) {
	for _, c := range []struct {
		name string
		in   []cbt.Extent
		want string // part of the error; empty: none
	}{
		{"touching", []cbt.Extent{{Offset: 10, Length: 10}, {Offset: 20, Length: 80}}, ""},
		{"before the start", []cbt.Extent{{Offset: 9, Length: 10}}, "at 9"},
		{"overlap", []cbt.Extent{{Offset: 10, Length: 10}, {Offset: 19, Length: 10}}, "10 bytes at 19"},
		{"disorder", []cbt.Extent{{Offset: 50, Length: 10}, {Offset: 20, Length: 10}}, "at 20"},
		{"twice", []cbt.Extent{{Offset: 50, Length: 10}, {Offset: 50, Length: 10}}, "before 60"},
		{"past the end", []cbt.Extent{{Offset: 90, Length: 11}}, "after 100"},
		{"behind the end", []cbt.Extent{{Offset: 101, Length: 1}}, "at 101"},
		{"empty", []cbt.Extent{{Offset: 20}}, "0 bytes at 20"},
		{"negative", []cbt.Extent{{Offset: 20, Length: -5}}, "-5 bytes at 20"},
		{"overflow", []cbt.Extent{{Offset: 20, Length: math.MaxInt64}}, "at 20"},
		{"overflow at the end", []cbt.Extent{{Offset: math.MaxInt64, Length: math.MaxInt64}}, "after 100"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := collect(cbt.Check(cbt.Of(c.in...), 10, 100))
			if c.want == "" {
				if err != nil || !slices.Equal(got, c.in) {
					t.Fatalf("got %v, %v", got, err)
				}
				return
			}
			if !errors.Is(err, fault.Corrupt) || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("error %v, want a corrupt one with %q", err, c.want)
			}
			if !slices.Equal(got, c.in[:len(c.in)-1]) {
				t.Errorf("passed %v on", got)
			}
		})
	}
}

// At the far end of int64 nothing wraps.
func TestFarEnd(t *testing.T) {
	const last = math.MaxInt64
	s := []cbt.Extent{{Offset: 0, Length: 1}, {Offset: last - 3, Length: 2, Zero: true}, {Offset: last - 1, Length: 1}}
	of := cbt.Of(s...)
	for _, c := range []struct {
		name string
		got  cbt.Seq
		want []cbt.Extent
	}{
		{"Check", cbt.Check(of, 0, last), s},
		{"Clip", cbt.Clip(of, last-2, last), []cbt.Extent{{Offset: last - 2, Length: 1, Zero: true}, {Offset: last - 1, Length: 1}}},
		{"Coalesce", cbt.Coalesce(of), s},
		{"Align", cbt.Align(of, 1<<62, last), []cbt.Extent{{Length: last}}},
		{"Align to more than the volume", cbt.Align(of, last, last), []cbt.Extent{{Length: last}}},
		{"Align finely", cbt.Align(of, 2, last), []cbt.Extent{{Length: 2}, {Offset: last - 3, Length: 2, Zero: true}, {Offset: last - 1, Length: 1}}},
		{"Fill", cbt.Fill(of, 0, last), []cbt.Extent{s[0], {Offset: 1, Length: last - 4, Zero: true}, s[1], s[2]}},
		{"Merge", cbt.Merge(of, cbt.Of(cbt.Extent{Length: last, Zero: true})), []cbt.Extent{s[0], {Offset: 1, Length: last - 2, Zero: true}, s[2]}},
		{"Subtract", cbt.Subtract(cbt.Of(cbt.Extent{Length: last}), of), []cbt.Extent{{Offset: 1, Length: last - 4}}},
		{"Intersect", cbt.Intersect(cbt.Of(cbt.Extent{Length: last}), of), []cbt.Extent{{Length: 1}, {Offset: last - 3, Length: 2}, {Offset: last - 1, Length: 1}}},
	} {
		if got, err := collect(c.got); err != nil || !slices.Equal(got, c.want) {
			t.Errorf("%s: %v, %v\nwant %v", c.name, got, err, c.want)
		}
	}
}

// TestFillAgain ranges over a result twice.
func TestFillAgain(t *testing.T) {
	filled := cbt.Fill(cbt.Of(cbt.Extent{Offset: 3, Length: 2}), 0, 10)
	for range 2 {
		if total, err := cbt.Sum(filled); err != nil || total != (cbt.Total{Extents: 3, Data: 2, Zero: 8}) {
			t.Error(total, err)
		}
	}
}

func TestSum(t *testing.T) {
	broken := errors.New("broken")
	s := cbt.Of(cbt.Extent{Offset: 0, Length: 3}, cbt.Extent{Offset: 3, Length: 4, Zero: true}, cbt.Extent{Offset: 9, Length: 5})
	if got, err := cbt.Sum(s); err != nil || got != (cbt.Total{Extents: 3, Data: 8, Zero: 4}) {
		t.Errorf("got %+v, %v", got, err)
	}
	if got, err := cbt.Sum(failing(s, broken)); err != broken || got.Extents != 3 {
		t.Errorf("got %+v, %v", got, err)
	}
}

// failing is s and then an error.
func failing(s cbt.Seq, err error) cbt.Seq {
	return func(yield func(cbt.Extent, error) bool) {
		for e := range s {
			if !yield(e, nil) {
				return
			}
		}
		yield(cbt.Extent{}, err)
	}
}

// An error of either input comes out once, as the last thing, after nothing that the inputs did not say.
func TestErrorsPassThrough(t *testing.T) {
	broken := errors.New("broken")
	a := []cbt.Extent{{Offset: 0, Length: 10}, {Offset: 20, Length: 10, Zero: true}}
	far := []cbt.Extent{{Offset: 5, Length: 95}}
	p := params{size: 100, from: 0, to: 100, chunk: 8}
	for _, op := range operations {
		for name, in := range map[string][2]cbt.Seq{
			"left":          {failing(cbt.Of(a...), broken), cbt.Of(far...)},
			"right":         {cbt.Of(far...), failing(cbt.Of(a...), broken)},
			"both at once":  {failing(cbt.Of(), broken), failing(cbt.Of(), broken)},
			"right at once": {cbt.Of(far...), failing(cbt.Of(), broken)},
		} {
			binary := op.name == "Merge" || op.name == "Subtract" || op.name == "Intersect"
			if !binary && strings.HasPrefix(name, "right") {
				continue
			}
			errs := 0
			for e, err := range op.run(in[0], in[1], p) {
				if errs > 0 {
					t.Errorf("%s, %s: goes on after the error with %v, %v", op.name, name, e, err)
				}
				if err != nil {
					errs++
					if err != broken || e != (cbt.Extent{}) {
						t.Errorf("%s, %s: %v, %v", op.name, name, e, err)
					}
				}
			}
			if errs != 1 {
				t.Errorf("%s, %s: %d errors", op.name, name, errs)
			}
		}
	}
}

// Breaking out of a result, at any point, lets both inputs clean up and leaves no coroutine behind.
func TestBreakReleasesTheInputs(t *testing.T) {
	p := params{size: 4000, from: 0, to: 4000, chunk: 4}
	var many []cbt.Extent
	for i := range int64(400) {
		many = append(many, cbt.Extent{Offset: 10 * i, Length: 5, Zero: i%2 == 0})
	}
	before := runtime.NumGoroutine()
	for _, op := range operations {
		for stop := range 30 {
			open := 0
			watched := func(yield func(cbt.Extent, error) bool) {
				open++
				defer func() { open-- }()
				for _, e := range many {
					if !yield(e, nil) {
						return
					}
				}
			}
			n := 0
			for range op.run(watched, watched, p) {
				if n++; n > stop {
					break
				}
			}
			if open != 0 {
				t.Fatalf("%s, stopped after %d: %d inputs still open", op.name, n, open)
			}
		}
	}
	if after := runtime.NumGoroutine(); after > before {
		t.Errorf("%d goroutines, before %d", after, before)
	}
}

// comb is n extents of 4 KiB, one every 64 KiB, shifted.
func comb(n, shift int64) cbt.Seq {
	return func(yield func(cbt.Extent, error) bool) {
		for i := range n {
			if !yield(cbt.Extent{Offset: i<<16 + shift, Length: 4096, Zero: i&3 == 0}, nil) {
				return
			}
		}
	}
}

// No operation allocates per extent, however many there are.
func TestNoAllocationPerExtent(t *testing.T) {
	for _, op := range operations {
		if allocs := allocations(op, 20000); allocs > 100 {
			t.Errorf("%s: %v allocations for 20,000 extents", op.name, allocs)
		}
	}
}

func allocations(op operation, n int64) float64 {
	p := params{size: n << 16, to: n << 16, chunk: 1 << 17}
	return testing.AllocsPerRun(3, func() {
		for range op.run(comb(n, 0), comb(n, 2048), p) {
		}
	})
}

// BenchmarkOperations reports the time and the allocations per extent that goes in.
func BenchmarkOperations(b *testing.B) {
	const n = 100_000
	p := params{size: n << 16, to: n << 16, chunk: 1 << 17}
	for _, op := range operations {
		if op.name == "AlignShorter" || op.name == "FillFrom" {
			continue
		}
		b.Run(op.name, func(b *testing.B) {
			in := float64(n)
			if op.name == "Merge" || op.name == "Subtract" || op.name == "Intersect" {
				in = 2 * n
			}
			for b.Loop() {
				for range op.run(comb(n, 0), comb(n, 2048), p) {
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/in, "ns/extent")
			b.ReportMetric(allocations(op, n)/in, "allocs/extent")
			b.ReportMetric(0, "ns/op")
		})
	}
}
