package thinmeta

import (
	"encoding/binary"
	"hash/crc32"

	"stillpoint.io/stillpoint/fault"
)

const (
	// blockSize is the size of a metadata block in bytes (THIN_METADATA_BLOCK_SIZE).
	blockSize = 4096
	magic     = 27022010

	superblockSalt = 160774 // SUPERBLOCK_CSUM_XOR in dm-thin-metadata.c
	nodeSalt       = 121107 // BTREE_CSUM_XOR in dm-btree-spine.c
)

// Superblock is the root of the metadata: struct thin_disk_superblock. That of a metadata snapshot is a copy in which
// the spaces are zero.
type Superblock struct {
	Block       uint64 // where it lies: 0, or the block of a metadata snapshot
	Version     uint32 // 1 or 2
	NeedsCheck  bool   // the pool failed: the kernel wants thin_check before it writes to it again
	Time        uint32 // of the last snapshot: a counter, not a clock
	Transaction uint64 // the number that userspace (LVM) counts its changes with
	Snapshot    uint64 // block of the reserved metadata snapshot, 0 if there is none
	BlockSize   int64  // of the pool's data, bytes: a multiple of 64 KiB up to 1 GiB
	Data        Space
	Metadata    Space
	mappingRoot uint64
	detailsRoot uint64
}

// Space is the root of a space map, struct disk_sm_root: how many blocks there are and how many are in use.
type Space struct {
	Blocks, Used uint64
	Bitmaps      uint64 // block of the index of bitmaps, which count up to 2
	Counts       uint64 // root of the btree of greater counts
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// checksum is dm_bm_checksum of a block: CRC-32C of all behind the checksum itself, without the final inversion, xored
// with a salt that differs by kind of block.
func checksum(page []byte, salt uint32) uint32 {
	return ^crc32.Checksum(page[4:blockSize], castagnoli) ^ salt
}

func parseSuperblock(page []byte, block uint64) (Superblock, error) {
	le := binary.LittleEndian
	wrong := func(format string, args ...any) (Superblock, error) {
		return Superblock{}, corrupt(block, format, args...)
	}
	if le.Uint64(page[32:]) != magic {
		return wrong("it is not a superblock of dm-thin metadata: its magic number is %d, not %d", le.Uint64(page[32:]), magic)
	}
	if got, want := checksum(page, superblockSalt), le.Uint32(page); got != want {
		return wrong("the superblock's checksum is %#x, but its content gives %#x", want, got)
	}
	if at := le.Uint64(page[8:]); at != block {
		return wrong("the superblock says that it lies at block %d", at)
	}
	s := Superblock{
		Block:       block,
		Version:     le.Uint32(page[40:]),
		NeedsCheck:  le.Uint32(page[4:])&1 != 0, // THIN_METADATA_NEEDS_CHECK_FLAG
		Time:        le.Uint32(page[44:]),
		Transaction: le.Uint64(page[48:]),
		Snapshot:    le.Uint64(page[56:]),
		Data:        parseSpace(page[64:]),
		Metadata:    parseSpace(page[192:]),
		mappingRoot: le.Uint64(page[320:]),
		detailsRoot: le.Uint64(page[328:]),
	}
	if s.Version < 1 || s.Version > 2 {
		return Superblock{}, fault.Errorf(fault.Unsupported, "dm-thin metadata of version %d: versions 1 and 2 are known", s.Version)
	}
	if incompatible := le.Uint32(page[360:]); incompatible != 0 {
		return Superblock{}, fault.Errorf(fault.Unsupported, "dm-thin metadata with features %#x that must be understood and are not", incompatible)
	}
	sectors := le.Uint32(page[336:])
	if sectors == 0 || sectors%128 != 0 || sectors > 1<<21 {
		return wrong("the pool's block size is %d sectors, not a multiple of 128 up to 2097152", sectors)
	}
	s.BlockSize = int64(sectors) * 512
	if metadata := le.Uint32(page[340:]); metadata != blockSize/512 {
		return wrong("the metadata's block size is %d sectors, not %d", metadata, blockSize/512)
	}
	for _, space := range []Space{s.Data, s.Metadata} {
		if space.Used > space.Blocks {
			return wrong("a space map counts %d used blocks of %d", space.Used, space.Blocks)
		}
	}
	return s, nil
}

func parseSpace(b []byte) Space {
	le := binary.LittleEndian
	return Space{Blocks: le.Uint64(b), Used: le.Uint64(b[8:]), Bitmaps: le.Uint64(b[16:]), Counts: le.Uint64(b[24:])}
}

// corrupt is an error about a metadata block.
func corrupt(block uint64, format string, args ...any) error {
	return fault.Errorf(fault.Corrupt, "metadata block %d: "+format+"; check the pool with thin_check", append([]any{block}, args...)...)
}
