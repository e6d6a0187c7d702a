package main

import (
	"context"
	"os"

	"github.com/spf13/cobra"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/cbt"
	"stillpoint.io/stillpoint/fault"
)

func (a *app) diffCommand() *cobra.Command {
	var base, pngPath string
	c := &cobra.Command{
		Use:   "diff [--base HANDLE] HANDLE",
		Short: "Show the changed extents between two snapshots, or the allocated ones of one",
		Long: `Show the extents that differ between the snapshot --base and another of the same volume; without a base, those
that the snapshot holds. Only metadata is read. --json prints one object a line: {"offset":N,"length":N,"zero":bool}.
--png draws the volume as a grid: white unallocated, grey allocated, orange changed, blue zeroed.`,
		Args: arguments(1, 1, "one snapshot"),
		RunE: func(c *cobra.Command, args []string) error {
			return a.diff(c.Context(), base, args[0], pngPath)
		},
	}
	c.Flags().StringVar(&base, "base", "", "the older `snapshot`")
	c.Flags().StringVar(&pngPath, "png", "", "draw the volume into a PNG `file`")
	return a.jsonFlag(c)
}

func (a *app) diff(ctx context.Context, base, target, pngPath string) error {
	adapter, id, err := a.snapshot(ctx, target)
	if err != nil {
		return err
	}
	differ, ok := adapters.As[adapters.Differ](adapter)
	if !ok {
		return fault.Errorf(fault.Unsupported, "the backend %q does not tell changed blocks", id.Volume.Backend)
	}
	whole, err := differ.Allocated(ctx, id, 0)
	if err != nil {
		return err
	}
	delta := whole
	if base != "" {
		_, baseID, err := a.snapshot(ctx, base)
		if err != nil {
			return err
		}
		if baseID.Volume != id.Volume {
			return fault.Errorf(fault.Invalid, "%s and %s are of different volumes: changed blocks exist between snapshots of one", base, target)
		}
		if delta, err = differ.Changed(ctx, baseID, id, 0); err != nil {
			return err
		}
	}
	const columns, rows, textColumns, textRows = 128, 64, 64, 8
	fine, coarse := newPicture(delta.TargetSize, columns*rows), newPicture(delta.TargetSize, textColumns*textRows)
	if base != "" {
		for e, err := range whole.Extents {
			if err != nil {
				return err
			}
			fine.add(e, allocated)
			coarse.add(e, allocated)
		}
	}
	total, err := a.printExtents(delta, fine, coarse)
	if err != nil {
		return err
	}
	if !a.json {
		what := "allocated"
		if base != "" {
			what = "changed"
		}
		a.say("")
		a.say("%s", coarse.text(textColumns))
		a.say("%s: %v of %v in %d extents, and %v zero in %d (%s, granularity %v)", what, bytesize(total.data), bytesize(delta.TargetSize), total.dataExtents,
			bytesize(total.zero), total.zeroExtents, delta.Confidence, bytesize(delta.Granularity))
	}
	if pngPath == "" {
		return nil
	}
	f, err := os.Create(pngPath)
	if err != nil {
		return fault.Errorf(fault.Invalid, "--png: %w", err)
	}
	if err := fine.png(f, columns); err != nil {
		f.Close()
		return err
	}
	return f.Close()
}

type totals struct {
	data, zero               int64
	dataExtents, zeroExtents int
}

// printExtents prints the extents as they come and draws them into the pictures.
func (a *app) printExtents(delta cbt.Delta, pictures ...*picture) (t totals, err error) {
	out := newExtentPrinter(a)
	for e, err := range cbt.Coalesce(delta.Extents) {
		if err != nil {
			return t, err
		}
		if e.Zero {
			t.zero += e.Length
			t.zeroExtents++
		} else {
			t.data += e.Length
			t.dataExtents++
		}
		for _, p := range pictures {
			p.add(e, changed(e))
		}
		if err := out.print(e); err != nil {
			return t, err
		}
	}
	return t, out.flush()
}
