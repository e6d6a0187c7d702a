package main

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"stillpoint.io/stillpoint/cbt"
	"stillpoint.io/stillpoint/cbt/thinmeta/thinmetatest"
)

func TestInspectThinMetadata(t *testing.T) {
	environment(t, t.TempDir())
	p := thinmetatest.New(thinmetatest.Options{BlockSize: 128 << 10, DataBlocks: 1000})
	p.Create(1)
	p.Fill(1, 0, 100, thinmetatest.MaxCapacity)
	p.Snapshot(2, 1)
	p.Write(1, 7)
	p.Discard(1, 99)
	path := filepath.Join(t.TempDir(), "image")
	write := func() []byte {
		image, err := p.Image()
		if err == nil {
			err = os.WriteFile(path, image, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
		return image
	}
	write()

	if out := must(t, "inspect", "thin-metadata", path); !strings.Contains(out, "blocks of 128.0 KiB") || !strings.Contains(out, "12.4 MiB") {
		t.Error(out)
	}
	type line struct {
		Superblock             *uint64
		BlockSize              int64
		Device, MappedBlocks   uint64
		Offset, Length         int64
		Zero                   bool
		Block, DataBlock, Time uint64
	}
	if all := decode[line](t, must(t, "inspect", "thin-metadata", path, "--json")); len(all) != 3 || all[0].Superblock == nil || all[0].BlockSize != 128<<10 ||
		all[1].Device != 1 || all[1].MappedBlocks != 99 || all[2].Device != 2 || all[2].MappedBlocks != 100 {
		t.Errorf("%+v", all)
	}
	var delta []cbt.Extent
	for _, x := range decode[line](t, must(t, "inspect", "thin-metadata", path, "--delta", "2,1", "--json")) {
		delta = append(delta, cbt.Extent{Offset: x.Offset, Length: x.Length, Zero: x.Zero})
	}
	if want := []cbt.Extent{{Offset: 7 << 17, Length: 1 << 17}, {Offset: 99 << 17, Length: 1 << 17, Zero: true}}; !slices.Equal(delta, want) {
		t.Errorf("%v, not %v", delta, want)
	}
	if out := must(t, "inspect", "thin-metadata", path, "--delta", "2,1"); !strings.Contains(out, "changed: 128.0 KiB in 1 extents, and 128.0 KiB zero in 1") {
		t.Error(out)
	}
	if all := decode[line](t, must(t, "inspect", "thin-metadata", path, "--mappings", "1", "--json")); len(all) != 3 || all[1] != (line{Block: 7, DataBlock: 100, Length: 1, Time: 1}) {
		t.Errorf("%+v", all)
	}
	if out := must(t, "inspect", "thin-metadata", path, "--mappings", "1"); len(strings.Split(out, "\n")) != 5 {
		t.Error(out)
	}

	refuses(t, 3, []string{"no metadata snapshot"}, "inspect", "thin-metadata", path, "--metadata-snapshot")
	p.Reserve()
	p.Create(3)
	image := write()
	if all := decode[line](t, must(t, "inspect", "thin-metadata", path, "--json", "--metadata-snapshot")); len(all) != 3 || *all[0].Superblock == 0 {
		t.Errorf("%+v", all)
	}
	for _, c := range []struct {
		code  int
		words []string
		args  []string
	}{
		{3, []string{"thin device 3"}, []string{path, "--metadata-snapshot", "--delta", "1,3"}},
		{3, []string{"thin device 9"}, []string{path, "--mappings", "9"}},
		{2, []string{"BASE-ID,TARGET-ID"}, []string{path, "--delta", "1"}},
		{2, []string{"vol"}, []string{path, "--delta", "1,vol"}},
		{2, []string{"not both"}, []string{path, "--delta", "1,2", "--mappings", "1"}},
		{2, []string{"one file"}, nil},
		{2, []string{"neither"}, []string{filepath.Dir(path)}},
		{3, []string{"no such file"}, []string{path + "x"}},
	} {
		refuses(t, c.code, c.words, append([]string{"inspect", "thin-metadata"}, c.args...)...)
	}
	image[100]++
	if err := os.WriteFile(path, image, 0o600); err != nil {
		t.Fatal(err)
	}
	refuses(t, 6, []string{"metadata block 0", "checksum", "thin_check"}, "inspect", "thin-metadata", path)
}
