package reflink

import (
	"encoding/json"
	"os"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

const (
	snapshotAttr  = "trusted.stillpoint.snapshot" // a record: this file is a snapshot of ours
	restoreAttr   = "trusted.stillpoint.restore"  // the volume's id: this file is a restore under way
	attrMax       = 64 << 10                      // the most that an extended attribute holds (XATTR_SIZE_MAX)
	recordVersion = 1
	wantedMax     = 1024 // bytes; the CSI's longest name has 128
)

// record is what the pool keeps on a snapshot. Volume is the canonical id without the backend's name, so that a backend
// can be renamed.
type record struct {
	Version int            `json:"version"`
	Volume  string         `json:"volume"`
	Wanted  string         `json:"wanted"`
	Mark    adapters.Mark  `json:"mark"`
	Created time.Time      `json:"created"`
	Size    int64          `json:"size"`
	Tree    bool           `json:"tree,omitempty"` // the snapshot is a subvolume, and beside this file: see treeName
	Notes   adapters.Notes `json:"notes,omitzero"`
}

// write stores the record on a file.
func (r record) write(f *os.File) error {
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	if len(b) > attrMax {
		return fault.Errorf(fault.Invalid, "the notes are larger than an extended attribute can be (%d bytes)", attrMax)
	}
	return unix.Fsetxattr(int(f.Fd()), snapshotAttr, b, 0)
}

// readRecord returns the record of a file, and whether it has one that this version understands.
func readRecord(f *os.File) (record, bool, error) {
	b := make([]byte, attrMax)
	n, err := unix.Fgetxattr(int(f.Fd()), snapshotAttr, b)
	switch err {
	case nil:
	case unix.ENODATA, unix.EOPNOTSUPP:
		return record{}, false, nil
	default:
		return record{}, false, err
	}
	var r record
	if json.Unmarshal(b[:n], &r) != nil || r.Version != recordVersion {
		return record{}, false, nil
	}
	return r, r.Mark == adapters.Cutting || r.Mark == adapters.Verified, nil
}

// snapshot is the record as callers see it.
func (r record) snapshot(backend string) adapters.Snapshot {
	s := adapters.Snapshot{
		ID:      adapters.SnapshotID{Volume: adapters.VolumeID{Backend: backend, ID: r.Volume}, Name: adapters.Name(r.Wanted)},
		Wanted:  r.Wanted,
		Size:    r.Size,
		Created: r.Created,
		State:   adapters.Ready,
		Mark:    r.Mark,
		Notes:   r.Notes,
	}
	if r.Tree {
		s.Form = adapters.TreeForm
	}
	return s
}

// checkWanted refuses a name that cannot be kept as a tag.
func checkWanted(id adapters.VolumeID, wanted string) error {
	switch {
	case wanted == "":
		return fault.Errorf(fault.Invalid, "volume %s: a snapshot needs a name", id)
	case len(wanted) > wantedMax || !utf8.ValidString(wanted):
		return fault.Errorf(fault.Invalid, "volume %s: a snapshot's name is UTF-8 of at most %d bytes", id, wantedMax)
	}
	return nil
}

// fileName is the name of a snapshot's file in the folder.
func fileName(volume, name string) string { return adapters.ShortName(volume) + "." + name }
