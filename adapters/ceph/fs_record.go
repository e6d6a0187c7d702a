package ceph

import (
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"time"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

// fsTagKey is the key of the tag in a snapshot's metadata.
const fsTagKey = "stillpoint"

// fsTag is what a snapshot says of itself from its first moment on.
type fsTag struct {
	Version int    `json:"version"`
	Wanted  string `json:"wanted"`
}

func encodeTag(wanted string) string {
	b, err := json.Marshal(fsTag{recordVersion, wanted})
	if err != nil {
		panic(err) // a string and a number
	}
	return string(b)
}

func decodeTag(text string) (t fsTag, ok bool) {
	err := json.Unmarshal([]byte(text), &t)
	return t, err == nil && t.Version == recordVersion && t.Wanted != ""
}

// fsMark is what is kept of a published snapshot.
type fsMark struct {
	Version int            `json:"version"`
	Notes   adapters.Notes `json:"notes"`
}

func encodeMark(notes adapters.Notes) ([]byte, error) {
	b, err := json.Marshal(fsMark{recordVersion, notes})
	if err == nil && len(b) > recordMax {
		err = fault.Errorf(fault.Invalid, "its notes are too long: with them its record has %d bytes, and at most %d are kept", len(b), recordMax)
	}
	return b, err
}

func decodeMark(b []byte) (m fsMark, ok bool) {
	err := json.Unmarshal(b, &m)
	return m, err == nil && m.Version == recordVersion
}

// The keys: of a snapshot, and of its mark. They sort in this order, one after the other.

func (n treeName) key(name string) string { return n.String() + "@" + name }

func (n treeName) markKey(name string, number snapshotNumber) string {
	return fmt.Sprintf("%s#%016x", n.key(name), uint64(number))
}

// parseKey reads a key of either kind; ok is false for what is none of ours.
func parseKey(key string) (n treeName, name string, ok bool) {
	i := strings.LastIndexByte(key, '@') // neither character is in a snapshot's name
	if i < 0 {
		return n, "", false
	}
	n, err := parseTreeName(key[:i], "")
	name, _, _ = strings.Cut(key[i+1:], "#")
	return n, name, err == nil && adapters.Name(name) == name && name != ""
}

// fsFound is a snapshot of a tree. mine is false for one without a tag of ours.
type fsFound struct {
	number    snapshotNumber
	name      string
	created   time.Time
	mine      bool
	wanted    string
	published bool
	notes     adapters.Notes
}

func (f fsFound) snapshot(volume adapters.VolumeID) adapters.Snapshot {
	s := adapters.Snapshot{
		ID: adapters.SnapshotID{Volume: volume, Name: f.name}, Wanted: f.wanted, Form: adapters.TreeForm,
		Created: f.created, State: adapters.Ready, Mark: adapters.Cutting,
	}
	if f.published {
		s.Mark, s.Notes = adapters.Verified, f.notes
	}
	return s
}

// parseCephTime reads a time as CephFS's attributes have it: SECONDS.NANOSECONDS, the latter with or without leading zeros cut
// off, "09" before nine digits in old releases (ceph.dir.rctime).
func parseCephTime(text string) (time.Time, error) {
	s, ns, ok := strings.Cut(text, ".")
	seconds, err := strconv.ParseInt(s, 10, 64)
	nanoseconds, e := strconv.ParseInt(ns, 10, 64)
	if err == nil {
		err = e
	}
	if !ok || err != nil || nanoseconds < 0 {
		return time.Time{}, fault.Errorf(fault.Corrupt, "%q is no time of CephFS", text)
	}
	return time.Unix(seconds, min(nanoseconds, 999_999_999)).UTC(), nil
}
