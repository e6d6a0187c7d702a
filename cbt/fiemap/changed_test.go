package fiemap

import "testing"

func TestJudge(t *testing.T) {
	here, there := piece{kind: data, shift: 10}, piece{kind: data, shift: 20}
	hole, inline, none := piece{kind: zero}, piece{kind: opaqueData}, piece{kind: absent}
	for _, c := range []struct {
		base, target piece
		want         verdict
	}{
		{here, here, equal}, {here, there, differs}, {hole, hole, equal},
		{hole, here, differs}, {here, hole, differs}, {inline, hole, differs}, {hole, inline, differs},
		{inline, inline, unproved}, {inline, here, differs}, {here, inline, differs},
		{none, hole, differs}, {none, here, differs}, {none, inline, differs},
	} {
		if got := judge(c.base, c.target); got != c.want {
			t.Errorf("judge(%+v, %+v) = %d, want %d", c.base, c.target, got, c.want)
		}
	}
}

// Two listings agree when they mean the same, however it is cut into records and whoever else shares it.
func TestAgree(t *testing.T) {
	rec := func(logical, length int64, physical uint64, flags Flags) Record {
		return Record{Logical: logical, Length: length, Physical: physical, Flags: flags}
	}
	whole := []Record{rec(0, 30, 100, 0), rec(50, 10, 500, 0)}
	for _, c := range []struct {
		name string
		b    []Record
		want bool
	}{
		{"the same", whole, true},
		{"cut elsewhere", []Record{rec(0, 10, 100, 0), rec(10, 20, 110, Shared), rec(50, 10, 500, Last)}, true},
		{"an unwritten extent is as good as a hole", []Record{rec(0, 30, 100, 0), rec(30, 20, 900, Unwritten), rec(50, 10, 500, 0)}, true},
		{"moved", []Record{rec(0, 30, 100, 0), rec(50, 10, 600, 0)}, false},
		{"moved in part", []Record{rec(0, 10, 100, 0), rec(10, 20, 700, 0), rec(50, 10, 500, 0)}, false},
		{"gone", []Record{rec(0, 30, 100, 0)}, false},
		{"grown", []Record{rec(0, 31, 100, 0), rec(50, 10, 500, 0)}, false},
		{"without an address", []Record{rec(0, 30, 100, Encoded), rec(50, 10, 500, 0)}, false},
		{"moved before the position", []Record{rec(0, 5, 700, 0), rec(5, 25, 105, 0), rec(50, 10, 500, 0)}, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := agree(window{records: whole, end: 60}, window{records: c.b, end: 60}, 5); got != c.want {
				t.Errorf("agree is %v", got)
			}
		})
	}
}

func TestPlainAndZeroFlags(t *testing.T) {
	for flags, want := range map[Flags][2]bool{ // plain, zero
		0: {true, false}, Last | Merged | Shared: {true, false},
		Unwritten: {false, true}, Unwritten | Shared | Last: {false, true},
		Unwritten | Unknown: {false, false}, Delalloc | Unknown: {false, false}, Encoded: {false, false}, Encrypted | Encoded: {false, false},
		Inline | NotAligned: {false, false}, Tail | NotAligned: {false, false},
	} {
		if got := [2]bool{flags.Plain(), flags.Zero()}; got != want {
			t.Errorf("%#x: plain, zero = %v, want %v", flags, got, want)
		}
	}
}
