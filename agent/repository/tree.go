package repository

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/kopia/kopia/fs"
	"github.com/kopia/kopia/repo/object"
	"github.com/kopia/kopia/snapshot"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

// TreeEntry is a name in a directory of a backup of the form tree: what the entry was, and the object that holds its bytes
// or its directory.
type TreeEntry struct {
	adapters.Entry
	object  object.ID
	summary *fs.DirectorySummary // of a directory
	links   int64                // of a directory: names below it that have a Link
}

// Same reports whether two entries describe the same thing, apart from bytes and from what is below a directory. Size
// counts, as far as a file's does.
func (e TreeEntry) Same(o adapters.Entry) bool {
	a, b := e.Entry, o
	if a.Name != b.Name || a.Type != b.Type || a.Mode != b.Mode || a.UID != b.UID || a.GID != b.GID || a.Size != b.Size || !a.Modified.Equal(b.Modified) ||
		a.Target != b.Target || a.Device != b.Device || a.Link != b.Link || len(a.Attributes) != len(b.Attributes) {
		return false
	}
	for i := range a.Attributes {
		if a.Attributes[i].Name != b.Attributes[i].Name || string(a.Attributes[i].Value) != string(b.Attributes[i].Value) {
			return false
		}
	}
	return true
}

// Holds reports whether two entries hold the same object: the same bytes, or the same directory.
func (e TreeEntry) Holds(o TreeEntry) bool { return e.object == o.object }

// Content names what the entry holds: a digest of all of it, in kopia's words its object id. Of a directory it covers all
// below it.
func (e TreeEntry) Content() string { return e.object.String() }

// HasLinks reports whether there is a file of several names below a directory.
func (e TreeEntry) HasLinks() bool { return e.links > 0 }

// Count is what is in a directory and below it, as kopia counts: names of one file each, pipes and devices as files.
type Count struct{ Entries, Files, Bytes int64 }

// Count counts what is below the entry, itself included.
func (e TreeEntry) Count() Count {
	if s := e.summary; s != nil {
		return Count{s.TotalFileCount + s.TotalSymlinkCount + s.TotalDirCount, s.TotalFileCount, s.TotalFileSize}
	}
	if e.Type == adapters.Symlink {
		return Count{Entries: 1}
	}
	return Count{1, 1, e.Size}
}

// TreeID is kopia's id of a directory: a digest of all that is below it.
type TreeID struct{ id object.ID }

// String returns kopia's id of the object.
func (t TreeID) String() string { return t.id.String() }

func (t TreeID) MarshalText() ([]byte, error) { return []byte(t.id.String()), nil }

func (t *TreeID) UnmarshalText(b []byte) (err error) {
	t.id, err = object.ParseID(string(b))
	if err != nil {
		return fault.Errorf(fault.Corrupt, "%q is no tree: %w", b, err)
	}
	return nil
}

// The JSON of a directory. To kopia it is its own, with a field in some entries that it does not know and leaves alone.
const (
	directoryPrefix = "k"
	directoryHead   = `{"stream":"kopia:directory","entries":[`
)

// treeEntry is an entry in JSON.
type treeEntry struct {
	snapshot.DirEntry
	Extra *extra `json:"stillpoint,omitempty"`
}

// extra is what kopia's entry has no place for. Bytes that need not be text are base64.
type extra struct {
	Name       []byte      `json:"name,omitempty"`   // the real one, where kopia's is another
	Type       string      `json:"type,omitempty"`   // of what kopia does not know, which is an empty file to it
	Target     []byte      `json:"target,omitempty"` // of a symbolic link
	Device     uint64      `json:"device,omitempty"` // as st_rdev has it
	Link       uint64      `json:"link,omitempty"`
	Links      int64       `json:"links,omitempty"`   // of a directory: names below it that have a link
	Seconds    *int64      `json:"seconds,omitempty"` // of the time, where kopia's clock does not reach: before 1678, after 2262
	Attributes []attribute `json:"attributes,omitempty"`
}

type attribute struct {
	Name  []byte `json:"name"`
	Value []byte `json:"value"`
}

// specials are the types that kopia does not know, by the word.
var specials = map[string]adapters.FileType{
	adapters.Fifo.String(): adapters.Fifo, adapters.Socket.String(): adapters.Socket,
	adapters.CharDevice.String(): adapters.CharDevice, adapters.BlockDevice.String(): adapters.BlockDevice,
}

// kopiaTypes are the words for the types that kopia knows.
var kopiaTypes = map[adapters.FileType]snapshot.EntryType{
	adapters.RegularFile: snapshot.EntryTypeFile, adapters.Directory: snapshot.EntryTypeDirectory, adapters.Symlink: snapshot.EntryTypeSymlink,
}

// mangled are the names that stand for others.
var mangled = regexp.MustCompile(`~[0-9a-f]{16}$`)

