package thin

import (
	"context"
	"encoding/base32"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
	"stillpoint.io/stillpoint/integration/lab"
)

// plain is what a cut needs of an adapter, by LVM's plain commands: to find out without the adapter what the kernel does,
// and to have a command stand still. Marks and notes are LVM's tags. A command that was begun is never killed: killed between suspend and resume it would leave the
// volume suspended. So a call ends with its command, whatever its context says.
type plain struct {
	freeze adapters.FreezeMode
	lvm    func(args ...string) *exec.Cmd // nil is exec.Command
}

const (
	backend   = "plain"
	tagOurs   = "stillpoint"
	tagMark   = "mark="
	tagWanted = "wanted="
	tagTime   = "time="
	tagNotes  = "notes="
)

// plainID is a thin volume's.
func plainID(v lab.ThinVolume) adapters.VolumeID {
	return adapters.VolumeID{Backend: backend, ID: string(v)}
}

// snapshotVolume is the thin volume that a snapshot is.
func snapshotVolume(id adapters.SnapshotID) lab.ThinVolume {
	return lab.ThinVolume(id.Volume.ID + "." + id.Name)
}

func (a plain) Capabilities() adapters.Capabilities { return adapters.Capabilities{NodeLocal: true} }
func (a plain) Close() error                        { return nil }

func (a plain) Volume(_ context.Context, id adapters.VolumeID) (adapters.Volume, error) {
	path := lab.ThinVolume(id.ID).Device()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return adapters.Volume{}, fault.Errorf(fault.NotFound, "%s: %w", id, err)
	}
	size, err := run(a.command("blockdev", "--getsize64", path))
	if err != nil {
		return adapters.Volume{}, err
	}
	n, err := strconv.ParseInt(strings.TrimSpace(size), 10, 64)
	return adapters.Volume{ID: id, Size: n, Freeze: a.freeze, Device: adapters.Device(st.Rdev), Path: path}, err
}

func (a plain) CreateSnapshot(ctx context.Context, id adapters.VolumeID, wanted string) (adapters.Snapshot, error) {
	s := adapters.SnapshotID{Volume: id, Name: adapters.Name(wanted)}
	_, name, _ := strings.Cut(string(snapshotVolume(s)), "/")
	_, err := run(a.command("lvcreate", "-q", "-s", "-n", name, "--addtag", tagOurs, "--addtag", tagMark+string(adapters.Cutting),
		"--addtag", tagWanted+encode(wanted), "--addtag", tagTime+strconv.FormatInt(time.Now().UnixNano(), 10), id.ID))
	if err != nil {
		if old, err := a.Snapshot(ctx, s); err == nil {
			return old, nil
		}
		return adapters.Snapshot{}, err
	}
	return a.Snapshot(ctx, s)
}

func (a plain) Publish(_ context.Context, id adapters.SnapshotID, notes adapters.Notes) error {
	b, err := json.Marshal(notes)
	if err != nil {
		return err
	}
	_, err = run(a.command("lvchange", "-q", "--deltag", tagMark+string(adapters.Cutting), "--addtag", tagMark+string(adapters.Verified),
		"--addtag", tagNotes+encode(string(b)), string(snapshotVolume(id))))
	return err
}

func (a plain) Snapshot(ctx context.Context, id adapters.SnapshotID) (adapters.Snapshot, error) {
	for s, err := range a.Snapshots(ctx, adapters.Filter{Volume: id.Volume, Cutting: true}) {
		if err != nil || s.ID == id {
			return s, err
		}
	}
	return adapters.Snapshot{}, fault.Errorf(fault.NotFound, "%s", id)
}

func (a plain) DeleteSnapshot(ctx context.Context, id adapters.SnapshotID) error {
	if _, err := a.Snapshot(ctx, id); errors.Is(err, fault.NotFound) {
		return nil
	}
	_, err := run(a.command("lvremove", "-qfy", string(snapshotVolume(id))))
	return err
}

func (a plain) Snapshots(_ context.Context, f adapters.Filter) iter.Seq2[adapters.Snapshot, error] {
	return func(yield func(adapters.Snapshot, error) bool) {
		out, err := run(a.command("lvs", "--noheadings", "--nosuffix", "--units", "b", "--separator", ";", "-o", "lv_full_name,lv_size,lv_tags", "@"+tagOurs))
		if err != nil {
			yield(adapters.Snapshot{}, err)
			return
		}
		for line := range strings.Lines(out) {
			s, err := snapshot(strings.TrimSpace(line))
			if err == nil && (f.Volume != (adapters.VolumeID{}) && s.ID.Volume != f.Volume || !f.Cutting && s.Mark != adapters.Verified) {
				continue
			}
			if !yield(s, err) {
				return
			}
		}
	}
}

// snapshot reads a line of lvs.
func snapshot(line string) (s adapters.Snapshot, err error) {
	fields := strings.Split(line, ";")
	if len(fields) != 3 {
		return s, fmt.Errorf("lvs: %q", line)
	}
	volume, name, _ := strings.Cut(fields[0], ".")
	s.ID = adapters.SnapshotID{Volume: adapters.VolumeID{Backend: backend, ID: volume}, Name: name}
	s.State = adapters.Ready
	s.Size, err = strconv.ParseInt(fields[1], 10, 64)
	for tag := range strings.SplitSeq(fields[2], ",") {
		var failed error
		if v, ok := strings.CutPrefix(tag, tagMark); ok {
			s.Mark = adapters.Mark(v)
		} else if v, ok := strings.CutPrefix(tag, tagWanted); ok {
			s.Wanted, failed = decode(v)
		} else if v, ok := strings.CutPrefix(tag, tagTime); ok {
			var n int64
			n, failed = strconv.ParseInt(v, 10, 64)
			s.Created = time.Unix(0, n)
		} else if v, ok := strings.CutPrefix(tag, tagNotes); ok {
			var b string
			if b, failed = decode(v); failed == nil {
				failed = json.Unmarshal([]byte(b), &s.Notes)
			}
		}
		err = errors.Join(err, failed)
	}
	return s, err
}

// encode puts any text into the letters of a tag.
func encode(s string) string {
	return base32.HexEncoding.WithPadding(base32.NoPadding).EncodeToString([]byte(s))
}

func decode(s string) (string, error) {
	b, err := base32.HexEncoding.WithPadding(base32.NoPadding).DecodeString(s)
	return string(b), err
}

func (a plain) command(args ...string) *exec.Cmd {
	if a.lvm != nil {
		return a.lvm(args...)
	}
	return exec.Command(args[0], args[1:]...)
}

// run runs a command to its end, and gives a busy device the kind that it has.
func run(cmd *exec.Cmd) (string, error) {
	var out, said strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &said
	if err := cmd.Run(); err != nil {
		kind := fault.Internal
		if strings.Contains(said.String(), unix.EBUSY.Error()) || strings.Contains(said.String(), "Device or resource busy") {
			kind = fault.Busy
		}
		return "", fault.Errorf(kind, "%s: %w: %s", strings.Join(slices.Clone(cmd.Args), " "), err, said.String())
	}
	return out.String(), nil
}
