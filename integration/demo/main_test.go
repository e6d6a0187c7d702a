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
	if vm.Inside() { // the demo, in the guest that a test asked for
		main()
	}
	os.Exit(m.Run())
}

// The README's first commands, as a test: they prove their claims by themselves.
func TestDemo(t *testing.T) {
	if testing.Short() {
		t.Skip("needs real filesystems: left out by -short, `make test` runs it")
	}
	program := build(t)
	for _, backend := range []string{"reflink", "lvm-thin"} {
		t.Run(backend, func(t *testing.T) {
			var out bytes.Buffer
			code, err := start(t.Context(), &out, backend, program)
			t.Logf("%s", out.Bytes())
			if err != nil || code != 0 {
				t.Fatal(code, err)
			}
			for _, claim := range []string{backend + ":", "frozen for ", "bit-identical", "sound", "one instant", "incremental"} {
				if !strings.Contains(out.String(), claim) {
					t.Errorf("the demo does not show %q", claim)
				}
			}
		})
	}
}

// build builds the programs where `make` puts them, for a guest sees nothing of this machine's temporary files.
func build(t *testing.T) (program string) {
	t.Helper()
	root, err := filepath.Abs(filepath.Join("..", ".."))
	if err == nil {
		err = os.MkdirAll(filepath.Join(root, "bin"), 0o755)
	}
	var bin string
	if err == nil {
		bin, err = os.MkdirTemp(filepath.Join(root, "bin"), "demo-")
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(bin) })
	build := exec.Command("go", "build", "-o", bin+"/", "./cmd/...")
	build.Dir = root
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	return filepath.Join(bin, "stillpoint")
}
