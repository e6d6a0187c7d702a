package adapters

import (
	"context"
	"iter"
	"time"

	"stillpoint.io/stillpoint/cbt"
)

// Form is what a volume holds for its reader: bytes, or files.
type Form uint8

const (
	// BlockForm: one run of bytes, read by an Opener and compared by a Differ.
	BlockForm Form = iota
	// TreeForm: a tree of files (a subvolume of btrfs, a subvolume of CephFS), read by a Trees. Size is 0: nobody counts
	// what is in a tree before it is walked.
	TreeForm
)

// String returns the word that JSON and tables show.
func (f Form) String() string { return [...]string{"blocks", "tree"}[f] }

// Trees reads snapshots of volumes that are trees of files. Like an Opener, it refuses a pending snapshot (Unavailable) and
// one that is still cutting (Invalid); one that is no tree is Unsupported, and so is every tree to an Opener or Differ.
type Trees interface {
	// OpenTree opens a snapshot. With a base, which is another snapshot of the same volume (another volume's is Invalid), its
	// entries say what is certainly the same in both. The work for that may be done here, in proportion to what changed.
	// A base that is gone is NotFound; one that cannot be compared is no error: then nothing is called unchanged.
	OpenTree(ctx context.Context, id SnapshotID, base *SnapshotID) (Tree, error)
}

// Tree is an open snapshot of a tree. It is safe in parallel, and keeps open nothing but its root (and its base's) between
// calls: a tree may be as deep and as wide as it likes. Nothing outside of it is ever read: no symbolic link is followed,
// no mount is crossed.
//
// A path is relative to the root, its elements separated by single slashes; the root's is empty. Elements are bytes, not
// text: anything but a slash and NUL, as the filesystem has it. What is not there is NotFound; a path through something
// that is no directory is NotFound too.
type Tree interface {
	// Stat describes what is at a path.
	Stat(ctx context.Context, path string) (Entry, error)
	// Entries lists a directory: the directories in it first, then everything else, each in ascending order of the bytes of
	// their names, without "." and "..". That is the order in which a backup keeps them. It holds the names in memory while
	// it is ranged over, and no descriptor while the caller has an entry.
	Entries(ctx context.Context, dir string) iter.Seq2[Entry, error]
	// OpenFile opens a regular file, and nothing else (Invalid).
	OpenFile(ctx context.Context, path string) (File, error)
	Close() error
}

// File is an open file of a tree. Its Extents tell data from holes, from offset 0 to its end without a gap; a filesystem
// that does not know answers with one extent of data. A hole reads as zeros.
type File interface {
	Image
	Extents(ctx context.Context) cbt.Seq
}

// FileType is what an entry of a tree is.
type FileType uint8

const (
	RegularFile FileType = iota
	Directory
	Symlink
	Fifo
	Socket
	CharDevice
	BlockDevice
)

// String returns the word that JSON and tables show.
func (t FileType) String() string {
	return [...]string{"file", "directory", "symlink", "fifo", "socket", "char-device", "block-device"}[t]
}

// Entry is everything that a tree knows about a name, except a file's bytes. Two entries with the same values (Unchanged
// and ButLinks aside) describe the same file, if its bytes are the same too. Times of access and of the last change of the metadata
// are not in it: nobody can set the one without the other changing.
type Entry struct {
	Name     string // the path's last element; empty for the root
	Type     FileType
	Mode     uint32 // permissions with set-user-id, set-group-id and sticky: 12 bits
	UID, GID uint32
	Size     int64 // of a regular file, in bytes; 0 for everything else
	Modified time.Time
	Target   string // of a symbolic link: bytes
	Device   Device // of a device
	// Link is not 0 for what has several names: entries of one tree with the same Link are one file. It is the same in
	// every snapshot of the volume as long as the file exists.
	Link uint64
	// Attributes are the extended attributes, access control lists (system.posix_acl_access) among them, ascending by
	// name. What the system itself answers for and nobody can set is not among them.
	Attributes []Attribute
	// Unchanged says that this entry, and everything below it if it is a directory, is byte for byte and in all its
	// metadata what the base has at the same path. It is said only when it is certain: false may mean unchanged too. Two
	// names of one file that is unchanged are both unchanged.
	Unchanged bool
	// ButLinks narrows what Unchanged says of a directory, where a backend sees the changes of a file of several names below
	// one of them only: what the base has below it with a Link may have changed all the same, but for its name.
	ButLinks bool
}

// Attribute is an extended attribute.
type Attribute struct {
	Name  string
	Value []byte
}

// TreeRestorer makes volumes that are trees. It is apart from Trees, and a target apart from a Tree, because they promise
// different things: what is read is fixed and open to many, what is written is nobody's until it is committed.
type TreeRestorer interface {
	// BeginTree makes the target of a restore: an empty tree that nobody finds by its id until Commit. A volume that exists
	// is Busy, and so is a target of the same id that another process has open; what a dead process left of one is in the
	// way of nothing, goes with Commit and Abort, and its regular files are taken over by Create. No token is Invalid.
	BeginTree(ctx context.Context, spec TreeSpec) (TreeTarget, error)
}

// TreeSpec is the volume that a restore wants. Token names the restore.
type TreeSpec struct {
	ID    VolumeID
	Token string
}

// TreeTarget is a tree being made. Paths are as in Tree; one with an empty element, ".", "..", a NUL or a name that is too
// long for the filesystem is Invalid. Every call makes something new at a path whose directory was made before: what is
// there already is Busy, never written over and never followed, so that no order of calls and no names can reach out of
// the tree. It is safe in parallel on different paths.
type TreeTarget interface {
	Mkdir(ctx context.Context, path string) error
	// Create makes a regular file of size bytes that reads as zeros, and is Fresh. Where a dead process, or one that closed
	// the target, left a regular file of this path and size, the file has the bytes of that one instead, and nothing else
	// of it, and is not Fresh. What is left is used once.
	Create(ctx context.Context, path string, size int64) (FileTarget, error)
	Symlink(ctx context.Context, path, target string) error
	// Special makes a pipe, a socket or a device.
	Special(ctx context.Context, path string, t FileType, d Device) error
	// Link gives a file, which is not a directory, another name.
	Link(ctx context.Context, old, path string) error
	// Describe sets owner, mode, attributes and time of what is at a path, the root included, as the entry has them. It
	// comes last: after a file's bytes, and after everything in a directory.
	Describe(ctx context.Context, path string, e Entry) error
	// Commit makes everything durable and the volume visible. The target is closed afterwards, also on an error.
	Commit(ctx context.Context) (Volume, error)
	// Abort removes the target. Close leaves what was made to a later BeginTree. Each closes the target; on
	// a closed one they do nothing.
	Abort(ctx context.Context) error
	Close() error
}

// FileTarget is a file, or a volume, being filled. WriteAt, ReadAt and Zero take any range within its size (Invalid beyond),
// and are safe in parallel on ranges that do not overlap. Of two writes to one range, the later wins.
type FileTarget interface {
	WriteAt(ctx context.Context, p []byte, off int64) error
	// ReadAt fills p with what the file holds now.
	ReadAt(ctx context.Context, p []byte, off int64) error
	// Zero makes the range read as zeros, and a hole where the filesystem has holes.
	Zero(ctx context.Context, off, length int64) error
	// Fresh says that the file reads as zeros where nothing was written since Create.
	Fresh() bool
	Close() error
}
