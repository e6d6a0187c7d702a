package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"stillpoint.io/stillpoint/integration/vm"
)

func TestMain(m *testing.M) {
	vm.Init()
	os.Exit(m.Run())
}

// The README's first command, as a test: it proves its claims by itself. (The demo on lvm-thin is by hand: a test program with
// the race detector cannot be what runs in a guest, and package integration/thin tests what it shows.)
func TestDemo(t *testing.T) {
	if testing.Short() {
		t.Skip("needs real filesystems: left out by -short, `make test` runs it")
	}
	var out bytes.Buffer
	code, err := start(t.Context(), &out, "reflink", build(t))
	t.Logf("%s", out.Bytes())
	if err != nil || code != 0 {
		t.Fatal(code, err)
	}
	for _, claim := range []string{"frozen for ", "bit-identical", "sound", "one instant", "incremental"} {
		if !strings.Contains(out.String(), claim) {
			t.Errorf("the demo does not show %q", claim)
		}
	}
}

// build builds the programs.
func build(t *testing.T) (program string) {
	t.Helper()
	bin := t.TempDir()
	build := exec.Command("go", "build", "-o", bin+"/", "./cmd/...")
	build.Dir = filepath.Join("..", "..")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	return filepath.Join(bin, "stillpoint")
}