// kopiaName is the name under which kopia knows an entry: the same, unless it is not UTF-8, which JSON cannot hold, or ends
// as the names of kopia's own placeholders do, which its restore removes. What looks like a name made here is made over
// too, so that two names never become one.
func kopiaName(name string) string {
	if utf8.ValidString(name) && !mangled.MatchString(name) && !strings.HasSuffix(name, ".kopia-entry") {
		return name
	}
	var b strings.Builder
	for _, r := range name {
		if r == utf8.RuneError {
			r = '?'
		}
		if b.Len()+utf8.RuneLen(r) > 255-17 { // the longest name that filesystems take
			break
		}
		b.WriteRune(r)
	}
	hash := sha256.Sum256([]byte(name))
	return b.String() + "~" + hex.EncodeToString(hash[:8])
}

// encode makes an entry's JSON.
func (e TreeEntry) encode() ([]byte, error) {
	j, err := e.json()
	if err != nil {
		return nil, err
	}
	return json.Marshal(j)
}

func (e *TreeEntry) json() (treeEntry, error) {
	if e == nil {
		return treeEntry{}, errors.New("a tree without its root")
	}
	j := treeEntry{DirEntry: snapshot.DirEntry{
		Name: kopiaName(e.Name), Type: kopiaTypes[e.Type], Permissions: kopiaMode(e.Mode), FileSize: e.Size,
		ModTime: fs.UTCTimestampFromTime(e.Modified), UserID: e.UID, GroupID: e.GID, ObjectID: e.object, DirSummary: e.summary,
	}}
	x := extra{Device: uint64(e.Device), Link: e.Link, Links: e.links}
	if j.Name != e.Name {
		x.Name = []byte(e.Name)
	}
	if j.Type == "" {
		j.Type, x.Type = snapshot.EntryTypeFile, e.Type.String()
	}
	if e.Type == adapters.Symlink {
		x.Target, j.FileSize = []byte(e.Target), int64(len(e.Target))
	}
	if !time.Unix(0, e.Modified.UnixNano()).Equal(e.Modified) {
		seconds := e.Modified.Unix()
		x.Seconds, j.ModTime = &seconds, fs.UTCTimestamp(e.Modified.Nanosecond())
	}
	for _, a := range e.Attributes {
		x.Attributes = append(x.Attributes, attribute{[]byte(a.Name), a.Value})
	}
	if x.Name != nil || x.Type != "" || x.Target != nil || x.Device != 0 || x.Link != 0 || x.Links != 0 || x.Seconds != nil || x.Attributes != nil {
		j.Extra = &x
	}
	return j, nil
}

// entry is encode backwards. A name that no filesystem has, or a type that nobody knows, is Corrupt.
func (j treeEntry) entry() (TreeEntry, error) {
	e := TreeEntry{object: j.ObjectID, summary: j.DirSummary, Entry: adapters.Entry{
		Name: j.Name, Mode: unixMode(j.Permissions), UID: j.UserID, GID: j.GroupID, Modified: j.ModTime.ToTime().UTC(),
	}}
	x := j.Extra
	if x == nil {
		x = &extra{}
	}
	if x.Name != nil {
		e.Name = string(x.Name)
	}
	var known bool
	switch {
	case x.Type != "":
		e.Type, known = specials[x.Type]
	default:
		for t, word := range kopiaTypes {
			if word == j.Type {
				e.Type, known = t, true
			}
		}
	}
	if e.Type == adapters.RegularFile {
		e.Size = j.FileSize
	}
	e.Device, e.Link, e.Target, e.links = adapters.Device(x.Device), x.Link, string(x.Target), x.Links
	if x.Seconds != nil {
		e.Modified = time.Unix(*x.Seconds, int64(j.ModTime)).UTC()
	}
	for _, a := range x.Attributes {
		e.Attributes = append(e.Attributes, adapters.Attribute{Name: string(a.Name), Value: a.Value})
	}
	switch {
	case !known:
		return e, fmt.Errorf("%q is a %q", e.Name, string(j.Type)+x.Type)
	case e.Name == "" || e.Name == "." || e.Name == ".." || strings.ContainsAny(e.Name, "/\x00"):
		return e, fmt.Errorf("%q is no name", e.Name)
	case e.Size < 0 || e.Type == adapters.Symlink && (e.Target == "" || strings.Contains(e.Target, "\x00")):
		return e, fmt.Errorf("%q has %d bytes and the target %q", e.Name, e.Size, e.Target)
	}
	return e, nil
}

// kopiaMode and unixMode translate permissions: kopia keeps them as Go has them.
func kopiaMode(mode uint32) snapshot.Permissions {
	m := os.FileMode(mode & 0o777)
	for unix, bit := range modeBits {
		if mode&unix != 0 {
			m |= bit
		}
	}
	return snapshot.Permissions(m)
}

func unixMode(p snapshot.Permissions) uint32 {
	mode := uint32(p) & 0o777
	for unix, bit := range modeBits {
		if os.FileMode(p)&bit != 0 {
			mode |= unix
		}
	}
	return mode
}

var modeBits = map[uint32]os.FileMode{0o4000: os.ModeSetuid, 0o2000: os.ModeSetgid, 0o1000: os.ModeSticky}

// Before is the order of entries in a directory: directories first, then everything else, each by name.
func (e TreeEntry) Before(o adapters.Entry) bool {
	if d, f := e.Type == adapters.Directory, o.Type == adapters.Directory; d != f {
		return d
	}
	return e.Name < o.Name
}
