package backup

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/cbt"
	"stillpoint.io/stillpoint/cbt/audit"
	"stillpoint.io/stillpoint/fault"
)

// CanaryRequest asks a backend about writes of which we know all.
type CanaryRequest struct {
	Adapter adapters.Adapter  // must be a Differ, an Opener and a Restorer
	Volume  adapters.VolumeID // the canary's own; made if it is not there
	Size    int64             // bytes, of a new one; CanarySize if 0
}

// CanarySize is how large a canary's volume is made by default, in bytes. It is all but empty.
const CanarySize = 1 << 30

// CanaryReport is what the backend answered. Counts are bytes.
type CanaryReport struct {
	Volume       string   `json:"volume"`
	Size         int64    `json:"size"`
	Verdict      string   `json:"verdict"`
	Missed       []string `json:"missed,omitempty"` // known writes that the backend does not list, in words
	BytesWritten int64    `json:"bytes_written"`    // between the two snapshots
	BytesListed  int64    `json:"bytes_listed"`
	Made         bool     `json:"made,omitempty"` // the volume was not there before
	Seconds      float64  `json:"seconds"`
}

// canaryHeader begins the first block of a canary's volume. Nothing without it is ever written to.
const canaryHeader = "stillpoint canary volume, version 1\nThis volume belongs to Stillpoint, which writes over it.\n"

// The canary's snapshots have names that nobody else would choose: a backend keeps a hash of them.
const (
	canaryLook   = "stillpoint canary: what is on the volume"
	canaryBefore = "stillpoint canary: before the known writes"
	canaryAfter  = "stillpoint canary: after the known writes"
)

// Canary writes a known pattern to a small volume of its own, between two snapshots, and asks the backend what changed.
// Every known write must be in the answer, and what was written must be read from the second snapshot. If not, that is a
// report together with an error of kind Corrupt: nothing that this backend says of changed blocks is to be believed.
//
// The volume is made if it is not there, and stays for the next time; its snapshots are deleted, also after a failure or
// a cancel, and those of a run that was killed by the next. Invalid: the volume is there and not a canary's. Busy: it is
// in use. Unsupported: the backend cannot make volumes, compare snapshots or read them.
func Canary(ctx context.Context, q CanaryRequest) (report CanaryReport, err error) {
	started := time.Now()
	c := canary{q: q, run: started.UnixNano()}
	var can [3]bool
	c.restorer, can[0] = adapters.As[adapters.Restorer](q.Adapter)
	c.differ, can[1] = adapters.As[adapters.Differ](q.Adapter)
	c.opener, can[2] = adapters.As[adapters.Opener](q.Adapter)
	if can != [3]bool{true, true, true} {
		return report, fault.Errorf(fault.Unsupported, "backend %s cannot make volumes, compare snapshots and read them; a canary needs all three", q.Volume.Backend)
	}
	defer func() {
		err = errors.Join(err, c.clean(context.WithoutCancel(ctx)))
		if err != nil && fault.KindOf(err) != fault.Corrupt {
			report, err = CanaryReport{}, fmt.Errorf("canary %s: %w", q.Volume, err)
		}
		report.Seconds = time.Since(started).Seconds()
	}()
	if err := c.find(ctx); err != nil {
		return report, err
	}
	compared, err := c.sing(ctx)
	if fault.KindOf(err) == fault.NotFound { // only another canary deletes these snapshots
		err = fault.Errorf(fault.Busy, "another canary runs on the volume at the same time, try again: %w", err)
	}
	report = CanaryReport{
		Volume: c.volume.ID.String(), Size: c.volume.Size, Made: c.made, Verdict: compared.String(),
		BytesWritten: compared.Written, BytesListed: compared.Listed,
	}
	if err != nil {
		report.Verdict = err.Error()
		return report, err
	}
	for _, w := range compared.Missed {
		report.Missed = append(report.Missed, fmt.Sprintf("%d bytes at %d: %s", w.Length, w.Offset, w.Where))
	}
	if len(report.Missed) > 0 {
		slog.ErrorContext(ctx, "a backend misses changed blocks", "backend", q.Volume.Backend, "canary", report.Volume, "verdict", report.Verdict)
		return report, fault.Errorf(fault.Corrupt, "backend %s: %s; its changed blocks are not to be trusted", q.Volume.Backend, report.Verdict)
	}
	return report, nil
}

