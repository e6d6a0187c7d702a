package csi_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// freezerProgram is the freezer, built once for all tests.
var freezerProgram string

func TestMain(m *testing.M) {
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "stillpoint-csi-")
		if err != nil {
			panic(err)
		}
		defer os.RemoveAll(dir)
		freezerProgram = filepath.Join(dir, "stillpoint-freezer")
		if out, err := exec.Command("go", "build", "-o", freezerProgram, "stillpoint.io/stillpoint/cmd/stillpoint-freezer").CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "building the freezer: %v\n%s", err, out)
			return 1
		}
		return m.Run()
	}())
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
