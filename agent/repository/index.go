package repository

import (
	"bufio"
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strconv"

	"github.com/kopia/kopia/repo/content"

	"stillpoint.io/stillpoint/fault"
)

// SegmentSize is how much of an image one entry of the top level covers, in bytes. Kopia holds one such entry's data
// in memory when it reads an image.
const SegmentSize = 64 << 20

// entry is one line of an index: a chunk, or a segment.
type entry struct {
	start, length int64
	id            content.ID // of a chunk, or of a segment's index (which has a prefix)
}

const (
	indexPrefix = content.IDPrefix("x") // of kopia's indirect objects
	indexHead   = `{"stream":"kopia:indirect","entries":[`
	indexTail   = "]}\n"
	hashLength  = 32
)

// appendEntry appends the entry's JSON, byte for byte as kopia writes it. The first entry of an index starts at 0,
// and kopia leaves zeros out.
func appendEntry(b []byte, e entry) []byte {
	b = append(b, '{')
	if e.start > 0 {
		b = append(b, `"s":`...)
		b = strconv.AppendInt(b, e.start, 10)
		b = append(b, ',')
	}
	b = append(b, `"l":`...)
	b = strconv.AppendInt(b, e.length, 10)
	b = append(b, `,"o":"`...)
	if e.id.HasPrefix() {
		b = append(b, 'I')
	}
	b = e.id.Append(b)
	return append(b, `"}`...)
}

// appendIndex appends the index of consecutive chunks, the first of which starts at 0 of its segment.
func appendIndex(b []byte, chunks []Chunk, chunkSize, length int64) []byte {
	b = append(b, indexHead...)
	for i, c := range chunks {
		if i > 0 {
			b = append(b, ',')
		}
		start := int64(i) * chunkSize
		b = appendEntry(b, entry{start, min(chunkSize, length-start), c.id})
	}
	return append(b, indexTail...)
}

// scanner reads an index entry by entry, without allocating. It takes exactly what appendEntry writes: kopia never
// rewrites an object.
type scanner struct {
	in   *bufio.Reader
	next int64 // where the next entry must start
	done bool
}

func newScanner(in io.Reader) (*scanner, error) {
	s := &scanner{in: bufio.NewReaderSize(in, 64<<10)}
	head, err := s.in.Peek(len(indexHead))
	if err != nil {
		return nil, badIndex(err)
	}
	if string(head) != indexHead {
		return nil, badIndex(fmt.Errorf("it begins with %q", head))
	}
	_, err = s.in.Discard(len(indexHead))
	return s, err
}

// entry returns the next entry, io.EOF after the last.
func (s *scanner) entry() (entry, error) {
	if s.done {
		return entry{}, io.EOF
	}
	line, err := s.in.ReadSlice('}')
	if err != nil {
		return entry{}, badIndex(err)
	}
	e, ok := parseEntry(line)
	if !ok || e.start != s.next || e.length <= 0 {
		return entry{}, badIndex(fmt.Errorf("%q at offset %d", line, s.next))
	}
	s.next += e.length
	switch c, err := s.in.ReadByte(); {
	case err != nil:
		return entry{}, badIndex(err)
	case c == ',':
	case c == indexTail[0]:
		rest, err := io.ReadAll(s.in)
		if err != nil {
			return entry{}, badIndex(err)
		}
		if string(rest) != indexTail[1:] {
			return entry{}, badIndex(fmt.Errorf("it ends with %q", rest))
		}
		s.done = true
	default:
		return entry{}, badIndex(fmt.Errorf("%q after an entry", c))
	}
	return e, nil
}

func parseEntry(b []byte) (entry, bool) {
	var e entry
	var ok bool
	if b, ok = bytes.CutPrefix(b, []byte(`{`)); !ok {
		return entry{}, false
	}
	if rest, ok := bytes.CutPrefix(b, []byte(`"s":`)); ok {
		if e.start, b, ok = parseNumber(rest); !ok {
			return entry{}, false
		}
	}
	if b, ok = bytes.CutPrefix(b, []byte(`"l":`)); !ok {
		return entry{}, false
	}
	if e.length, b, ok = parseNumber(b); !ok {
		return entry{}, false
	}
	if b, ok = bytes.CutPrefix(b, []byte(`"o":"`)); !ok {
		return entry{}, false
	}
	prefix := content.IDPrefix("")
	if rest, ok := bytes.CutPrefix(b, []byte(`Ix`)); ok {
		b, prefix = rest, indexPrefix
	}
	if len(b) != 2*hashLength+2 || string(b[2*hashLength:]) != `"}` {
		return entry{}, false
	}
	var hash [hashLength]byte
	if _, err := hex.Decode(hash[:], b[:2*hashLength]); err != nil {
		return entry{}, false
	}
	id, err := content.IDFromHash(prefix, hash[:])
	e.id = id
	return e, err == nil
}

// parseNumber reads digits and the comma after them.
func parseNumber(b []byte) (int64, []byte, bool) {
	var n int64
	for i, c := range b {
		switch {
		case c == ',' && i > 0:
			return n, b[i+1:], true
		case c < '0' || c > '9' || n > 1<<58:
			return 0, nil, false
		}
		n = n*10 + int64(c-'0')
	}
	return 0, nil, false
}

func badIndex(err error) error {
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return fault.Errorf(fault.Corrupt, "an index in the repository is not one: %w", err)
}
