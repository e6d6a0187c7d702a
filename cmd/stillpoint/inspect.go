package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"stillpoint.io/stillpoint/cbt/thinmeta"
	"stillpoint.io/stillpoint/fault"
)

func (a *app) inspectCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "inspect",
		Short: "Look into what other systems write on disks",
		Args:  cobra.ArbitraryArgs,
		RunE:  subcommand,
	}
	c.AddCommand(a.inspectThinCommand())
	return c
}

// thinQuestion is what is asked of a thin pool's metadata.
type thinQuestion struct {
	delta, mappings string
	snapshot        bool
}

func (a *app) inspectThinCommand() *cobra.Command {
	var q thinQuestion
	c := &cobra.Command{
		Use:   "thin-metadata FILE",
		Short: "Show the metadata of a thin pool, or what differs between two of its devices",
		Long: `Show the superblock and the devices of a device-mapper thin pool's metadata. FILE is an image of them, or the metadata
device of a pool (LVM: VG-POOL_tmeta). Those of an active pool hold still only in a metadata snapshot, reserved with
dmsetup message POOL 0 reserve_metadata_snap: read it with --metadata-snapshot. Exit code 4 says that it was released
meanwhile, 6 that something is damaged.

--delta prints the extents that differ between two devices, given by their numbers (LVM: lvs -o thin_id), as the
command diff does, up to the end of what either has mapped; the devices' sizes are not in the metadata. --mappings
prints where the blocks of one device lie on the pool's data device, counted in blocks.`,
		Args: arguments(1, 1, "one file or device"),
		RunE: func(c *cobra.Command, args []string) error {
			return a.inspectThin(c.Context(), args[0], q)
		},
	}
	c.Flags().StringVar(&q.delta, "delta", "", "print what differs between two devices, `BASE-ID,TARGET-ID`")
	c.Flags().StringVar(&q.mappings, "mappings", "", "print the mappings of the device `ID`")
	c.Flags().BoolVar(&q.snapshot, "metadata-snapshot", false, "read the reserved metadata snapshot")
	return a.jsonFlag(c)
}

func (a *app) inspectThin(ctx context.Context, path string, q thinQuestion) error {
	if q.delta != "" && q.mappings != "" {
		return fault.Errorf(fault.Invalid, "--delta and --mappings are two questions: not both at once")
	}
	f, err := thinmeta.OpenFile(path)
	if err != nil {
		return err
	}
	defer f.Close()
	m, err := thinmeta.Open(ctx, f)
	if err == nil && q.snapshot {
		m, err = thinmeta.OpenSnapshot(ctx, f, m.Superblock().Snapshot)
	}
	if err != nil {
		return err
	}
	switch {
	case q.delta != "":
		err = a.thinDelta(ctx, m, q.delta)
	case q.mappings != "":
		err = a.thinMappings(ctx, m, q.mappings)
	default:
		err = a.thinSummary(ctx, m)
	}
	if held := m.Held(ctx); err == nil || errors.Is(held, fault.Busy) {
		return held // which explains any damage
	}
	return err
}

// thinDelta prints what differs between two devices.
func (a *app) thinDelta(ctx context.Context, m *thinmeta.Metadata, pair string) error {
	base, target, ok := strings.Cut(pair, ",")
	if !ok {
		return fault.Errorf(fault.Invalid, "--delta wants two numbers of devices, BASE-ID,TARGET-ID, not %q", pair)
	}
	var volumes [2]thinmeta.Volume
	for i, s := range []string{base, target} {
		id, err := thinID("--delta", s)
		if err != nil {
			return err
		}
		end, err := m.End(ctx, id)
		if err != nil {
			return err
		}
		volumes[i] = thinmeta.Volume{ID: id, Size: end}
	}
	size := max(volumes[0].Size, volumes[1].Size)
	volumes[0].Size, volumes[1].Size = size, size
	delta, err := m.Changed(ctx, volumes[0], volumes[1], 0)
	if err != nil {
		return err
	}
	total, err := a.printExtents(delta)
	if err != nil || a.json {
		return err
	}
	a.say("\nchanged: %v in %d extents, and %v zero in %d (%s, granularity %v)", bytesize(total.data), total.dataExtents,
		bytesize(total.zero), total.zeroExtents, delta.Confidence, bytesize(delta.Granularity))
	return nil
}

