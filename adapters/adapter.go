// Package adapters is the one snapshot interface over many storage systems: what an adapter owes its callers, how
// volumes and snapshots are named, and the table of the adapters there are.
//
// # Glossary
//
// A backend is a configured storage system: an adapter plus its settings and secrets, with a name. An adapter is the
// code that speaks to one kind of backend. A volume holds live data; a snapshot is a read-only point in time of a
// volume inside its backend; a mark is what the backend keeps on a snapshot of ours. A node-local volume's id contains
// a locality (a filesystem's or volume group's UUID), so that the same name on two nodes is two volumes.
//
// # The life of a snapshot
//
//	             CreateSnapshot                    Publish
//	(nothing) ───────────────────▶  cutting  ───────────────────▶  verified
//	                                   │                               │
//	                                   └───────── DeleteSnapshot ──────┴──▶ (nothing)
//
// CreateSnapshot returns as soon as the point in time is FIXED: whatever is written to the volume afterwards is not in
// the snapshot. The snapshot may still be Pending then (a cloud copies in the background); Snapshot tells when it is
// Ready. It bears the mark cutting: the cut that asked for it is not verified yet, the filesystem may have been
// thawed by a stranger a moment too early, and nobody may be handed the snapshot. Publish turns the mark to verified
// once the cut is proved. A snapshot that is still cutting after its cut died is rubbish: the next cut of that name
// deletes it and takes its own.
//
// # Obligations and freedoms
//
// Every method may be called at any time from any goroutine, twice, in parallel with itself, and again after a call
// that was cancelled or that timed out half-way: every change is idempotent by the name it is given. A method returns
// by its context's deadline, except where it says otherwise. An adapter neither retries nor logs nor counts: those
// are decorators over the same interface (Retry, Metrics, Faults). An adapter touches only snapshots that bear a mark
// of ours; others are invisible to it, even under a name that we would have chosen. Errors are of package fault's
// kinds and name the volume or snapshot, never a secret.
//
// Adapters are free to be slow in Volume, Snapshot and Snapshots, and to refuse volumes (Invalid for a name that can
// not be one, NotFound for one that is not there, Unsupported for one that exists but cannot be snapshotted).
//
// CreateSnapshot may run while the volume's filesystem is frozen. It must then not write to any filesystem other
// than those that Volume.WritesTo admits, must not start programs that might, and should take milliseconds. What can
// be done earlier belongs into Stager.Stage, what can be done later into Publish.
//
// # What is not checked
//
// An adapter does not know whether a filesystem is frozen and does not care; consistency is the cut's business. It
// does not protect a caller from reading a snapshot while somebody deletes it: a read then fails with NotFound or
// Unavailable.
package adapters

import (
	"context"
	"iter"
	"time"

	"stillpoint.io/stillpoint/cbt"
	"stillpoint.io/stillpoint/cbt/audit"
)

// Adapter is what every backend can do. Abilities that only some have are the small interfaces below; As finds
// them, and CapabilitiesOf lists them.
type Adapter interface {
	// Capabilities describes the code, not a volume: which abilities there are and how it quiesces. It does no I/O.
	Capabilities() Capabilities

	// Volume looks a volume up. The id may be one that a person typed; the answer's is canonical, and only canonical
	// ids appear in handles. NotFound, Invalid, Unsupported as above.
	Volume(ctx context.Context, id VolumeID) (Volume, error)

	// CreateSnapshot fixes a point in time of the volume (see the life of a snapshot) and returns it marked cutting.
	// wanted is any non-empty name; Name(wanted) is the snapshot's, and wanted is kept as a tag. If a snapshot of that
	// name and wanted name exists, it is returned as it is, with its own mark, age and size: the caller decides what an
	// old cutting one is worth. If the name is taken by something that is not ours, or by another wanted name: Busy.
	CreateSnapshot(ctx context.Context, id VolumeID, wanted string) (Snapshot, error)

	// Publish turns the mark to verified and stores what the cut knows about the snapshot. It also makes the snapshot
	// durable: after Publish it survives a power failure. Publishing twice is success, and the second notes win.
	Publish(ctx context.Context, id SnapshotID, notes Notes) error

	// Snapshot looks a snapshot of ours up. NotFound if there is none with a mark.
	Snapshot(ctx context.Context, id SnapshotID) (Snapshot, error)

	// DeleteSnapshot removes a snapshot of ours, whatever its mark. One that does not exist is success. One that
	// exists without our mark is left alone: Invalid. If the locality is not reachable from here the answer is
	// Unavailable, never success.
	DeleteSnapshot(ctx context.Context, id SnapshotID) error

	// Snapshots lists snapshots of ours, in no particular order. It skips those still cutting unless the filter asks
	// for them. The listing is not one instant: what is created or deleted meanwhile may or may not appear.
	Snapshots(ctx context.Context, f Filter) iter.Seq2[Snapshot, error]

	// Close releases connections. No call may be under way, no image or target open, and none may follow.
	Close() error
}