// canary is one run.
type canary struct {
	q        CanaryRequest
	restorer adapters.Restorer
	differ   adapters.Differ
	opener   adapters.Opener
	run      int64 // a number that makes this run's bytes its own

	volume adapters.Volume
	made   bool
}

// find finds the volume, or makes it.
func (c *canary) find(ctx context.Context) error {
	v, err := c.q.Adapter.Volume(ctx, c.q.Volume)
	if fault.KindOf(err) == fault.NotFound {
		return c.create(ctx)
	} else if err != nil {
		return err
	}
	c.volume = v
	if err := c.clean(ctx); err != nil { // what a run left that was killed
		return err
	}
	s, err := c.snapshot(ctx, canaryLook)
	if err != nil {
		return err
	}
	head := make([]byte, len(canaryHeader))
	if err := c.read(ctx, s, head, 0); err != nil {
		return err
	}
	if string(head) != canaryHeader {
		return fault.Errorf(fault.Invalid, "the volume is there and does not begin as a canary's does: it is left alone; name one that does not exist")
	}
	return nil
}

// create makes a volume with nothing on it but the header.
func (c *canary) create(ctx context.Context) error {
	size := cmp.Or(c.q.Size, CanarySize)
	if _, _, err := audit.Pattern(size); err != nil {
		return err
	}
	target, err := c.restorer.Begin(ctx, adapters.VolumeSpec{ID: c.q.Volume, Size: size, Token: adapters.ShortName(fmt.Sprint("canary ", size))})
	if err != nil {
		return err
	}
	if !target.ReadsZero() {
		err = target.Zero(ctx, 0, size)
	}
	if err == nil {
		err = target.WriteAt(ctx, c.bytes(audit.Write{Length: adapters.ImageAlign}), 0)
	}
	if err != nil {
		return errors.Join(err, target.Abort(context.WithoutCancel(ctx)))
	}
	c.volume, err = target.Commit(ctx)
	c.made = err == nil
	return err
}

// sing makes the known writes and asks about them.
func (c *canary) sing(ctx context.Context) (audit.Comparison, error) {
	first, then, err := audit.Pattern(c.volume.Size)
	if err != nil {
		return audit.Comparison{}, err
	}
	if err := c.write(ctx, "before", first); err != nil {
		return audit.Comparison{}, err
	}
	before, err := c.snapshot(ctx, canaryBefore)
	if err != nil {
		return audit.Comparison{}, err
	}
	c.run++
	if err := c.write(ctx, "after", then); err != nil {
		return audit.Comparison{}, err
	}
	after, err := c.snapshot(ctx, canaryAfter)
	if err != nil {
		return audit.Comparison{}, err
	}
	for _, w := range then {
		want, got := c.bytes(w), make([]byte, w.Length)
		if err := c.read(ctx, after, got, w.Offset); err != nil {
			return audit.Comparison{}, err
		}
		if w.Offset == 0 && !bytes.Equal(got, want) && bytes.HasPrefix(got, []byte(canaryHeader)) && !bytes.Equal(got, c.bytesOf(c.run-1, w)) {
			return audit.Comparison{}, fault.Errorf(fault.Busy, "another canary wrote to the volume at the same time; try again")
		}
		if !bytes.Equal(got, want) {
			return audit.Comparison{}, fault.Errorf(fault.Corrupt, "backend %s: the %d bytes written at %d (%s) are not in the snapshot that was taken after", c.q.Volume.Backend, w.Length, w.Offset, w.Where)
		}
	}
	delta, err := c.differ.Changed(ctx, before, after, 0)
	if err != nil {
		return audit.Comparison{}, err
	}
	return audit.Compare(then, cbt.Check(delta.Extents, 0, c.volume.Size))
}

