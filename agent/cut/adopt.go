package cut

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"time"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

// instantOf identifies the instant of a cut: a digest over its snapshots and when each was taken. It is written into
// every snapshot by Publish, so a snapshot that is still cutting can be told to belong to a verified cut by those of
// its siblings that are published already.
func instantOf(snapshots []adapters.Snapshot) string {
	lines := make([]string, len(snapshots))
	for i, s := range snapshots {
		lines[i] = fmt.Sprintf("%s %s\n", s.ID.Full(), s.Created.UTC().Format(time.RFC3339Nano))
	}
	slices.Sort(lines)
	h := sha256.New()
	for _, l := range lines {
		h.Write([]byte(l))
	}
	return hex.EncodeToString(h.Sum(nil)[:16])
}

// Alone reports whether a published snapshot is the only one of its cut: whether its instant is of itself only.
func Alone(s adapters.Snapshot) bool { return s.Notes.Instant == instantOf([]adapters.Snapshot{s}) }

// leftover is what to do about the snapshots that bear a cut's name before it begins.
type leftover uint8

const (
	nothing leftover = iota // there are none: cut
	remove                  // unverified: delete them and cut anew
	finish                  // the cut was verified and died while publishing: publish the rest
	whole                   // the cut is there
	foreign                 // verified snapshots of another cut bear the name
)

// judge decides by the snapshots found, one entry a member, nil where there is none. An unverified snapshot is never
// kept for its own sake: only when a published sibling's notes prove that exactly these snapshots were verified
// together.
func judge(name string, found []*adapters.Snapshot) leftover {
	var present []adapters.Snapshot
	var notes *adapters.Notes
	cutting := false
	for _, s := range found {
		if s == nil {
			continue
		}
		present = append(present, *s)
		if s.Mark == adapters.Verified {
			notes = &s.Notes
		} else {
			cutting = true
		}
	}
	switch {
	case len(present) == 0:
		return nothing
	case notes == nil:
		return remove
	case notes.Cut != name || len(present) < len(found) || notes.Instant != instantOf(present):
		return foreign
	case cutting:
		return finish
	default:
		return whole
	}
}

// adopt deals with what an earlier cut of this name left. It returns that cut's snapshots if it stands, nil if the
// way is free, or an error if the name is taken.
func adopt(ctx context.Context, name string, members []member) ([]adapters.Snapshot, error) {
	found := make([]*adapters.Snapshot, len(members))
	err := each(len(members), func(i int) error {
		s, err := members[i].adapter.Snapshot(ctx, members[i].id)
		switch {
		case err == nil && s.Wanted != name:
			return fault.Errorf(fault.Busy, "%s exists for the name %q: choose another name than %q", members[i].id, s.Wanted, name)
		case err == nil:
			found[i] = &s
		case !errors.Is(err, fault.NotFound):
			return err
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	switch judge(name, found) {
	case nothing:
		return nil, nil
	case remove:
		return nil, each(len(members), func(i int) error {
			if found[i] == nil {
				return nil
			}
			return members[i].adapter.DeleteSnapshot(ctx, members[i].id)
		})
	case foreign:
		for _, s := range found {
			if s != nil && s.Mark == adapters.Verified {
				return nil, fault.Errorf(fault.Busy, "the name %q is taken: %s is of another cut; choose another name, or delete it first", name, s.ID)
			}
		}
	}
	return finished(ctx, members, found)
}

// finished publishes what a verified cut left unpublished, and returns its snapshots.
func finished(ctx context.Context, members []member, found []*adapters.Snapshot) ([]adapters.Snapshot, error) {
	var proof adapters.Notes
	for _, s := range found {
		if s.Mark == adapters.Verified {
			proof = s.Notes
		}
	}
	done := make([]adapters.Snapshot, len(members))
	err := each(len(members), func(i int) error {
		done[i] = *found[i]
		if found[i].Mark == adapters.Verified {
			return nil
		}
		notes := proof
		notes.Consistency = adapters.CrashConsistent // what was achieved for this one was not written down: claim the least
		done[i].Mark, done[i].Notes = adapters.Verified, notes
		return members[i].adapter.Publish(ctx, members[i].id, notes)
	})
	return done, err
}

// adopted is the result of a cut that had been made before.
func (r Request) adopted(snapshots []adapters.Snapshot) Result {
	if snapshots == nil {
		return Result{}
	}
	res := Result{Name: r.Name, Adopted: true, Frozen: []FrozenFilesystem{}}
	for _, s := range snapshots {
		res.add(s.ID, s.Notes.Consistency)
		res.Unverified = append(res.Unverified, s.Notes.Unverified...)
	}
	res.Unverified = slices.Compact(slices.Sorted(slices.Values(res.Unverified)))
	return res
}
