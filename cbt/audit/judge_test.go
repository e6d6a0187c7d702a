package audit

import (
	"slices"
	"strings"
	"testing"

	"stillpoint.io/stillpoint/cbt"
	"stillpoint.io/stillpoint/fault"
)

func TestJudge(t *testing.T) {
	sized := func(name, version string, base, target int64) Facts {
		return Facts{Source: Source{name, version, true}, BaseSize: base, TargetSize: target, Smallest: min(base, target), Largest: max(base, target)}
	}
	same := func(name, version string) Facts { return sized(name, version, 10*gib, 10*gib) }
	quiet := func(f Facts) Facts { f.Quiet = true; return f }
	for what, c := range map[string]struct {
		facts Facts
		want  string // verdict and name of each finding
	}{
		"nothing known":                 {sized("x", "1", 10*gib, 10*gib), ""},
		"ESXi 5 past 128 GiB":           {sized(VMwareCBT, "5.5.0.1", 100*gib, 200*gib), "full grown past a power of two, warn grown"},
		"ESXi 5 from 128 GiB":           {sized(VMwareCBT, "5.1", 128*gib, 129*gib), "full grown past a power of two, warn grown"},
		"ESXi 5 between powers":         {sized(VMwareCBT, "5.1", 129*gib, 256*gib), "warn grown"},
		"ESXi 5 past 512 GiB":           {sized(VMwareCBT, "5.1", 300*gib, 600*gib), "full grown past a power of two, warn grown"},
		"ESXi 5 grown before the base":  {Facts{Source: Source{VMwareCBT, "5.1", true}, BaseSize: 200 * gib, TargetSize: 200 * gib, Smallest: 100 * gib, Largest: 200 * gib}, "full grown past a power of two"},
		"ESXi 6.5 past 128 GiB":         {sized(VMwareCBT, "6.5.0.1", 100*gib, 200*gib), "warn grown"},
		"ESXi 6.0 unpatched":            {same(VMwareCBT, "6.0.0.3029758"), "whole writes lost in consolidation"},
		"ESXi 6.0 unpatched, first":     {sized(VMwareCBT, "6.0.0.3029758", 0, 10*gib), "whole writes lost in consolidation"},
		"ESXi 6.0 patched":              {same(VMwareCBT, "6.0.0.3247720"), ""},
		"librbd 16.2.13, writing":       {same(RBDFastDiff, "16.2.13"), "full object map under I/O"},
		"librbd 16.2.13, frozen":        {quiet(same(RBDFastDiff, "v16.2.13-1~bpo12")), "warn object map race"},
		"librbd 16.2.15":                {same(RBDFastDiff, "16.2.15"), ""},
		"librbd 17.2.6":                 {same(RBDFastDiff, "17.2.6"), "full object map under I/O"},
		"librbd 17.2.7":                 {same(RBDFastDiff, "17.2.7"), ""},
		"librbd 18.1.3":                 {same(RBDFastDiff, "18.1.3"), "full object map under I/O"},
		"librbd 19":                     {same(RBDFastDiff, "19.2.0"), ""},
		"librbd 15.2.15":                {same(RBDFastDiff, "15.2.15"), "warn offsets off the objects' edges"},
		"librbd 15.2.17":                {same(RBDFastDiff, "15.2.17"), ""},
		"librbd 16.2.7, frozen":         {quiet(same(RBDFastDiff, "16.2.7")), "warn object map race, warn offsets off the objects' edges"},
		"krbd 6.1, writing":             {same(KRBDFastDiff, "6.1.0-13-amd64"), "full object map under I/O"},
		"krbd 6.1, frozen":              {quiet(same(KRBDFastDiff, "6.1.0-13-amd64")), ""},
		"krbd 6.12":                     {same(KRBDFastDiff, "6.12.1"), ""},
		"fast-diff after a shrink":      {sized(RBDFastDiff, "19.2.0", 10*gib, 9*gib), "full shrunk, warn shrunk"},
		"fast-diff shrunk and regrown":  {Facts{Source: Source{RBDFastDiff, "19.2.0", true}, BaseSize: 10 * gib, TargetSize: 10 * gib, Smallest: 10 * gib, Largest: 11 * gib}, "full shrunk, warn shrunk"},
		"krbd after a shrink":           {sized(KRBDFastDiff, "6.12.1", 10*gib, 9*gib), "full shrunk, warn shrunk"},
		"Azure across 4 TiB":            {sized(AzurePageRanges, "1", 2*tib, 6*tib), "full resized across 4 TiB, warn grown"},
		"Azure back across 4 TiB":       {sized(AzurePageRanges, "1", 6*tib, 4*tib), "full resized across 4 TiB, warn shrunk"},
		"Azure above 4 TiB":             {sized(AzurePageRanges, "1", 5*tib, 6*tib), "warn grown"},
		"any tracked, grown":            {sized("x", "1", gib, 2*gib), "warn grown"},
		"any tracked, shrunk":           {sized("x", "1", 2*gib, gib), "warn shrunk"},
		"any tracked, no version":       {same("x", ""), "warn unknown version"},
		"compared, resized":             {Facts{Source: Source{Name: "x"}, BaseSize: 2 * gib, TargetSize: gib}, ""},
		"lists everything":              {Facts{Source: Source{Name: "x"}, BaseSize: gib, TargetSize: gib, Listed: gib - gib/21}, "warn lists everything"},
		"lists much":                    {Facts{Source: Source{Name: "x"}, BaseSize: gib, TargetSize: gib, Listed: gib - gib/19}, ""},
		"lists everything, grown":       {Facts{Source: Source{Name: "x"}, BaseSize: gib, TargetSize: 5 * gib, Listed: gib}, "warn lists everything"},
		"lists everything of a little":  {Facts{Source: Source{Name: "x"}, BaseSize: everythingFloor - 1, TargetSize: gib, Listed: everythingFloor - 1}, ""},
		"a first backup":                {sized("x", "", 0, gib), ""},
		"a first backup of fast-diff":   {sized(RBDFastDiff, "16.2.7", 0, gib), ""},
		"a first backup, ESXi 5, large": {sized(VMwareCBT, "5.1", 0, 600*gib), ""},
	} {
		var got []string
		for _, f := range Judge(c.facts) {
			got = append(got, f.Verdict.String()+" "+f.Name)
			if !strings.Contains(f.String(), f.Why) || !strings.Contains(f.String(), f.Reference) {
				t.Errorf("%s: %s", what, f)
			}
		}
		if got := strings.Join(got, ", "); got != c.want {
			t.Errorf("%s: %q, want %q", what, got, c.want)
		}
	}
}