// Lister is an adapter that knows which of its volumes this node has attached right now, as block devices.
type Lister interface {
	Volumes(ctx context.Context) iter.Seq2[Volume, error]
}

// Gater is asked before anything is frozen: can all of these be snapshotted now? It checks space, limits, health and
// permissions, and says how long the snapshots will take: with what is staged, once something is. An error names the
// volume; nothing is frozen then.
type Gater interface {
	Gate(ctx context.Context, ids []VolumeID) (Forecast, error)
}

// Forecast is what a backend expects of a cut.
type Forecast struct {
	// Frozen is how long the CreateSnapshot calls of all the volumes, in parallel, will take from the first to the last.
	Frozen time.Duration
}

// Stager moves work out of the frozen window: Stage does ahead, unfrozen, what makes the CreateSnapshot of the same
// volume and wanted name short. The caller promises that nothing writes to the volume during that CreateSnapshot (it
// is frozen), unless it is one that freezes itself; when the promise is broken the cut is void. Staging may be repeated,
// and is worth repeating when the volume changed much. What is staged is not a snapshot: it is thrown away by Unstage
// and by CreateSnapshot, and it may be gone with the process that staged it; CreateSnapshot is then merely slower.
type Stager interface {
	Stage(ctx context.Context, id VolumeID, wanted string) error
	Unstage(ctx context.Context, id VolumeID, wanted string) error
}

// Differ answers the changed-block question. Both calls cost metadata reads only, never a pass over the data, except
// where the backend's metadata proves nothing (compressed extents of btrfs) and Capabilities say so. The answer holds
// nothing open until its stream is ranged over, and nothing after that.
//
// Allocated gives what a snapshot holds: extents not mentioned are zero. Changed gives what differs between two
// snapshots of one volume (another volume's is Invalid); base may be the younger one, and a zeroed or discarded range
// comes as a Zero extent. Both start at from (bytes, 0 ≤ from ≤ size), so that a broken stream can be resumed. For
// every pair of snapshots, base overwritten with the target's bytes at the changed extents, cut or grown to
// TargetSize, equals target: that is the promise that adaptertest checks for random writes. A from out of its range is
// Invalid; a snapshot that is pending is Unavailable, and one that is still cutting may be refused as Invalid.
type Differ interface {
	Allocated(ctx context.Context, id SnapshotID, from int64) (cbt.Delta, error)
	Changed(ctx context.Context, base, target SnapshotID, from int64) (cbt.Delta, error)
}

// Opener reads a snapshot's data. Like a Differ, it refuses a pending snapshot (Unavailable) and may refuse one that
// is still cutting (Invalid): callers publish first.
type Opener interface {
	Open(ctx context.Context, id SnapshotID) (Image, error)
}

// Image is an open snapshot. ReadAt is safe in parallel and follows io.ReaderAt (a short read ends in io.EOF); ctx
// cancels it. Reads whose offset, length and buffer address are multiples of ImageAlign may bypass the page cache and
// are the fast ones; any other read is correct too.
type Image interface {
	ReadAt(ctx context.Context, p []byte, off int64) (int, error)
	Size() int64
	Close() error
}

// ImageAlign is the alignment, in bytes, of offsets, lengths and addresses that makes a read or write direct.
const ImageAlign = 4096

