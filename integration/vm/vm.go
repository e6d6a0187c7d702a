// Package vm runs test binaries, and other programs of ours, where there is device-mapper: in place if the kernel of
// this machine has it, and otherwise in a guest that boots in one to two seconds.
//
// The guest is User-Mode Linux: a kernel that is an ordinary program. Its root is the root of this machine, read-only,
// so every program and library of the machine is there; only /run, /dev/shm, the folder of package lab and the folder of
// temporary files are writable, and they are the guest's own. It has one processor. The binary that asks for the guest
// is also the guest's init: [Init] takes over when it runs as that.
//
//	func TestMain(m *testing.M) { os.Exit(vm.Main(m, vm.Config{Disks: []int64{2 << 30}})) }
//
// STILLPOINT_VM chooses: "here" (no guest), "uml" (the User-Mode Linux that is installed; Debian 12 has kernel 6.1),
// "uml-newer" (kernel 6.12, fetched once into the user's cache), "qemu" (QEMU without KVM, kernel 6.12, two processors;
// slow, fetched likewise). If it is not set, that is "here" where there is device-mapper and "uml" elsewhere.
// STILLPOINT_VM_CONSOLE=1 shows what the guest's kernel says; it is shown in any case when a guest dies.
//
// Nothing outlives the process that asked: a guest is a PID namespace that is killed with it, and its files are removed
// by a shell that waits for its end.
//
// It needs root, and Debian's user-mode-linux.
package vm

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// Config is the guest that a test wants. In place ("here") only Disks, Modules, Programs and Tests have a meaning.
type Config struct {
	Memory   int64    // bytes; 1 GiB if 0. It is taken from /dev/shm as the guest uses it
	Disks    []int64  // sizes in bytes of sparse, empty disks: see [Disks]
	Scratch  int64    // bytes of the sparse XFS for temporary files and labs; 16 GiB if 0
	Modules  []string // of the kernel, beyond those for thin volumes, snapshots and the filesystems
	Programs []string // Go packages to build beforehand: see [Program]. A guest cannot build: Go's cache is read-only in it
	Tests    []string // Go packages whose tests to build beforehand: the Program of agent/cut is "cut.test"
}

// The environment of a program in the guest, or in place.
const (
	envChoice  = "STILLPOINT_VM"
	envConsole = "STILLPOINT_VM_CONSOLE"
	envInside  = "STILLPOINT_VM_INSIDE"
	envDisks   = "STILLPOINT_VM_DISKS"
	envBin     = "STILLPOINT_VM_BIN"
)

// Disks are the devices made for [Config].Disks, in order. They are not emptied between tests.
func Disks() []string { return strings.Fields(os.Getenv(envDisks)) }

// Program is the path of a program built for [Config].Programs, by the last element of its package.
func Program(name string) string { return filepath.Join(os.Getenv(envBin), name) }

// Inside says whether this process has what [Config] asks for: it is in a guest, or was prepared in place.
func Inside() bool { return os.Getenv(envInside) != "" }

// Main runs the tests of a package in a guest, or in place, and returns the exit code for TestMain. The flags of
// `go test` mean what they always do: coverage, profiles and the time limit included. Under -short it runs the tests
// here without disks.
//
// The race detector does not work in User-Mode Linux (its shadow memory lies at 32 TiB, a process there has half a TiB):
// a binary built with it has itself built again without it.
func Main(m interface{ Run() int }, c Config) int {
	Init()
	if !flag.Parsed() {
		flag.Parse()
	}
	if Inside() || testing.Short() {
		return m.Run()
	}
	code, err := runMain(m, c)
	if err != nil {
		fmt.Fprintln(os.Stderr, "vm:", err)
		return max(code, 2)
	}
	return code
}

func runMain(m interface{ Run() int }, c Config) (code int, err error) {
	kind, err := chosen()
	if err != nil {
		return 2, err
	}
	if kind == here {
		p, err := prepare(context.Background(), c)
		if err != nil {
			return 2, err
		}
		defer func() { err = errors.Join(err, p.close()) }()
		for _, kv := range p.env {
			name, value, _ := strings.Cut(kv, "=")
			os.Setenv(name, value)
		}
		return m.Run(), nil
	}
	if withRaceDetector && kind != qemu && testing.CoverMode() != "" {
		return 2, errors.New("coverage of a guest's tests cannot be had together with the race detector: leave one out")
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	go orphaned(ctx, cancel)
	return testBinary(ctx, kind, c, guestFlags(), Command{Stdout: os.Stdout, Stderr: os.Stdout}) // as `go test` has them
}

// orphaned cancels when the parent dies: `go test`, when it is killed, takes nobody with it.
func orphaned(ctx context.Context, cancel context.CancelCauseFunc) {
	parent := os.Getppid()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			if os.Getppid() != parent {
				cancel(errors.New("the process that started the tests is gone"))
				return
			}
		}
	}
}

// Here says whether the test shall go on: it does in a guest, or when prepared in place. Otherwise this one test, at top
// level, is run in a guest of its own, which reports to t, and the answer is false. For packages of which only some
// tests need a guest; their TestMain calls [Init] first. Profiles and coverage do not include the guest.
func Here(t *testing.T, c Config) bool {
	t.Helper()
	if Inside() {
		return true
	}
	if testing.Short() {
		t.Skip("needs device-mapper: left out by -short, `make test` runs it")
	}
	kind, err := chosen()
	if err != nil {
		t.Fatal(err)
	}
	if kind == here {
		p, err := prepare(t.Context(), c)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := p.close(); err != nil {
				t.Error(err)
			}
		})
		for _, kv := range p.env {
			name, value, _ := strings.Cut(kv, "=")
			t.Setenv(name, value)
		}
		return true
	}
	if strings.Contains(t.Name(), "/") {
		t.Fatalf("%s is not at top level: only a whole test runs in a guest", t.Name())
	}
	f := testFlags{args: []string{"-test.v=true", "-test.run=^" + t.Name() + "$"}}
	if end, ok := t.Deadline(); ok {
		f.timeout = time.Until(end)
		f.args = append(f.args, "-test.timeout="+f.timeout.String())
	}
	code, err := testBinary(t.Context(), kind, c, f, Command{Stdout: t.Output(), Stderr: t.Output()})
	switch {
	case err != nil:
		t.Fatal(err)
	case code != 0:
		t.Fatalf("failed in the guest, with exit code %d", code)
	}
	return false
}
