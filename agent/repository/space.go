package repository

import (
	"cmp"
	"context"
	"slices"

	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/content"
	"github.com/kopia/kopia/repo/content/index"
	"github.com/kopia/kopia/repo/manifest"

	"stillpoint.io/stillpoint/adapters"
)

// Space says what takes up a repository. All are bytes as they are stored: compressed, encrypted, packed, by kopia's index.
type Space struct {
	Remote      string        `json:"remote"`
	Medium      int64         `json:"medium_bytes"`      // all blobs together, with what waits to be deleted
	Backups     int64         `json:"backup_bytes"`      // that backups refer to
	Unfinished  int64         `json:"unfinished_bytes"`  // that only checkpoints, and kopia's own snapshots, refer to
	Manifests   int64         `json:"manifest_bytes"`    // manifests and records
	Reclaimable int64         `json:"reclaimable_bytes"` // that nothing refers to: maintenance frees it in time
	Volumes     []VolumeSpace `json:"-"`                 // by handle
}

// VolumeSpace is what the backups of a volume take up.
type VolumeSpace struct {
	Volume  adapters.VolumeID
	Logical int64         // all its backups' sizes together
	Stored  int64         // that any of its backups refers to
	Unique  int64         // of Stored, that nothing but this volume's backups refers to
	Backups []BackupSpace // newest first
}

// BackupSpace is what a backup takes up: Unique is what forgetting only it would free, Shared is needed by others as well.
type BackupSpace struct {
	Backup Backup
	Unique int64
	Shared int64
}

// Space measures a repository. It reads the top level of each backup's index and every distinct segment once; see
// references for the memory. Ten million chunks take 200 MB. Corrupt if a backup refers to something that is not there.
func (r *Repository) Space(ctx context.Context) (Space, error) {
	backups, err := r.Backups(ctx, Filter{})
	if err != nil {
		return Space{}, err
	}
	from := viewOf{r.kopia, r.kopia.ContentReader().(objectReader)}
	all, err := r.loadSnapshots(ctx, from)
	if err != nil {
		return Space{}, err
	}
	number := map[string]int{} // of backups by id; the others come after them
	for i, b := range backups {
		number[b.ID] = i
	}
	refs, err := r.refer(ctx, from, all, func(n int) int {
		if i, ok := number[all[n].labels[idLabel]]; ok && all[n].labels[descriptionLabel] != "" {
			return i
		}
		return len(backups)
	})
	if err != nil {
		return Space{}, err
	}
	s := Space{Remote: r.remote}
	volumes := volumesOf(backups)
	bySet := make([]int64, len(refs.sets.bits))
	for _, c := range refs.table.slots {
		bySet[c.set] += int64(c.length)
	}
	s.Reclaimable = bySet[0]
	for set, stored := range bySet[1:] {
		s.add(refs.sets, setID(set+1), stored, backups, volumes)
	}
	for _, v := range volumes {
		s.Volumes = append(s.Volumes, *v.space)
	}
	slices.SortFunc(s.Volumes, func(a, b VolumeSpace) int { return cmp.Compare(a.Volume.String(), b.Volume.String()) })
	err = from.IterateContents(ctx, content.IterateOptions{Range: index.PrefixRange(manifest.ContentPrefix)}, func(c content.Info) error {
		s.Manifests += int64(c.PackedLength)
		return nil
	})
	if err != nil {
		return Space{}, r.corrupt(err)
	}
	err = r.kopia.BlobReader().ListBlobs(ctx, "", func(m blob.Metadata) error {
		s.Medium += m.Length
		return nil
	})
	return s, r.at.fault("listing", err)
}

// tally is where a backup's numbers go.
type tally struct {
	space *VolumeSpace
	at    map[int]int // of a backup's number, its place in the volume's backups
}

func volumesOf(backups []Backup) map[adapters.VolumeID]*tally {
	all := map[adapters.VolumeID]*tally{}
	for n, b := range backups {
		v := all[b.Volume]
		if v == nil {
			v = &tally{&VolumeSpace{Volume: b.Volume}, map[int]int{}}
			all[b.Volume] = v
		}
		v.at[n] = len(v.space.Backups)
		v.space.Logical += b.Size
		v.space.Backups = append(v.space.Backups, BackupSpace{Backup: b})
	}
	return all
}

// add counts bytes that a set of members refers to.
func (s *Space) add(sets *memberSets, set setID, stored int64, backups []Backup, volumes map[adapters.VolumeID]*tally) {
	members := slices.Collect(sets.members(set))
	of := map[adapters.VolumeID]bool{}
	for _, m := range members {
		if m == len(backups) {
			continue
		}
		v := volumes[backups[m].Volume]
		one := &v.space.Backups[v.at[m]]
		if len(members) == 1 {
			one.Unique += stored
		} else {
			one.Shared += stored
		}
		of[backups[m].Volume] = true
	}
	if len(of) == 0 {
		s.Unfinished += stored
		return
	}
	s.Backups += stored
	others := members[len(members)-1] == len(backups)
	for v := range of {
		volumes[v].space.Stored += stored
		if len(of) == 1 && !others {
			volumes[v].space.Unique += stored
		}
	}
}
