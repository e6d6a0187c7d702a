package freezer

import (
	"encoding"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Limits of a request.
const (
	// MaxFreeze is the longest absolute deadline.
	MaxFreeze = 60 * time.Second
	// DefaultHeartbeat is the lease's heartbeat when a request names none.
	DefaultHeartbeat = 2 * time.Second
	// MinHeartbeat is the shortest heartbeat; the client renews four times as often.
	MinHeartbeat = 100 * time.Millisecond
	// MaxFilesystems is how many filesystems one request may name, and how many can be frozen at once.
	MaxFilesystems = 64
	// RestFactor: between two freezes of a superblock lies at least RestFactor times the time that the last one took.
	RestFactor = 5
)

// Types are the filesystem types that are frozen. Each has a freeze_fs that leaves a sound image on its device, and
// FIFREEZE on each was tried. Not ext2 (no journal: an image of it is never clean), not overlayfs (it has no freeze
// of its own: freeze the filesystem of its upperdir), nothing that lives in a network or in another process.
var Types = []string{"ext3", "ext4", "xfs", "btrfs", "f2fs"}

// Device is the device number of a superblock (s_dev), as the third field of /proc/self/mountinfo shows it and as
// unix.Mkdev encodes it. For btrfs, and only there, it differs from the st_dev of a file inside.
type Device uint64

// ParseDevice reads "major:minor".
func ParseDevice(s string) (Device, error) {
	major, minor, ok := strings.Cut(s, ":")
	a, err1 := strconv.ParseUint(major, 10, 32)
	b, err2 := strconv.ParseUint(minor, 10, 32)
	if !ok || err1 != nil || err2 != nil {
		return 0, fmt.Errorf("%q is not a device number: want major:minor", s)
	}
	return Device(unix.Mkdev(uint32(a), uint32(b))), nil
}

// String gives "major:minor".
func (d Device) String() string {
	return fmt.Sprintf("%d:%d", unix.Major(uint64(d)), unix.Minor(uint64(d)))
}

// MarshalText and UnmarshalText give a device its textual form on the wire.
func (d Device) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// UnmarshalText is the inverse of MarshalText.
func (d *Device) UnmarshalText(b []byte) (err error) {
	*d, err = ParseDevice(string(b))
	return err
}

var _ encoding.TextUnmarshaler = (*Device)(nil)

// Filesystem names one superblock to freeze. All three must agree with what the kernel says when the freezer opens it.
type Filesystem struct {
	Mount  string `json:"mount"`  // a mount point in the freezer's mount namespace, absolute and clean
	Device Device `json:"device"` // the superblock mounted there
	Type   string `json:"type"`   // one of Types
}

// Request asks for a lease.
type Request struct {
	// Filesystems in the order in which they are frozen: one that is stored on another (a loop device's) before that
	// other. The reverse order would deadlock and is refused. Neighbours that are not stored on each other are frozen
	// at the same time. A superblock may be named once.
	Filesystems []Filesystem
	// First is how many of them Freeze freezes; zero is all. The rest waits for Lease.More.
	First int
	// MaxFreeze is the absolute deadline, counted from the receipt of the request: 0 < MaxFreeze <= 60 s. All is
	// thawed then, whatever anybody says. Nothing extends it.
	MaxFreeze time.Duration
	// Heartbeat is how long the freezer waits for a sign of life of the client; zero is DefaultHeartbeat. The client
	// in this package sends them by itself.
	Heartbeat time.Duration
}

// Frozen reports on one filesystem of a lease.
type Frozen struct {
	Filesystem
	Duration time.Duration // from FIFREEZE's return to FITHAW's; zero if it was never frozen
	// Held: it was frozen without a break until this lease's Thaw was received, and our FITHAW ended that. If not,
	// what was copied meanwhile is no single instant. A stranger who thaws and freezes again in between is not seen:
	// the write counters in /sys/dev/block are the second proof.
	Held bool
	Why  string // why it was not held, in words
}

// Report is the end of a lease, one entry a filesystem, in the request's order.
type Report []Frozen

// Held tells whether every filesystem was held.
func (r Report) Held() bool {
	return len(r) > 0 && !slices.ContainsFunc(r, func(f Frozen) bool { return !f.Held })
}

// Reason says what a caller can do about an Error. It is itself an error, for errors.Is(err, freezer.Busy).
type Reason string

const (
	// Busy: the filesystem is frozen by somebody else, was frozen too short a time ago, or the freezer has another
	// lease. Error.Wait says how long to wait where that is known.
	Busy Reason = "busy"
	// Refused: this filesystem is never frozen: the root, what the system or the freezer itself writes to, a type
	// outside the allow-list, or one that the kernel cannot freeze.
	Refused Reason = "refused"
	// Invalid: the request contradicts itself or the machine: no such mount, another device there, a wrong order, a
	// limit exceeded.
	Invalid Reason = "invalid"
	// Lost: the freeze did not come about in time, or the lease ended before its Thaw: deadline, heartbeat, a
	// stranger's thaw, the loss of a freezer process.
	Lost Reason = "lost"
	// Unavailable: the freezer cannot be reached or cannot work now.
	Unavailable Reason = "unavailable"
)

// Error makes a Reason usable as a target of errors.Is.
func (r Reason) Error() string { return string(r) }

// Error is every error of this package that a caller may want to decide by.
type Error struct {
	Reason     Reason
	Filesystem string        // the mount point concerned, if it is one
	Wait       time.Duration // with Busy: when trying again makes sense; zero if unknown
	Message    string
}

func (e *Error) Error() string {
	if e.Filesystem != "" {
		return e.Filesystem + ": " + e.Message
	}
	return e.Message
}

// Is reports whether target is this error's reason.
func (e *Error) Is(target error) bool {
	r, ok := target.(Reason)
	return ok && r == e.Reason
}

func errorf(r Reason, filesystem, format string, args ...any) *Error {
	return &Error{Reason: r, Filesystem: filesystem, Message: fmt.Sprintf(format, args...)}
}

// asError gives any error the shape that crosses the wire.
func asError(err error) *Error {
	if e, ok := errors.AsType[*Error](err); ok {
		return e
	}
	return errorf(Unavailable, "", "%v", err)
}

// Status is what the freezer knows of itself, for metrics and people.
type Status struct {
	Version     string
	Weakness    string       // what the freezer lacks to be fully hardened, in words; empty is best
	Lease       *LeaseStatus // nil when there is none
	Guard       bool         // the second process answers
	Filesystems []FilesystemStatus
}

// LeaseStatus describes the running lease.
type LeaseStatus struct {
	Filesystems []Filesystem
	Age         time.Duration
	Deadline    time.Duration // from now
}

// FilesystemStatus counts the freezes of one superblock since the freezer started.
type FilesystemStatus struct {
	Filesystem
	State     string // "thawed", "freezing", "frozen", "thawing"
	Freezes   uint64
	Last, Max time.Duration
}