// Restorer makes volumes.
type Restorer interface {
	// Begin makes the target of a restore, or opens again the one that a dead process left under the same id and
	// token, with what it wrote. A target is not a volume yet: nobody finds it by its id until Commit. With
	// spec.Overwrite the existing volume itself is the target, from the first write on; one that is in use is Busy,
	// one that is not there NotFound. Without it, a volume that exists is Busy. So is a target that is held open. Sizes
	// that do not fit, no size and no token are Invalid.
	Begin(ctx context.Context, spec VolumeSpec) (Target, error)
}

// Cloner makes a volume of a snapshot by sharing what the snapshot holds, where Restorer would copy it.
type Cloner interface {
	// BeginClone is Begin for a new volume; the target holds what the snapshot does, and zeros beyond its end, as soon as it
	// exists, and can be written to as any other. The snapshot does not depend on the volume, nor the volume on the snapshot:
	// either may be deleted. Unsupported: this snapshot cannot be shared with that volume (another pool, another
	// filesystem), copy it. A size below the snapshot's and Overwrite are Invalid, and so is a token that Begin was given.
	BeginClone(ctx context.Context, id SnapshotID, spec VolumeSpec) (Target, error)
}

// VolumeSpec is the volume that a restore wants. Token names the restore, so that its repetition finds the same
// target: same volume, same source, same token. Size is in bytes.
type VolumeSpec struct {
	ID        VolumeID
	Size      int64
	Token     string
	Overwrite bool   // write over an existing volume, which must be of Size or larger, instead of making a new one
	Origin    Origin // of a new volume that is made for somebody, kept by a Provisioner and ignored by others
}

// Target is a volume being filled, as a file of a tree is. What an error interrupts may be written in part and is written
// again. ReadAt gives what the target holds as far as it is known to: of an overwritten volume, and of what was written, also
// before its process died; a backend that cannot read a target is Unsupported. Fresh says that the target is new, and that
// this is its first Begin. Close keeps a new target for a later Begin with the same token.
type Target interface {
	FileTarget
	// ReadsZero says that every byte not yet written reads as zero, so Zero can be left out.
	ReadsZero() bool
	// Commit makes what was written durable and the volume visible. Target is closed afterwards, also on an error.
	Commit(ctx context.Context) (Volume, error)
	// Abort removes a new target; an overwritten volume stays as far as it was written. Like Close it closes the target, and
	// on a closed one both do nothing.
	Abort(ctx context.Context) error
}

// Volume is a volume as the backend sees it now. Size is bytes.
type Volume struct {
	ID     VolumeID
	Form   Form
	Size   int64
	Freeze FreezeMode
	// Device is the block device that carries the live volume on this node, 0 if it is not attached here.
	Device Device
	// WritesTo is the filesystem that a snapshot of this volume writes to, by the device number that mountinfo shows (on
	// btrfs, and there only, stat's st_dev is another one), 0 if none that this node has. That filesystem cannot be
	// frozen while the snapshot is taken.
	WritesTo Device
	// Path is where an administrator finds the volume on this node: a file or a device node, or empty.
	Path string
}

// Device is a Linux device number as stat(2) gives it (st_rdev or st_dev), comparable; 0 is none.
type Device uint64

// FreezeMode is how a backend's snapshot gets along with a filesystem freeze.
type FreezeMode uint8

const (
	// FreezeNests: the snapshot works while we hold the filesystem frozen. The usual case.
	FreezeNests FreezeMode = iota
	// FreezeSelf: the snapshot stops whoever writes by itself, for its own moment, and so fixes an instant of its own. It
	// fails when the filesystem right on the volume's device is frozen already, if that is of a kind that device-mapper
	// freezes (LVM on kernels where its suspend fails with EBUSY then: Linux 6.1 is one). Trees are such volumes too: the
	// snapshot of a subvolume is one instant by itself, and what it writes to must not be frozen.
	FreezeSelf
	// FreezeNone: what is on the volume cannot be frozen from this node (a guest's disk, another node's mount).
	FreezeNone
)

// String returns the word that JSON and tables show.
func (m FreezeMode) String() string {
	return [...]string{"nests", "self", "none"}[m]
}

// State is how far a snapshot is.
type State uint8

const (
	// Pending: the point in time is fixed, the data is not yet readable.
	Pending State = iota
	// Ready: it can be read, compared and restored.
	Ready
	// Failed: it will never be ready. Delete it.
	Failed
)

