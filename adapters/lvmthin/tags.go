package lvmthin

import (
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

// The tags of our logical volumes. LVM's tags are of A-Z a-z 0-9 _ + . - / = ! : & # and at most 1024 bytes (lvm(8),
// "TAGS" and --addtag in lvchange(8)). Values with other bytes are written with =XX for each of them, and long ones in
// parts with numbers: stillpoint.io/notes.0=…, stillpoint.io/notes.1=….
const (
	tagPrefix  = "stillpoint.io/"
	tagMark    = tagPrefix + "snapshot=" // cutting or verified: this is a snapshot of ours
	tagOf      = tagPrefix + "of="       // the volume's name
	tagCreated = tagPrefix + "created="  // RFC 3339 with nanoseconds, UTC, by this node's clock
	tagWanted  = tagPrefix + "wanted."
	tagNotes   = tagPrefix + "notes."
	tagRestore = tagPrefix + "restore." // the volume's name: this is a restore that is not finished
	tagSize    = tagPrefix + "size="    // bytes that the restore was begun with
	tagClone   = tagPrefix + "clone="   // the UUID of the logical volume that it is a clone of, until the restore is finished
	tagScratch = tagPrefix + "scratch=" // this boot's id: made to try something, and removed by whoever finds it

	tagMax     = 1024
	partMax    = 900      // bytes of a value in one tag
	wantedMax  = 1024     // bytes; the CSI's longest name has 128
	notesMax   = 32 << 10 // bytes of all notes tags of a snapshot: they are in the group's metadata, of usually 1 MiB in all
	createdFmt = time.RFC3339Nano
)

// record is what the tags of a snapshot tell.
type record struct {
	of      string
	wanted  string
	mark    adapters.Mark
	created time.Time
	notes   adapters.Notes
}

// created are the tags of a new snapshot.
func (r record) tags() []string {
	tags := []string{tagMark + string(r.mark), tagOf + r.of, tagCreated + r.created.UTC().Format(createdFmt)}
	return append(tags, split(tagWanted, r.wanted)...)
}

// readRecord reads the tags of a logical volume; false if it is no snapshot of ours.
func readRecord(tags []string) (record, bool) {
	var r record
	mark, ok := single(tags, tagMark)
	r.mark = adapters.Mark(mark)
	if !ok || r.mark != adapters.Cutting && r.mark != adapters.Verified {
		return record{}, false
	}
	if r.of, ok = single(tags, tagOf); !ok {
		return record{}, false
	}
	created, _ := single(tags, tagCreated)
	var err error
	if r.created, err = time.Parse(createdFmt, created); err != nil {
		return record{}, false
	}
	if r.wanted, ok = join(tags, tagWanted); !ok || r.wanted == "" {
		return record{}, false
	}
	if notes, ok := join(tags, tagNotes); ok {
		if json.Unmarshal([]byte(notes), &r.notes) != nil {
			return record{}, false
		}
	}
	return r, true
}

// notesTags are the tags that keep notes.
func notesTags(n adapters.Notes) ([]string, error) {
	b, err := json.Marshal(n)
	if err != nil {
		return nil, err
	}
	tags := split(tagNotes, string(b))
	size := 0
	for _, t := range tags {
		size += len(t)
	}
	if size > notesMax {
		return nil, fault.Errorf(fault.Invalid, "the notes take %d bytes as tags of LVM, of which a snapshot may have %d", size, notesMax)
	}
	return tags, nil
}

// published are the tags to take away and to give, to publish a snapshot that has these tags.
func published(have []string, n adapters.Notes) (remove, add []string, err error) {
	want, err := notesTags(n)
	if err != nil {
		return nil, nil, err
	}
	want = append(want, tagMark+string(adapters.Verified))
	for _, t := range have {
		if (strings.HasPrefix(t, tagNotes) || strings.HasPrefix(t, tagMark)) && !slices.Contains(want, t) {
			remove = append(remove, t)
		}
	}
	for _, t := range want {
		if !slices.Contains(have, t) {
			add = append(add, t)
		}
	}
	return remove, add, nil
}

// checkWanted refuses a name that cannot be kept.
func checkWanted(id adapters.VolumeID, wanted string) error {
	switch {
	case wanted == "":
		return fault.Errorf(fault.Invalid, "volume %s: a snapshot needs a name", id)
	case len(wanted) > wantedMax || !utf8.ValidString(wanted):
		return fault.Errorf(fault.Invalid, "volume %s: a snapshot's name is UTF-8 of at most %d bytes", id, wantedMax)
	}
	return nil
}

// split writes a value as tags key0=…, key1=… and so on.
func split(key, value string) []string {
	var tags []string
	var part strings.Builder
	flush := func() {
		tags = append(tags, fmt.Sprintf("%s%d=%s", key, len(tags), part.String()))
		part.Reset()
	}
	for i := range len(value) {
		if c := value[i]; plain(c) {
			part.WriteByte(c)
		} else {
			fmt.Fprintf(&part, "=%02X", c)
		}
		if part.Len() >= partMax {
			flush()
		}
	}
	if part.Len() > 0 || len(tags) == 0 {
		flush()
	}
	return tags
}

// plain bytes stand for themselves.
func plain(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.IndexByte("_+.-/!:&#", c) >= 0
}

// join reads what split wrote; false if the tags are not there, or not whole.
func join(tags []string, key string) (string, bool) {
	var value strings.Builder
	parts := 0
	for _, t := range tags {
		if strings.HasPrefix(t, key) {
			parts++
		}
	}
	for i := range parts {
		part, ok := single(tags, fmt.Sprintf("%s%d=", key, i))
		if !ok {
			return "", false
		}
		for len(part) > 0 {
			if part[0] != '=' {
				value.WriteByte(part[0])
				part = part[1:]
				continue
			}
			if len(part) < 3 {
				return "", false
			}
			c, err := strconv.ParseUint(part[1:3], 16, 8)
			if err != nil {
				return "", false
			}
			value.WriteByte(byte(c))
			part = part[3:]
		}
	}
	return value.String(), parts > 0
}

// single is the value of the one tag that begins so; false if there is none, or more than one.
func single(tags []string, prefix string) (value string, ok bool) {
	for _, t := range tags {
		if v, has := strings.CutPrefix(t, prefix); has {
			if ok {
				return "", false
			}
			value, ok = v, true
		}
	}
	return value, ok
}
