package audit

import (
	"fmt"

	"stillpoint.io/stillpoint/cbt"
)

// Source says who answers the changed-block question. Its names are those of the quirk table; a name that is not in it
// is judged by the rows for every source.
type Source struct {
	Name    string `json:"name"`              // "rbd-fast-diff", "vmware-cbt", "dm-thin"
	Version string `json:"version,omitempty"` // of the code that tracks the changes; empty if unknown or of no importance
	// Tracked: changes were noted down as they were made (a bitmap, an object map). Otherwise both snapshots' own maps are
	// compared, and a note cannot have been forgotten.
	Tracked bool `json:"tracked"`
}

// Names of sources in the quirk table.
const (
	VMwareCBT       = "vmware-cbt"        // QueryChangedDiskAreas; Version is ESXi's, with the build: "6.0.0.3029758"
	RBDFastDiff     = "rbd-fast-diff"     // rbd_diff_iterate2 with whole_object, written by librbd; Version is librbd's
	KRBDFastDiff    = "krbd-fast-diff"    // the same, written by the kernel's rbd; Version is the kernel's
	AzurePageRanges = "azure-page-ranges" // Get Page Ranges with prevsnapshot, of incremental snapshots
)

// Facts is what a judgement is made from. Sizes are bytes.
type Facts struct {
	Source     Source
	BaseSize   int64 // of the base's snapshot; 0 without a base
	TargetSize int64
	// Smallest is the volume's smallest size ever, Largest its largest since the base, as far as its backups know.
	Smallest, Largest int64
	// Quiet: nothing could write to the volume while either snapshot was taken.
	Quiet bool
	// Listed is how much of the base the delta lists as changed. 0 while that is not known.
	Listed int64
}

func (f Facts) based() bool { return f.BaseSize > 0 }

// Verdict is what to do about a finding.
type Verdict uint8

const (
	// Warn: go on, and say so.
	Warn Verdict = iota
	// Full: do not use the comparison. Back up all that is allocated.
	Full
	// Whole: do not even believe which blocks are allocated. Read every byte.
	Whole
)

// String returns the word that tables show.
func (v Verdict) String() string { return [...]string{"warn", "full", "whole"}[v] }

// Quirk is a row of the table: a source that was wrong, when, and what we do about it.
type Quirk struct {
	Source    string           // which source; empty: any
	Name      string           // short, for tables and metrics
	Affects   func(Facts) bool // asked only for facts of Source
	Verdict   Verdict
	Why       string // in words, for whoever reads the report
	Reference string
}

const (
	gib = 1 << 30
	tib = 1 << 40
	// Below this a list of everything costs nothing and means nothing. Bytes.
	everythingFloor = 64 << 20
)

