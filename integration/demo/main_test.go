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

// The README's first command, as a test: it proves its claims by itself.
func TestDemo(t *testing.T) {
	if testing.Short() {
		t.Skip("needs real filesystems: left out by -short, `make test` runs it")
	}
	bin := t.TempDir()
	build := exec.Command("go", "build", "-o", bin+"/", "./cmd/...")
	build.Dir = filepath.Join("..", "..")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	var out bytes.Buffer
	code, err := start(t.Context(), &out, "reflink", filepath.Join(bin, "stillpoint"))
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
