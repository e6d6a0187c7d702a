// Package thin holds the tests over LVM's thin volumes: cuts of them, and the freezer's own tests with every filesystem
// on one. All run where there is device-mapper (package vm), and once more with its newer kernel: a snapshot under our
// freeze works on the one and fails on the other.
package thin

import (
	"os"
	"testing"

	"stillpoint.io/stillpoint/integration/lab"
	"stillpoint.io/stillpoint/integration/vm"
)

func TestMain(m *testing.M) {
	if os.Getenv(envVictim) != "" {
		victim()
		return
	}
	os.Exit(vm.Main(m, vm.Config{
		Memory:   2 << 30,
		Disks:    []int64{12 << 30},
		Modules:  []string{"fuse", "overlay", "f2fs"},
		Programs: []string{"stillpoint.io/stillpoint/cmd/stillpoint-freezer"},
		Tests:    []string{"stillpoint.io/stillpoint/agent/freezer"},
	}))
}

const group = "stillpoint-thin-test"

// thinPool makes the pool of a test, on the one disk.
func thinPool(t *testing.T) lab.ThinPool {
	t.Helper()
	p, err := lab.MakeThinPool(t.Context(), group, vm.Disks()[0])
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	return p
}
