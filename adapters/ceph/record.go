package ceph

import (
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

// recordVersion is that of the record's form. A record of another version is not ours to touch.
const recordVersion = 1

// recordPrefix starts the keys of records in an image's metadata; the snapshot's number follows.
const recordPrefix = ".stillpoint.snapshot."

// recordMax is the most bytes of a record. Ceph itself keeps larger values, but its clients read metadata into buffers.
const recordMax = 32 << 10

// record is what the metadata of an image say about a snapshot of ours.
type record struct {
	Version int            `json:"version"`
	Image   string         `json:"image"` // the internal id of the image that it was written for
	Wanted  string         `json:"wanted"`
	Mark    adapters.Mark  `json:"mark"`
	Notes   adapters.Notes `json:"notes"`
}

// snapshotNumber is Ceph's number of a snapshot, which no other snapshot of the pool ever has.
type snapshotNumber uint64

func recordKey(n snapshotNumber) string { return fmt.Sprintf("%s%016x", recordPrefix, uint64(n)) }

// encode gives the record's text. Notes too long to be kept are Invalid.
func (r record) encode() (string, error) {
	r.Version = recordVersion
	b, err := json.Marshal(r)
	if err != nil {
		return "", err
	}
	if len(b) > recordMax {
		return "", fault.Errorf(fault.Invalid, "its notes are too long: with them its record has %d bytes, and at most %d are kept in an image's metadata", len(b), recordMax)
	}
	return string(b), nil
}

// decodeRecord reads a record that was written for an image; ok is false for everything else.
func decodeRecord(text, image string) (r record, ok bool) {
	err := json.Unmarshal([]byte(text), &r)
	return r, err == nil && r.Version == recordVersion && r.Image == image && r.Wanted != "" && (r.Mark == adapters.Cutting || r.Mark == adapters.Verified)
}

// parseRecordKey is recordKey's inverse; ok is false for other keys.
func parseRecordKey(key string) (n snapshotNumber, ok bool) {
	digits, ok := strings.CutPrefix(key, recordPrefix)
	v, err := strconv.ParseUint(digits, 16, 64)
	return snapshotNumber(v), ok && err == nil && recordKey(snapshotNumber(v)) == key
}

// orphans lists the keys of records, by key, that no snapshot of the image belongs to. numbers are those of its snapshots,
// ascending. A record with a number above the highest of them may be of a snapshot that was made after they were
// listed, and is none; below that no snapshot is made any more. Records that a clone has from its parent are orphans.
func orphans(records map[string]string, image string, numbers []snapshotNumber) (keys []string) {
	for key, text := range records {
		n, ok := parseRecordKey(key)
		var r record
		if !ok || json.Unmarshal([]byte(text), &r) != nil || r.Version != recordVersion {
			continue // not ours to touch
		}
		at, there := slices.BinarySearch(numbers, n)
		if r.Image != image || !there && at < len(numbers) {
			keys = append(keys, key)
		}
	}
	slices.Sort(keys)
	return keys
}

// found is a snapshot of an image. mine is false for one without a record of ours.
type found struct {
	number  snapshotNumber
	name    string
	size    int64
	created time.Time
	mine    bool
	record  record
}

func (f found) snapshot(volume adapters.VolumeID) adapters.Snapshot {
	return adapters.Snapshot{
		ID:      adapters.SnapshotID{Volume: volume, Name: f.name},
		Wanted:  f.record.Wanted,
		Form:    adapters.BlockForm,
		Size:    f.size,
		Created: f.created,
		State:   adapters.Ready,
		Mark:    f.record.Mark,
		Notes:   f.record.Notes,
	}
}

// passes reports whether a listing shows the snapshot.
func (f found) passes(filter adapters.Filter) bool {
	return f.mine && !isDraft(f.name) && (filter.Cutting || f.record.Mark == adapters.Verified)
}

// restoring is what an image that is being restored says about itself.
type restoring struct {
	Version int    `json:"version"`
	Image   string `json:"image"`  // the internal id of the image that it was written for
	Volume  string `json:"volume"` // the id of the volume that it will be
	Size    int64  `json:"size"`
	Origin  string `json:"origin,omitempty"` // the snapshot that it is a clone of
}

func (r restoring) encode() string {
	r.Version = recordVersion
	b, err := json.Marshal(r)
	if err != nil {
		panic(err) // strings and numbers only
	}
	return string(b)
}

func decodeRestoring(text string) (r restoring, ok bool) {
	err := json.Unmarshal([]byte(text), &r)
	return r, err == nil && r.Version == recordVersion
}
