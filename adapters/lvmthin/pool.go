package lvmthin

import (
	"fmt"
	"strconv"
	"strings"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

// poolRef is a thin pool: its name for people, and the device that carries it.
type poolRef struct {
	name string // VG/POOL
	uuid string // of device-mapper
}

// poolOf is the pool of a thin volume.
func (g *group) poolOf(l *logical) (poolRef, *logical, error) {
	p := g.logical[l.pool]
	if p == nil || p.kind != thinPool {
		return poolRef{}, nil, fault.Errorf(fault.Unsupported, "its pool %q is not a thin pool that LVM shows", l.pool)
	}
	return poolRef{name: g.name + "/" + p.name, uuid: mapperUUID(g.id, p.id, "tpool")}, p, nil
}

// poolStatus is what the kernel tells of an active thin pool: "Status" in
// Documentation/admin-guide/device-mapper/thin-provisioning.rst.
type poolStatus struct {
	failed      bool
	transaction uint64
	metadata    space  // in blocks of 4 KiB
	data        space  // in chunks
	held        uint64 // block of the metadata snapshot, 0 if none is reserved
	mode        string // rw, ro, out_of_data_space
	needsCheck  bool
}

type space struct{ used, total uint64 }

// percent is how much is used, rounded up.
func (s space) percent() int {
	if s.total == 0 {
		return 100
	}
	return int((s.used*100 + s.total - 1) / s.total)
}

func (s space) free() uint64 { return s.total - min(s.used, s.total) }

// parsePool reads the status line of a pool.
func parsePool(line string) (poolStatus, error) {
	words := strings.Fields(line)
	if len(words) == 1 && (words[0] == "Fail" || words[0] == "Error") {
		return poolStatus{failed: true}, nil
	}
	bad := fault.Errorf(fault.Unsupported, "the status of a thin pool is %q, which this version does not know", line)
	if len(words) < 7 {
		return poolStatus{}, bad
	}
	var p poolStatus
	var err error
	if p.transaction, err = strconv.ParseUint(words[0], 10, 64); err != nil {
		return poolStatus{}, bad
	}
	for i, s := range []*space{&p.metadata, &p.data} {
		if n, err := fmt.Sscanf(words[1+i], "%d/%d", &s.used, &s.total); n != 2 || err != nil {
			return poolStatus{}, bad
		}
	}
	if words[3] != "-" {
		if p.held, err = strconv.ParseUint(words[3], 10, 64); err != nil {
			return poolStatus{}, bad
		}
	}
	p.mode = words[4]
	for _, w := range words[5:] {
		p.needsCheck = p.needsCheck || w == "needs_check"
	}
	return p, nil
}

// limits say how full a pool may be, in percent.
type limits struct{ data, metadata int }

func (l limits) check() error {
	for name, n := range map[string]int{"data-limit": l.data, "metadata-limit": l.metadata} {
		if n < 1 || n > 100 {
			return fmt.Errorf("%s: %d is not from 1 to 100", name, n)
		}
	}
	return nil
}

// usable decides whether a pool works at all.
func (p poolStatus) usable(pool poolRef) error {
	switch {
	case p.failed:
		return fault.Errorf(fault.Corrupt, "thin pool %s has failed: see the kernel's log, deactivate it and run lvconvert --repair %s", pool.name, pool.name)
	case p.needsCheck:
		return fault.Errorf(fault.Corrupt, "thin pool %s needs a check (an error of its metadata): deactivate it and run lvconvert --repair %s", pool.name, pool.name)
	case p.mode == "ro":
		return fault.Errorf(fault.Unsupported, "thin pool %s is read-only, because its metadata space ran out or an error occurred (%s of metadata used): extend it with lvextend --poolmetadatasize, and see the kernel's log", pool.name, p.metadata)
	case p.mode == "out_of_data_space":
		return fault.Errorf(fault.Exhausted, "thin pool %s is out of data space (%s used): extend it with lvextend, or remove snapshots", pool.name, p.data)
	case p.mode != "rw":
		return fault.Errorf(fault.Unsupported, "thin pool %s is in the mode %q, which this version does not know", pool.name, p.mode)
	}
	return nil
}

// room decides whether a pool may be made fuller.
func (p poolStatus) room(pool poolRef, l limits) error {
	if err := p.usable(pool); err != nil {
		return err
	}
	if used := p.data.percent(); used >= l.data {
		return fault.Errorf(fault.Exhausted, "thin pool %s: %s of data space used, and data-limit is %d %%: extend it with lvextend, or remove snapshots", pool.name, p.data, l.data)
	}
	if used := p.metadata.percent(); used >= l.metadata {
		return fault.Errorf(fault.Exhausted, "thin pool %s: %s of metadata space used, and metadata-limit is %d %%: extend it with lvextend --poolmetadatasize, or remove snapshots", pool.name, p.metadata, l.metadata)
	}
	if least := metadataReserve(p.metadata.total); p.metadata.free() <= least {
		return fault.Errorf(fault.Exhausted, "thin pool %s: %d blocks of metadata are free (%s used), and LVM and the kernel want more than %d before they make anything new: extend it with lvextend --poolmetadatasize",
			pool.name, p.metadata.free(), p.metadata, least)
	}
	return nil
}

// metadataReserve is how many blocks of metadata LVM keeps free: the lesser of 25 % and 4 MiB
// (pool_metadata_min_threshold in lvm2's lib/metadata/thin_manip.c; calc_metadata_threshold in drivers/md/dm-thin.c has
// the same).
func metadataReserve(total uint64) uint64 { return min(total/4, 4<<20/4096) }

// String is the numbers and the percentage.
func (s space) String() string { return fmt.Sprintf("%d of %d (%d %%)", s.used, s.total, s.percent()) }

// poolStatus asks the kernel. A pool that is not active is Unavailable.
func (m mapper) poolStatus(pool poolRef) (poolStatus, error) {
	line, err := m.status(pool.uuid)
	if err != nil {
		return poolStatus{}, inactive(err, pool)
	}
	return parsePool(line)
}

// poolMetadata is the number of the device that holds a pool's metadata, from its table: "metadata data chunk …".
func (m mapper) poolMetadata(pool poolRef) (adapters.Device, error) {
	line, err := m.table(pool.uuid)
	if err != nil {
		return 0, inactive(err, pool)
	}
	if words := strings.Fields(line); len(words) > 2 {
		if d, ok := parseNumbers(words[0]); ok {
			return d, nil
		}
	}
	return 0, fault.Errorf(fault.Unsupported, "the table of thin pool %s is %q, which this version does not know", pool.name, line)
}
