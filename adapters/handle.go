package adapters

import (
	"crypto/sha256"
	"encoding/base32"
	"regexp"
	"strings"
	"unicode/utf8"

	"stillpoint.io/stillpoint/fault"
)

// Handles. A volume is written <backend>:<id>, a snapshot <backend>:<id>@<name>; the CSI snapshot handle is that
// string. In an id, '%' and '@' are written %25 and %40, so the one '@' of a handle always separates the name, and a '~'
// at its start %7E. An id has one spelling, so handles can be compared as strings. Names
// in a backend are short (NameMax); a handle longer than HandleMax is written <backend>:~<hash> instead, where hash
// is ShortName of the full handle, and Resolve finds it again by listing.

const (
	// HandleMax is the most bytes that a CSI handle may have (CSI spec, "Size Limits").
	HandleMax = 128
	// NameMax is the most bytes of a snapshot's name inside a backend.
	NameMax = 26
)

var (
	plainName   = regexp.MustCompile(`^[a-z0-9-]{1,26}$`)
	backendName = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?$`)
	encoding    = base32.NewEncoding("abcdefghijklmnopqrstuvwxyz234567").WithPadding(base32.NoPadding)
	escape      = strings.NewReplacer("%", "%25", "@", "%40")
	unescape    = strings.NewReplacer("%25", "%", "%40", "@", "%7E", "~")
	misspelt    = regexp.MustCompile(`%($|[^247]|2($|[^5])|4($|[^0])|7($|[^E]))|.%7E`)
)

// VolumeID names a volume: the backend by its configured name, the volume by an id that its adapter understands. ID
// is unescaped. The zero VolumeID is no volume.
type VolumeID struct{ Backend, ID string }

// String returns the handle.
func (v VolumeID) String() string {
	id := escape.Replace(v.ID)
	if rest, ok := strings.CutPrefix(id, "~"); ok {
		id = "%7E" + rest
	}
	return v.Backend + ":" + id
}

// SnapshotID names a snapshot of a volume. Name is the one inside the backend, at most NameMax of [a-z0-9-].
type SnapshotID struct {
	Volume VolumeID
	Name   string
}

// Full returns <backend>:<id>@<name>, however long it is.
func (s SnapshotID) Full() string { return s.Volume.String() + "@" + s.Name }

// String returns the handle, at most HandleMax bytes.
func (s SnapshotID) String() string {
	h := s.Full()
	if len(h) > HandleMax {
		return s.Volume.Backend + ":~" + ShortName(h)
	}
	return h
}

// Name is a wanted name as a backend can keep it: itself if it is at most NameMax of [a-z0-9-], its ShortName if not.
func Name(wanted string) string {
	if plainName.MatchString(wanted) {
		return wanted
	}
	return ShortName(wanted)
}

// ShortName is the first 26 characters of the lower-case base32 of s's SHA-256: 130 bits, enough that two names never
// meet.
func ShortName(s string) string {
	h := sha256.Sum256([]byte(s))
	return encoding.EncodeToString(h[:])[:NameMax]
}

// Handle is a parsed handle: of a volume (Name and Short empty), of a snapshot (Name set), or in the short form of a
// snapshot (Short set, Volume.ID empty).
type Handle struct {
	Volume VolumeID
	Name   string
	Short  string
}

// IsSnapshot reports whether the handle names a snapshot in either form.
func (h Handle) IsSnapshot() bool { return h.Name != "" || h.Short != "" }

// ParseHandle reads a volume's or a snapshot's handle. Errors are Invalid.
func ParseHandle(s string) (Handle, error) {
	bad := func(why string) (Handle, error) {
		return Handle{}, fault.Errorf(fault.Invalid, "handle %q: %s; a volume is written BACKEND:ID (e.g. reflink:/pool/disk.img) and a snapshot BACKEND:ID@NAME", s, why)
	}
	backend, rest, ok := strings.Cut(s, ":")
	if !ok {
		return bad("no backend before a colon")
	}
	if !backendName.MatchString(backend) {
		return bad("the backend's name must be at most 32 of [a-z0-9-]")
	}
	if short, ok := strings.CutPrefix(rest, "~"); ok {
		if len(short) != NameMax || !plainName.MatchString(short) {
			return bad("a short handle has 26 characters after the tilde, and a tilde at the start of an id is written %7E")
		}
		return Handle{Volume: VolumeID{Backend: backend}, Short: short}, nil
	}
	id, name, isSnapshot := rest, "", false
	if i := strings.LastIndexByte(rest, '@'); i >= 0 {
		id, name, isSnapshot = rest[:i], rest[i+1:], true
	}
	switch {
	case id == "":
		return bad("the id is empty")
	case strings.ContainsRune(id, '@'):
		return bad("an @ inside an id is written %40")
	case isSnapshot && !plainName.MatchString(name):
		return bad("the snapshot's name must be at most 26 of [a-z0-9-] (an @ inside an id is written %40)")
	case misspelt.MatchString(id):
		return bad("a % inside an id is written %25, and only % and @, or ~ at the start, are written with a % (%25, %40, %7E)")
	case !utf8.ValidString(id):
		return bad("not UTF-8")
	case strings.ContainsFunc(id, func(r rune) bool { return r < ' ' || r == 0x7f }):
		return bad("control characters")
	}
	return Handle{Volume: VolumeID{Backend: backend, ID: unescape.Replace(id)}, Name: name}, nil
}
