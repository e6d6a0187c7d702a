// Package thinmeta reads the metadata of a device-mapper thin pool (dm-thin, which is LVM's thin provisioning) without
// the kernel's help and without the thin-provisioning-tools: which devices a pool has, what each of them has allocated,
// and what differs between two of them.
//
// # The format
//
// Metadata are blocks of 4 KiB, little-endian, each with a checksum and its own number. Block 0 is the superblock. It
// leads to two btrees: the devices' details (device → how many blocks, when made) and the mappings, a tree of trees
// (device → the root of a tree; block of the device → block of the pool's data device, and the time when it was mapped).
// They are copied on write: a snapshot is a second reference to a device's tree, and what both still share are the same
// blocks. Sources: Documentation/admin-guide/device-mapper/thin-provisioning.rst and persistent-data.rst of Linux,
// drivers/md/dm-thin-metadata.c (superblock, details, mappings), drivers/md/persistent-data/dm-btree-internal.h and
// dm-btree-spine.c (nodes), dm-block-manager.c (checksums), dm-space-map-common.h (space maps).
//
// # The proof
//
// Two devices of one pool that map a block to the same block of data are equal there: the pool never writes in place to
// what is shared. [Metadata.Changed] walks both trees together and passes over each subtree that both refer to, for a
// block of metadata has one content. Its cost follows what changed. What lies at different addresses was written in
// between, perhaps with the same bytes: it counts as changed.
//
// Nothing is mapped where a device was never written to or where it was discarded: that reads as zeros, unless the device
// was set up with an external origin, of which the metadata know nothing. A caller with such devices must not use this.
//
// # What it demands
//
// The metadata must hold still. Those of an active pool do only as a metadata snapshot (the message
// reserve_metadata_snap), opened with [OpenSnapshot]; of such there is one a pool. Both devices must be in it: a snapshot
// of the metadata knows no device that was made later. [Metadata.Held] tells afterwards whether it was still held.
//
// What is read is checked: checksum and number of every block, the order of keys, the depth of trees, that references and
// addresses lie within the metadata and the data. Damage ends a stream with Corrupt, which names the block. What no
// stream had to read, such as shared subtrees, is not checked.
package thinmeta

import (
	"context"
	"encoding/binary"
	"iter"
	"math"

	"stillpoint.io/stillpoint/fault"
)

// Source is where metadata are read from, in whole blocks of 4 KiB, with buffers that are aligned for direct I/O. Both
// methods may be called in parallel. ReadAt is that of io.ReaderAt. Size is in bytes and does not change.
type Source interface {
	ReadAt(ctx context.Context, p []byte, offset int64) (int, error)
	Size() int64
}

// DeviceID is the number of a thin device in its pool (LVM: lvs -o thin_id). The kernel's are below 2^24.
type DeviceID uint64

// Device is what the metadata tell of a thin device: struct disk_device_details.
type Device struct {
	ID          DeviceID
	Mapped      uint64 // blocks, by the kernel's count
	Transaction uint64 // of the pool, when the device was made
	Created     uint32 // the pool's time then
	Snapshotted uint32 // the pool's time when it was last the origin of a snapshot, or became one
}

// Metadata are a pool's metadata at one point in time. Its methods may be called in parallel.
type Metadata struct {
	source     Source
	super      Superblock
	dataBlocks uint64 // the size of the data device, which a metadata snapshot does not tell
}

// Open reads the superblock of metadata that nobody writes to: an image, or the metadata device of an inactive pool.
// Errors: Corrupt if it is damaged or no superblock, Unsupported if it is of an unknown version.
func Open(ctx context.Context, source Source) (*Metadata, error) {
	super, err := readSuperblock(ctx, source, 0)
	if err != nil {
		return nil, err
	}
	return &Metadata{source: source, super: super, dataBlocks: super.Data.Blocks}, nil
}

// OpenSnapshot opens the metadata snapshot at a block, which `dmsetup status` of the pool tells. Errors: those of Open;
// NotFound if the superblock does not refer to a metadata snapshot there.
func OpenSnapshot(ctx context.Context, source Source, block uint64) (*Metadata, error) {
	live, err := readSuperblock(ctx, source, 0)
	if err != nil {
		return nil, err
	}
	switch {
	case live.Snapshot == 0:
		return nil, fault.Errorf(fault.NotFound, "the pool has no metadata snapshot: reserve one with `dmsetup message POOL 0 reserve_metadata_snap`")
	case live.Snapshot != block:
		return nil, fault.Errorf(fault.NotFound, "the pool's metadata snapshot is not at block %d but at %d: it was released and reserved anew", block, live.Snapshot)
	}
	super, err := readSuperblock(ctx, source, block)
	if err != nil {
		return nil, err
	}
	return &Metadata{source: source, super: super, dataBlocks: live.Data.Blocks}, nil
}