// Every row of the table has all it needs for a report.
func TestQuirksComplete(t *testing.T) {
	for _, q := range Quirks {
		if q.Name == "" || q.Affects == nil || len(q.Why) < 20 || q.Reference == "" {
			t.Errorf("%+v", q)
		}
	}
}

func TestPattern(t *testing.T) {
	for _, size := range []int64{CanaryMin, CanaryMin + 4096, 10 << 20, 64 << 20, 1 << 30, 5<<30 + 8192, 300 << 30} {
		first, then, err := Pattern(size)
		if err != nil {
			t.Fatal(err)
		}
		end := int64(0)
		for _, w := range then {
			if w.Offset < end || w.Length <= 0 || w.Offset+w.Length > size || w.Offset%4096 != 0 || w.Length%4096 != 0 {
				t.Errorf("%d bytes: %+v after %d", size, w, end)
			}
			end = w.Offset + w.Length
		}
		if then[0].Offset != 0 || end != size {
			t.Errorf("%d bytes: neither the first nor the last block", size)
		}
		inside := func(where string, zero bool, in []Write) Write {
			i := slices.IndexFunc(in, func(w Write) bool { return w.Where == where })
			if i < 0 || in[i].Zero != zero {
				t.Fatalf("%d bytes: no %s in %+v", size, where, in)
			}
			return in[i]
		}
		hole, block := inside("a hole", true, first), inside("a block in the middle of a hole", false, then)
		if block.Offset <= hole.Offset || block.Offset+block.Length >= hole.Offset+hole.Length {
			t.Errorf("%d bytes: %+v is not in the middle of %+v", size, block, hole)
		}
		data, zeroed := inside("a stretch of data", false, first), inside("data that was zeroed", true, then)
		if data.Offset != zeroed.Offset || data.Length != zeroed.Length {
			t.Errorf("%d bytes: %+v is not %+v", size, data, zeroed)
		}
		for p := int64(64 << 10); p < size-8192; p *= 2 {
			if !slices.ContainsFunc(then, func(w Write) bool { return w.Offset < p && p < w.Offset+w.Length }) {
				t.Errorf("%d bytes: nothing across %d", size, p)
			}
		}
	}
	for _, size := range []int64{0, -1, CanaryMin - 4096, CanaryMin + 1} {
		if _, _, err := Pattern(size); fault.KindOf(err) != fault.Invalid {
			t.Errorf("%d bytes: %v", size, err)
		}
	}
}

func TestCompare(t *testing.T) {
	writes := []Write{{0, 4096, false, "first"}, {8192, 8192, true, "zeroed"}, {65536, 8192, false, "across"}}
	extent := func(off, length int64, zero bool) cbt.Extent {
		return cbt.Extent{Offset: off, Length: length, Zero: zero}
	}
	for what, c := range map[string]struct {
		extents []cbt.Extent
		missed  string
	}{
		"exact":             {[]cbt.Extent{extent(0, 4096, false), extent(8192, 8192, true), extent(65536, 8192, false)}, ""},
		"everything":        {[]cbt.Extent{extent(0, 1<<20, false)}, ""},
		"in pieces":         {[]cbt.Extent{extent(0, 2048, false), extent(2048, 2048, false), extent(4096, 40000, true), extent(65536, 4096, false), extent(69632, 4096, false)}, ""},
		"nothing":           {nil, "first zeroed across"},
		"one half":          {[]cbt.Extent{extent(0, 4096, false), extent(8192, 8192, false), extent(65536, 4096, false)}, "across"},
		"data as zero":      {[]cbt.Extent{extent(0, 4096, true), extent(8192, 8192, true), extent(65536, 8192, false)}, "first"},
		"shifted by 4 KiB":  {[]cbt.Extent{extent(4096, 4096, false), extent(12288, 8192, true), extent(69632, 8192, false)}, "first zeroed across"},
		"ends in the midst": {[]cbt.Extent{extent(0, 4096, false)}, "zeroed across"},
	} {
		got, err := Compare(writes, cbt.Of(c.extents...))
		if err != nil {
			t.Fatal(err)
		}
		var missed []string
		for _, w := range got.Missed {
			missed = append(missed, w.Where)
		}
		if strings.Join(missed, " ") != c.missed || got.Written != 20480 || got.Writes != 3 {
			t.Errorf("%s: %+v, want %q", what, got, c.missed)
		}
		if words := got.String(); strings.Contains(words, "are not among") != (c.missed != "") {
			t.Errorf("%s: %s", what, words)
		}
	}
	broken := func(yield func(cbt.Extent, error) bool) {
		yield(cbt.Extent{}, fault.Errorf(fault.Unavailable, "out of reach"))
	}
	if _, err := Compare(writes, broken); fault.KindOf(err) != fault.Unavailable {
		t.Errorf("%v", err)
	}
}