// Quirks is the table. A new incident is one row here and one in the test.
var Quirks = []Quirk{
	{
		Source: VMwareCBT, Name: "grown past a power of two", Verdict: Full,
		Affects: func(f Facts) bool {
			return f.based() && f.Source.before("6") && crosses(min(f.Smallest, f.BaseSize), f.TargetSize, 128*gib)
		},
		Why:       "the disk grew past 128 GiB or a power of two above it with changed block tracking on: ESXi 4 and 5 list wrong areas from then on, until tracking is reset",
		Reference: "https://knowledge.broadcom.com/external/article?legacyId=2090639 (VMware KB 2090639)",
	},
	{
		Source: VMwareCBT, Name: "writes lost in consolidation", Verdict: Whole,
		Affects: func(f Facts) bool {
			return f.Source.from("6.0") && f.Source.before("6.0.0.3247720")
		},
		Why:       "ESXi 6.0 before patch ESXi600-201511001 forgets what is written while a snapshot is consolidated, in the list of allocated areas too",
		Reference: "https://knowledge.broadcom.com/external/article/317933 (VMware KB 2136854)",
	},
	{
		Source: RBDFastDiff, Name: "object map under I/O", Verdict: Full,
		Affects: func(f Facts) bool {
			return f.based() && !f.Quiet && librbdMapRace(f.Source)
		},
		Why:       "this librbd may record a wrong object map when a snapshot is taken while something writes, and one of the two snapshots was; freeze the filesystem or update Ceph to 16.2.14, 17.2.7 or 18.2.0",
		Reference: "https://tracker.ceph.com/issues/61616, https://github.com/ceph/ceph/pull/52109",
	},
	{
		Source: RBDFastDiff, Name: "object map race", Verdict: Warn,
		Affects: func(f Facts) bool {
			return f.based() && f.Quiet && librbdMapRace(f.Source)
		},
		Why:       "this librbd records a wrong object map when a snapshot is taken while something writes; both were taken frozen, so this list should be right; update Ceph to 16.2.14, 17.2.7 or 18.2.0",
		Reference: "https://tracker.ceph.com/issues/61616",
	},
	{
		Source: KRBDFastDiff, Name: "object map under I/O", Verdict: Full,
		Affects: func(f Facts) bool {
			return f.based() && !f.Quiet && f.Source.before("6.4")
		},
		Why:       "the kernel's rbd before 6.4 may record a wrong object map when a snapshot is taken while something writes, and one of the two snapshots was; freeze the filesystem or update the kernel",
		Reference: "https://tracker.ceph.com/issues/61472",
	},
	{
		Source: RBDFastDiff, Name: "offsets off the objects' edges", Verdict: Warn,
		Affects: func(f Facts) bool {
			s := f.Source
			return f.based() && (s.before("15.2.16") || s.from("16") && s.before("16.2.8"))
		},
		Why:       "this librbd lists wrong offsets when asked from the middle of an object; the adapter asks at their edges only, and an update of Ceph to 15.2.16 or 16.2.8 ends it",
		Reference: "https://tracker.ceph.com/issues/53784, https://github.com/ceph/ceph/pull/44483",
	},
	{
		Source: RBDFastDiff, Name: "shrunk", Verdict: Full, Affects: shrunk,
		Why:       "the image shrank since the base: fast-diff does not list what a shrink cut off",
		Reference: "measured on Ceph 16.2.15: the truncated object is not marked in the object map",
	},
	{
		Source: KRBDFastDiff, Name: "shrunk", Verdict: Full, Affects: shrunk,
		Why:       "the image shrank since the base: fast-diff does not list what a shrink cut off",
		Reference: "measured on Ceph 16.2.15: the truncated object is not marked in the object map",
	},
	{
		Source: AzurePageRanges, Name: "resized across 4 TiB", Verdict: Full,
		Affects: func(f Facts) bool {
			return f.based() && (f.BaseSize <= 4*tib) != (f.TargetSize <= 4*tib)
		},
		Why:       "the disk was resized across 4 TiB: Azure has no changes between snapshots before and after",
		Reference: "https://learn.microsoft.com/azure/virtual-machines/disks-incremental-snapshots#restrictions",
	},
	{
		Name: "shrunk", Verdict: Warn,
		Affects:   func(f Facts) bool { return f.Source.Tracked && shrunk(f) },
		Why:       "the volume shrank, and lists that are noted down while writing have been wrong after that before; a scrub would tell",
		Reference: "the incidents above",
	},
	{
		Name: "grown", Verdict: Warn,
		Affects: func(f Facts) bool {
			return f.based() && f.Source.Tracked && f.TargetSize > f.BaseSize
		},
		Why:       "the volume grew, and lists that are noted down while writing have been wrong after that before; a scrub would tell",
		Reference: "the incidents above",
	},
	{
		Name: "unknown version", Verdict: Warn,
		Affects: func(f Facts) bool {
			_, known := parseVersion(f.Source.Version)
			return f.based() && f.Source.Tracked && !known
		},
		Why:       "the version of what tracks the changes is not known, so nobody can say whether it is one with a known fault",
		Reference: "the incidents above",
	},
	{
		Name: "lists everything", Verdict: Warn,
		Affects: func(f Facts) bool {
			most := min(f.BaseSize, f.TargetSize)
			return most >= everythingFloor && f.Listed >= most-most/20
		},
		Why:       "the backend lists 95 % or more of the volume as changed: it may have lost track, and the backup costs as much as a full one",
		Reference: "https://tracker.ceph.com/issues/42248",
	},
}

// librbdMapRace: the regression came with pacific.
func librbdMapRace(s Source) bool {
	return s.from("16") && s.before("16.2.14") || s.from("17") && s.before("17.2.7") || s.from("18") && s.before("18.2.0")
}

// shrunk: at the end, or in between.
func shrunk(f Facts) bool { return f.based() && f.TargetSize < max(f.BaseSize, f.Largest) }

// crosses reports whether a growth from one size to another passed unit or a power of two of it.
func crosses(from, to, unit int64) bool {
	for edge := unit; edge > 0 && edge < to; edge *= 2 {
		if from <= edge {
			return true
		}
	}
	return false
}

// Finding is a row of the table that applies.
type Finding struct {
	Quirk
}

// String is the finding in a sentence.
func (f Finding) String() string { return fmt.Sprintf("%s (%s)", f.Why, f.Reference) }

// Judge finds the rows that apply, the gravest first.
func Judge(f Facts) []Finding {
	var found []Finding
	for _, grave := range []Verdict{Whole, Full, Warn} {
		for _, q := range Quirks {
			if q.Verdict == grave && (q.Source == "" || q.Source == f.Source.Name) && q.Affects(f) {
				found = append(found, Finding{q})
			}
		}
	}
	return found
}

// ListedOf counts how much of a base of size bytes an extent lists: for Facts.Listed.
func ListedOf(e cbt.Extent, size int64) int64 { return max(0, min(e.End(), size)-e.Offset) }
