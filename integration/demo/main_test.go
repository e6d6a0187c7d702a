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
	var out bytes.Buffer
	code, err := start(t.Context(), &out, "reflink", filepath.Join(build(t), "stillpoint"))
	t.Logf("%s", out.Bytes())
	if err != nil || code != 0 {
		t.Fatal(code, err)
	}
	claims(t, out.String())
}

// The same with a thin volume, where there is device-mapper. The demo is a program of its own here: a guest runs it
// itself, which a test with the race detector cannot be.
func TestDemoOnThinVolumes(t *testing.T) {
	if testing.Short() {
		t.Skip("needs device-mapper: left out by -short, `make test` runs it")
	}
	bin := build(t)
	demo := exec.CommandContext(t.Context(), filepath.Join(bin, "demo"), "-backend", "lvm-thin", filepath.Join(bin, "stillpoint"))
	out, err := demo.CombinedOutput()
	t.Logf("%s", out)
	if err != nil {
		t.Fatal(err)
	}
	claims(t, string(out))
}

// claims fails unless the demo has shown everything.
func claims(t *testing.T, out string) {
	t.Helper()
	for _, claim := range []string{"frozen for ", "bit-identical", "sound", "one instant", "incremental"} {
		if !strings.Contains(out, claim) {
			t.Errorf("the demo does not show %q", claim)
		}
	}
}

// build builds the programs, and the demo, into a folder.
func build(t *testing.T) (bin string) {
	t.Helper()
	bin = t.TempDir()
	build := exec.Command("go", "build", "-o", bin+"/", "./cmd/...", "./integration/demo")
	build.Dir = filepath.Join("..", "..")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	return bin
}