func thinID(flag, s string) (thinmeta.DeviceID, error) {
	id, err := strconv.ParseUint(s, 10, 64)
	if err != nil {
		return 0, fault.Errorf(fault.Invalid, "%s: %q is no number of a thin device", flag, s)
	}
	return thinmeta.DeviceID(id), nil
}

// thinMappings prints where a device's blocks lie.
func (a *app) thinMappings(ctx context.Context, m *thinmeta.Metadata, device string) error {
	id, err := thinID("--mappings", device)
	if err == nil {
		_, err = m.End(ctx, id) // is there such a device?
	}
	if err != nil {
		return err
	}
	out := bufio.NewWriter(a.stdout)
	format := `{"block":%d,"dataBlock":%d,"length":%d,"time":%d}` + "\n"
	if !a.json {
		format = "%14d %14d %14d %10d\n"
		fmt.Fprintf(out, "%14s %14s %14s %10s\n", "BLOCK", "DATA BLOCK", "LENGTH", "TIME")
	}
	for x, err := range m.Mappings(ctx, id) {
		if err == nil {
			_, err = fmt.Fprintf(out, format, x.Block, x.Data, x.Length, x.Time)
		}
		if err != nil {
			return errors.Join(out.Flush(), err)
		}
	}
	return out.Flush()
}

// thinSummary prints the superblock and the devices.
func (a *app) thinSummary(ctx context.Context, m *thinmeta.Metadata) error {
	s := m.Superblock()
	row, flush := func(...any) {}, func() error { return nil }
	if a.json {
		if err := a.printJSON(thinSuperblock(s)); err != nil {
			return err
		}
	} else {
		a.say("superblock at block %d: version %d, transaction %d, time %d, blocks of %v", s.Block, s.Version, s.Transaction, s.Time, bytesize(s.BlockSize))
		if s.Block == 0 {
			a.say("data: %d of %d blocks used; metadata: %d of %d", s.Data.Used, s.Data.Blocks, s.Metadata.Used, s.Metadata.Blocks)
		}
		if s.Snapshot != 0 {
			a.say("metadata snapshot at block %d", s.Snapshot)
		}
		if s.NeedsCheck {
			a.say("the pool failed and needs a check: thin_check")
		}
		a.say("")
		row, flush = a.table("DEVICE", "MAPPED", "TRANSACTION", "CREATED", "SNAPSHOTTED")
	}
	for d, err := range m.Devices(ctx) {
		if err == nil && a.json {
			err = a.printJSON(struct {
				Device       thinmeta.DeviceID `json:"device"`
				MappedBlocks uint64            `json:"mappedBlocks"`
				Transaction  uint64            `json:"transaction"`
				Created      uint32            `json:"createdTime"`
				Snapshotted  uint32            `json:"snapshottedTime"`
			}{d.ID, d.Mapped, d.Transaction, d.Created, d.Snapshotted})
		}
		if err != nil {
			return errors.Join(flush(), err)
		}
		row(d.ID, thinSize(d.Mapped, s.BlockSize), d.Transaction, d.Created, d.Snapshotted)
	}
	return flush()
}

// thinSize is a number of blocks as people read it. What is too large to be true stays a number.
func thinSize(blocks uint64, blockSize int64) any {
	if blocks > uint64(1<<62/blockSize) {
		return blocks
	}
	return bytesize(int64(blocks) * blockSize)
}

// thinSuperblock is a superblock in JSON. Of a metadata snapshot the counts of blocks are not known: they are 0.
func thinSuperblock(s thinmeta.Superblock) any {
	return struct {
		Superblock       uint64 `json:"superblock"`
		Version          uint32 `json:"version"`
		Transaction      uint64 `json:"transaction"`
		Time             uint32 `json:"time"`
		BlockSize        int64  `json:"blockSize"`
		DataBlocks       uint64 `json:"dataBlocks"`
		DataUsed         uint64 `json:"dataBlocksUsed"`
		MetadataBlocks   uint64 `json:"metadataBlocks"`
		MetadataUsed     uint64 `json:"metadataBlocksUsed"`
		MetadataSnapshot uint64 `json:"metadataSnapshot,omitempty"`
		NeedsCheck       bool   `json:"needsCheck"`
	}{s.Block, s.Version, s.Transaction, s.Time, s.BlockSize, s.Data.Blocks, s.Data.Used, s.Metadata.Blocks, s.Metadata.Used, s.Snapshot, s.NeedsCheck}
}