// readSuperblock reads a superblock, again if it makes no sense: an active pool may be writing it at this moment.
func readSuperblock(ctx context.Context, source Source, block uint64) (s Superblock, err error) {
	page := aligned(blockSize)
	for range 3 {
		if err := readBlocks(ctx, source, page, block); err != nil {
			return Superblock{}, err
		}
		if s, err = parseSuperblock(page, block); err == nil {
			break
		}
	}
	return s, err
}

// Superblock returns what the superblock says.
func (m *Metadata) Superblock() Superblock { return m.super }

// Held fails with Busy if these metadata were opened as a metadata snapshot which the pool no longer holds: what was read
// in the meantime may be wrong. One that was released and reserved anew at the same block, with nothing changed in
// between that its superblock shows, passes: whoever reserves and releases must keep others from doing so.
func (m *Metadata) Held(ctx context.Context) error {
	if m.super.Block == 0 {
		return nil
	}
	live, err := readSuperblock(ctx, m.source, 0)
	if err != nil {
		return err
	}
	held, err := readSuperblock(ctx, m.source, m.super.Block)
	if err != nil || live.Snapshot != m.super.Block || held != m.super {
		return fault.Errorf(fault.Busy, "the metadata snapshot at block %d was released while it was read: reserve a new one and read again", m.super.Block)
	}
	return nil
}

// Devices lists the pool's devices by number. It can be ranged over again.
func (m *Metadata) Devices(ctx context.Context) iter.Seq2[Device, error] {
	return func(yield func(Device, error) bool) {
		c, err := m.newCursor(ctx, m.super.detailsRoot, detailsSize, 0)
		if err == nil {
			err = c.enter()
		}
		for ; err == nil && c.open(); err = c.enter() {
			d := c.top()
			if !yield(parseDevice(d.key(d.position), d.details(d.position)), nil) {
				return
			}
			c.next()
		}
		if err != nil {
			yield(Device{}, err)
		}
	}
}

func parseDevice(id uint64, b []byte) Device {
	le := binary.LittleEndian
	return Device{ID: DeviceID(id), Mapped: le.Uint64(b), Transaction: le.Uint64(b[8:]), Created: le.Uint32(b[16:]), Snapshotted: le.Uint32(b[20:])}
}

// Device returns one device, or NotFound.
func (m *Metadata) Device(ctx context.Context, id DeviceID) (Device, error) {
	d, err := m.find(ctx, m.super.detailsRoot, detailsSize, id)
	if err != nil {
		return Device{}, err
	}
	return parseDevice(uint64(id), d.details(d.position)), nil
}

// tree returns the root of a device's mappings, or NotFound.
func (m *Metadata) tree(ctx context.Context, id DeviceID) (uint64, error) {
	d, err := m.find(ctx, m.super.mappingRoot, rootSize, id)
	if err != nil {
		return 0, err
	}
	return d.word(d.position), nil
}

// find returns the leaf of a tree of devices that stands at a device, or NotFound.
func (m *Metadata) find(ctx context.Context, at uint64, valueSize int, id DeviceID) (*node, error) {
	c, err := m.newCursor(ctx, at, valueSize, uint64(id))
	if err != nil {
		return nil, err
	}
	if err := c.enter(); err != nil {
		return nil, err
	}
	if !c.open() || c.key() != uint64(id) {
		return nil, fault.Errorf(fault.NotFound, "the pool's metadata have no thin device %d", id)
	}
	return c.top(), nil
}

// End returns where what a device has mapped ends, in bytes from its start: 0 if it has nothing. The device may be larger
// or smaller than that. Errors: NotFound, Corrupt.
func (m *Metadata) End(ctx context.Context, id DeviceID) (int64, error) {
	at, err := m.tree(ctx, id)
	if err != nil {
		return 0, err
	}
	c, err := m.newCursor(ctx, at, mappingSize, 0)
	if err != nil {
		return 0, err
	}
	d, err := c.rightmost()
	if err != nil {
		return 0, err
	}
	if d.n == 0 {
		return 0, nil
	}
	last := d.key(d.n - 1)
	if last >= uint64(math.MaxInt64/m.super.BlockSize) {
		return 0, corrupt(d.block, "it maps block %d of a device, which lies too far to exist", last)
	}
	return (int64(last) + 1) * m.super.BlockSize, nil
}