// String returns the word that JSON and tables show.
func (s State) String() string {
	return [...]string{"pending", "ready", "failed"}[s]
}

// Mark is what the backend keeps on a snapshot of ours.
type Mark string

const (
	Cutting  Mark = "cutting"
	Verified Mark = "verified"
)

// Consistency is what a cut achieved for one volume.
type Consistency string

const (
	// FilesystemConsistent: every filesystem on the volume stood still, provably but for what Notes.Unverified says, at the
	// one instant of the cut.
	FilesystemConsistent Consistency = "filesystem"
	// VolumeConsistent: every filesystem on the volume stood still, but at an instant of the volume's own, while others of
	// the cut were frozen: not that of the cut.
	VolumeConsistent Consistency = "volume"
	// CrashConsistent: one instant of the volume, as after a power failure.
	CrashConsistent Consistency = "crash"
)

// Quiet says that the filesystems stood still: what is on the snapshot was left clean.
func (c Consistency) Quiet() bool { return c == FilesystemConsistent || c == VolumeConsistent }

// Notes is what a cut tells a snapshot when it publishes it. The backend keeps it and Snapshot gives it back.
type Notes struct {
	Cut         string      `json:"cut"`     // the cut's name
	Instant     string      `json:"instant"` // the same for all snapshots of one cut, and for no others
	Consistency Consistency `json:"consistency"`
	// Unverified lists in words what could not be proved, e.g. "dm-3 keeps no write counters"; empty is the norm.
	Unverified []string `json:"unverified,omitempty"`
}

// Snapshot is a snapshot of ours as the backend sees it now. Size is the volume's size in bytes at that instant.
type Snapshot struct {
	ID      SnapshotID
	Wanted  string // the name that was asked for; ID.Name is derived from it
	Form    Form   // of the volume
	Size    int64
	Created time.Time // the backend's clock
	State   State
	Mark    Mark
	Notes   Notes // zero until published
}

// Filter narrows a listing. The zero Filter lists every verified snapshot of the backend.
type Filter struct {
	Volume  VolumeID // only this volume's, if not zero
	Cutting bool     // also those that are not verified
}

// Capabilities describes an adapter for people and for plans. The boolean abilities are found from the code by
// CapabilitiesOf, an adapter fills in the words.
type Capabilities struct {
	Quiesce     string          `json:"quiesce"`     // how a consistent point in time comes about, in one sentence
	Changed     string          `json:"changed"`     // where changed blocks come from, and how exact they are
	PointInTime string          `json:"pointInTime"` // which acknowledgement fixes the point in time, with its source
	Confidence  cbt.Confidence  `json:"-"`
	Source      audit.Source    `json:"source"`    // who answers the changed-block question, as found when the backend was opened
	NodeLocal   bool            `json:"nodeLocal"` // volumes exist on one node only
	Abilities   map[string]bool `json:"abilities,omitempty"`
}

// CapabilitiesOf returns a's capabilities with the optional abilities that its code, decorated or not, really has.
func CapabilitiesOf(a Adapter) Capabilities {
	c := a.Capabilities()
	c.Abilities = map[string]bool{
		"list":         has[Lister](a),
		"gate":         has[Gater](a),
		"stage":        has[Stager](a),
		"diff":         has[Differ](a),
		"open":         has[Opener](a),
		"restore":      has[Restorer](a),
		"clone":        has[Cloner](a),
		"provision":    has[Provisioner](a),
		"tree":         has[Trees](a),
		"restore-tree": has[TreeRestorer](a),
	}
	return c
}

func has[T any](a Adapter) bool { _, ok := As[T](a); return ok }

// As finds an optional ability of an adapter, decorated or not.
func As[T any](a Adapter) (T, bool) {
	if d, ok := a.(Decorator); ok {
		for _, ability := range d.Abilities() {
			if t, ok := ability.(T); ok {
				return t, true
			}
		}
		var none T
		return none, false
	}
	t, ok := a.(T)
	return t, ok
}

// Decorator is an adapter around an adapter. What it can is not read off its methods, which would be those of every
// ability there is, but from the list of values that Abilities gives: one for each ability that the inner adapter
// has. Decorate makes one from a Layer; that is enough for whatever stands around calls without changing their sense.
type Decorator interface {
	Adapter
	Abilities() []any
}
