package thinmeta_test

import (
	"context"
	"io"
	"os/exec"
	"testing"

	"stillpoint.io/stillpoint/cbt/thinmeta"
)

// needTools fails a test that wants thin-provisioning-tools and does not find them. A short run must do without.
func needTools(t testing.TB) {
	t.Helper()
	if testing.Short() {
		t.Skip("needs thin-provisioning-tools: left out by -short, `make test` runs it")
	}
	for _, name := range []string{"thin_check", "thin_dump", "thin_delta", "thin_restore"} {
		if _, err := exec.LookPath(name); err != nil {
			t.Fatalf("%v: install thin-provisioning-tools, or run `make test`, which does", err)
		}
	}
}

func open(t testing.TB, path string) *thinmeta.Metadata {
	t.Helper()
	m, err := thinmeta.Open(t.Context(), openFile(t, path))
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func openHeld(t testing.TB, path string, block uint64) *thinmeta.Metadata {
	t.Helper()
	m, err := thinmeta.OpenSnapshot(t.Context(), openFile(t, path), block)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func openFile(t testing.TB, path string) *thinmeta.File {
	t.Helper()
	f, err := thinmeta.OpenFile(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// memory is an image in memory. It counts the blocks that are read.
type memory struct {
	image  []byte
	blocks int
}

func (m *memory) ReadAt(_ context.Context, p []byte, offset int64) (int, error) {
	m.blocks += len(p) / 4096
	if offset >= int64(len(m.image)) {
		return 0, io.EOF
	}
	n := copy(p, m.image[offset:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (m *memory) Size() int64 { return int64(len(m.image)) }
