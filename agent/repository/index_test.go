package repository

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kopia/kopia/repo/content"
	"github.com/kopia/kopia/repo/object"

	"stillpoint.io/stillpoint/fault"
)

var update = flag.Bool("update", false, "write the golden files anew")

func chunkNumber(t testing.TB, prefix content.IDPrefix, n byte) content.ID {
	id, err := content.IDFromHash(prefix, bytes.Repeat([]byte{n}, hashLength))
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// An index has the bytes that kopia itself would write, and that the golden file holds for ever.
func TestIndexBytes(t *testing.T) {
	const chunk = 1 << 20
	chunks := []Chunk{{chunkNumber(t, "", 1)}, {chunkNumber(t, "", 2)}, {chunkNumber(t, "", 1)}}
	got := appendIndex(nil, chunks, chunk, 2*chunk+4097)
	top := append(appendEntry(append(appendEntry([]byte(indexHead), entry{0, SegmentSize, chunkNumber(t, "x", 3)}), ','), entry{SegmentSize, 5, chunkNumber(t, "x", 0xAB)}), indexTail...)

	golden := filepath.Join("testdata", "index.golden")
	all := append(got, top...)
	if *update {
		if err := os.WriteFile(golden, all, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(all, want) {
		t.Errorf("got\n%s\nwant\n%s", all, want)
	}

	for _, index := range [][]byte{got[:len(got):len(got)], top} {
		var kopias struct {
			Stream  string                       `json:"stream"`
			Entries []object.IndirectObjectEntry `json:"entries"`
		}
		if err := json.Unmarshal(index, &kopias); err != nil {
			t.Fatal(err)
		}
		var again bytes.Buffer
		if err := json.NewEncoder(&again).Encode(kopias); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(index, again.Bytes()) {
			t.Errorf("kopia writes\n%s\nand not\n%s", again.Bytes(), index)
		}
	}
}

func scanAll(p []byte) ([]entry, error) {
	s, err := newScanner(bytes.NewReader(p))
	if err != nil {
		return nil, err
	}
	var all []entry
	for {
		e, err := s.entry()
		if errors.Is(err, io.EOF) {
			return all, nil
		} else if err != nil {
			return all, err
		}
		all = append(all, e)
	}
}

func TestScannerReadsWhatIsWritten(t *testing.T) {
	chunks := make([]Chunk, 1024)
	for i := range chunks {
		chunks[i] = Chunk{chunkNumber(t, "", byte(i))}
	}
	got, err := scanAll(appendIndex(nil, chunks, MinChunkSize, SegmentSize))
	if err != nil || len(got) != len(chunks) {
		t.Fatalf("%d entries: %v", len(got), err)
	}
	for i, e := range got {
		if want := (entry{int64(i) * MinChunkSize, MinChunkSize, chunks[i].id}); e != want {
			t.Fatalf("entry %d: %+v, want %+v", i, e, want)
		}
	}
}

// Whatever is cut off or changed in an index is found, or changes only an id.
func TestScannerRefusesDamage(t *testing.T) {
	good := appendIndex(nil, []Chunk{{chunkNumber(t, "", 1)}, {chunkNumber(t, "", 2)}}, MinChunkSize, MinChunkSize+1)
	for i := range good {
		if _, err := scanAll(good[:i]); fault.KindOf(err) != fault.Corrupt {
			t.Fatalf("cut at %d: %v", i, err)
		}
		for bit := range 8 {
			bad := bytes.Clone(good)
			bad[i] ^= 1 << bit
			got, err := scanAll(bad)
			if err != nil && fault.KindOf(err) != fault.Corrupt {
				t.Fatalf("byte %d: %v", i, err)
			}
			// An undamaged list has the two ids at these places; anything else must have been refused, but for the last
			// length, which nothing after it contradicts.
			if err == nil && (len(got) != 2 || got[1].start != MinChunkSize) {
				t.Fatalf("byte %d: taken as %+v", i, got)
			}
		}
	}
	for _, bad := range []string{"", "{}", indexHead + "]}\n", indexHead + `{"l":1,"o":"` + strings.Repeat("0", 64) + `"}]}` + "\nx"} {
		if _, err := scanAll([]byte(bad)); fault.KindOf(err) != fault.Corrupt {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func FuzzScanner(f *testing.F) {
	f.Add(appendIndex(nil, []Chunk{{chunkNumber(f, "", 1)}, {chunkNumber(f, "", 2)}}, MinChunkSize, 2*MinChunkSize))
	f.Fuzz(func(t *testing.T, p []byte) {
		all, err := scanAll(p)
		if err != nil {
			return
		}
		again := []byte(indexHead)
		for i, e := range all {
			if i > 0 {
				again = append(again, ',')
			}
			again = appendEntry(again, e)
		}
		if again = append(again, indexTail...); !bytes.EqualFold(again, p) && !bytes.Contains(p, []byte(`:0`)) {
			t.Errorf("taken: %q, written: %q", p, again)
		}
	})
}

func TestScannerAllocatesNothing(t *testing.T) {
	chunks := make([]Chunk, 1024)
	for i := range chunks {
		chunks[i] = Chunk{chunkNumber(t, "", byte(i))}
	}
	p := appendIndex(nil, chunks, MinChunkSize, SegmentSize)
	s, err := newScanner(bytes.NewReader(p))
	if err != nil {
		t.Fatal(err)
	}
	if n := testing.AllocsPerRun(1000, func() {
		if _, err := s.entry(); err != nil {
			t.Fatal(err)
		}
	}); n > 0 {
		t.Errorf("%v allocations an entry", n)
	}
	buf := make([]byte, 0, len(p))
	if n := testing.AllocsPerRun(10, func() { buf = appendIndex(buf[:0], chunks, MinChunkSize, SegmentSize) }); n > 0 {
		t.Errorf("%v allocations an index", n)
	}
}
