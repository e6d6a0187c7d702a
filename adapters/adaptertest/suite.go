// Package adaptertest is the conformance suite of package adapters: what every adapter must pass against its real
// storage system. An adapter is done when it passes.
//
//	func TestConformance(t *testing.T) {
//		adaptertest.Run(t, adaptertest.Harness{Backend: "x", Open: …, Create: …, Absent: …})
//	}
//
// The suite asks CapabilitiesOf what the adapter can do and skips, visibly, what it cannot. A failure begins with
// "broken promise:" and names the promise of the contract. The suite deletes the snapshots that it makes.
package adaptertest

import (
	"strings"
	"testing"
	"time"

	"stillpoint.io/stillpoint/adapters"
)

// Harness lends the suite a storage system, in which it may do what it likes. The functions clean up after the test
// that they are given (t.Cleanup), and fail it when they cannot do what is asked (t.Fatal).
type Harness struct {
	// Backend is the name that the adapters of Open go by.
	Backend string

	// Open opens the adapter anew, as another process would. The suite closes it.
	Open func(t testing.TB) adapters.Adapter

	// Create makes a volume of size bytes (a multiple of Step) that reads as zeros. Where volumes are trees and nothing else,
	// Create and Absent are left out, and CreateTree and AbsentTree stand for them.
	Create func(t testing.TB, size int64) Volume

	// Absent gives the canonical id of a volume that could exist but does not, each time another one. A restore may
	// make that volume; it is removed when the test ends.
	Absent func(t testing.TB) adapters.VolumeID

	// The rest may be left out; what then is not tested shows as skipped.

	// Twin makes a volume that has v's name, and another locality. Its size is a multiple of Step.
	Twin func(t testing.TB, v Volume, size int64) Volume
	// Unreachable gives the canonical id of a volume whose locality is out of reach.
	Unreachable func(t testing.TB) adapters.VolumeID
	// Foreign makes a snapshot of v that bears no mark of ours, under the name that ours would have.
	Foreign func(t testing.TB, v Volume, name string)
	// Use makes the volume one that is in use (mounted, attached, open) until release is called.
	Use func(t testing.TB, v Volume) (release func())
	// Wrong are ids that can not name a volume.
	Wrong []string
	// Staged says how much the storage system holds that was staged for v and not thrown away yet.
	Staged func(t testing.TB, v Volume) int

	// CreateTree makes a volume that is an empty tree of files, and AbsentTree gives the canonical id of one that could
	// exist but does not, each time another one; a restore may make it. Without them trees are not tested.
	CreateTree func(t testing.TB) TreeVolume
	AbsentTree func(t testing.TB) adapters.VolumeID
	// Times gives a time that the system can keep in a tree, where it cannot keep any.
	Times func(time.Time) time.Time

	// Provision opens an adapter as Open does, which has a place for new volumes. What is made there is removed by the suite.
	Provision func(t testing.TB) adapters.Adapter

	// Step is the number of bytes that sizes of volumes are multiples of; 0 means 4096.
	Step int64
	// Size is the number of bytes of the volumes in most tests; 0 means 4 MiB. More makes the suite thorough, and slow.
	Size int64
}

// Volume is a live volume as its user sees it. When a method returns, what it did is in every snapshot taken later.
type Volume interface {
	// ID is what a person would type; it need not be canonical.
	ID() adapters.VolumeID
	WriteAt(p []byte, off int64) (int, error)
	// Zero makes the range read as zeros, by a discard or a hole if the system has them.
	Zero(off, length int64) error
	// Resize makes the volume larger, by bytes that read as zero, or smaller. A system that cannot returns
	// errors.ErrUnsupported.
	Resize(size int64) error
}

// Run runs the suite.
func Run(t *testing.T, h Harness) {
	if h.Step == 0 {
		h.Step = 4096
	}
	if h.Size == 0 {
		h.Size = 4 << 20
	}
	reported := h.Size
	if h.Create == nil {
		h.onTrees()
		reported = 0
	}
	a := h.Open(t)
	s := &suite{Harness: h, reported: reported, can: adapters.CapabilitiesOf(a).Abilities}
	if err := a.Close(); err != nil {
		t.Fatalf("broken promise: Close of an idle adapter succeeds: %v", err)
	}
	for _, c := range []struct {
		name  string
		needs []string // abilities
		test  func(*suite, *testing.T)
	}{
		{"Capabilities", nil, (*suite).capabilities},
		{"Volumes", nil, (*suite).volumes},
		{"List", []string{"list"}, (*suite).list},
		{"Names", nil, (*suite).names},
		{"Life", nil, (*suite).life},
		{"Foreign", nil, (*suite).foreign},
		{"Localities", nil, (*suite).localities},
		{"Unreachable", nil, (*suite).unreachable},
		{"Errors", nil, (*suite).errors},
		{"Cancel", nil, (*suite).cancel},
		{"Concurrency", nil, (*suite).concurrency},
		{"Gate", []string{"gate"}, (*suite).gate},
		{"Stage", []string{"stage"}, (*suite).stage},
		{"Delta", []string{"diff"}, (*suite).delta},
		{"Delta/Resume", []string{"diff"}, (*suite).resume},
		{"Delta/Deletion", []string{"diff"}, (*suite).deletion},
		{"Delta/Errors", []string{"diff"}, (*suite).deltaErrors},
		{"Image", []string{"open"}, (*suite).image},
		{"Image/Still", []string{"open"}, (*suite).still},
		{"Restore/New", []string{"restore", "open"}, (*suite).restoreNew},
		{"Restore/Resume", []string{"restore", "open"}, (*suite).restoreResume},
		{"Restore/Abort", []string{"restore", "open"}, (*suite).restoreAbort},
		{"Restore/Overwrite", []string{"restore", "open"}, (*suite).restoreOverwrite},
		{"Restore/InUse", []string{"restore"}, (*suite).restoreInUse},
		{"Clone", []string{"clone", "restore", "open"}, (*suite).clone},
		{"Clone/Errors", []string{"clone", "restore"}, (*suite).cloneErrors},
		{"Restore/Errors", []string{"restore"}, (*suite).restoreErrors},
		{"Provision/Places", []string{"provision"}, (*suite).places},
		{"Provision", []string{"provision", "restore", "open"}, (*suite).provision},
		{"Provision/Strangers", []string{"provision"}, (*suite).strangers},
		{"Tree", []string{"tree"}, (*suite).tree},
		{"Tree/Errors", []string{"tree"}, (*suite).treeErrors},
		{"Tree/Restore", []string{"tree", "restore-tree"}, (*suite).replant},
		{"Tree/Resume", []string{"tree", "restore-tree"}, (*suite).regrow},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, ability := range c.needs {
				if !s.can[ability] {
					t.Skipf("not tested: the adapter has not the ability %q", ability)
				}
			}
			if strings.HasPrefix(c.name, "Tree") && (s.CreateTree == nil || s.AbsentTree == nil) {
				t.Skip("not tested: the harness makes no trees")
			}
			c.test(s, t)
		})
	}
}

type suite struct {
	Harness
	reported int64 // the size that a volume of Size bytes says it has
	can      map[string]bool
}