// write makes known writes, as a restore over the volume would.
func (c *canary) write(ctx context.Context, what string, writes []audit.Write) error {
	target, err := c.restorer.Begin(ctx, adapters.VolumeSpec{
		ID: c.volume.ID, Size: c.volume.Size, Overwrite: true, Token: adapters.ShortName(fmt.Sprint("canary ", what, c.run)),
	})
	if err != nil {
		return err
	}
	for _, w := range writes {
		if w.Zero {
			err = target.Zero(ctx, w.Offset, w.Length)
		} else {
			err = target.WriteAt(ctx, c.bytes(w), w.Offset)
		}
		if err != nil {
			return errors.Join(err, target.Abort(context.WithoutCancel(ctx)))
		}
	}
	_, err = target.Commit(ctx)
	return err
}

// bytes is what a write of this run leaves: what no other run and no other place has, behind the header in the first
// block.
func (c *canary) bytes(w audit.Write) []byte { return c.bytesOf(c.run, w) }

func (c *canary) bytesOf(run int64, w audit.Write) []byte {
	p := make([]byte, 0, w.Length+sha256.Size)
	if w.Zero {
		return p[:w.Length]
	}
	if w.Offset == 0 {
		p = append(p, canaryHeader...)
	}
	for i := uint64(0); int64(len(p)) < w.Length; i++ {
		var seed [24]byte
		binary.LittleEndian.PutUint64(seed[:], uint64(run))
		binary.LittleEndian.PutUint64(seed[8:], uint64(w.Offset))
		binary.LittleEndian.PutUint64(seed[16:], i)
		sum := sha256.Sum256(seed[:])
		p = append(p, sum[:]...)
	}
	return p[:w.Length]
}

// snapshot makes a snapshot of the volume and waits until it can be read.
func (c *canary) snapshot(ctx context.Context, wanted string) (adapters.SnapshotID, error) {
	s, err := c.q.Adapter.CreateSnapshot(ctx, c.volume.ID, wanted)
	if err != nil {
		return adapters.SnapshotID{}, err
	}
	notes := adapters.Notes{Cut: "canary", Instant: fmt.Sprint(c.run), Consistency: adapters.CrashConsistent}
	if err := c.q.Adapter.Publish(ctx, s.ID, notes); err != nil {
		return adapters.SnapshotID{}, err
	}
	for wait := 20 * time.Millisecond; ; wait = min(2*wait, 5*time.Second) {
		if s, err = c.q.Adapter.Snapshot(ctx, s.ID); err != nil {
			return adapters.SnapshotID{}, err
		}
		switch s.State {
		case adapters.Ready:
			return s.ID, nil
		case adapters.Failed:
			return adapters.SnapshotID{}, fault.Errorf(fault.Unavailable, "snapshot %s: the backend could not make it", s.ID)
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return adapters.SnapshotID{}, ctx.Err()
		}
	}
}

func (c *canary) read(ctx context.Context, id adapters.SnapshotID, p []byte, off int64) error {
	image, err := c.opener.Open(ctx, id)
	if err != nil {
		return err
	}
	b, err := newBuffer((int64(len(p)) + adapters.ImageAlign - 1) / adapters.ImageAlign * adapters.ImageAlign)
	if err != nil {
		return errors.Join(err, image.Close())
	}
	defer b.free()
	err = readFull(ctx, image, b.p, off, int64(len(p)))
	copy(p, b.p)
	return errors.Join(err, image.Close())
}

// clean deletes the canary's snapshots, if there are any.
func (c *canary) clean(ctx context.Context) error {
	if c.volume.ID == (adapters.VolumeID{}) {
		return nil
	}
	var errs []error
	for _, wanted := range []string{canaryLook, canaryBefore, canaryAfter} {
		errs = append(errs, c.q.Adapter.DeleteSnapshot(ctx, adapters.SnapshotID{Volume: c.volume.ID, Name: adapters.Name(wanted)}))
	}
	return errors.Join(errs...)
}
