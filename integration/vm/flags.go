package vm

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"strings"
	"testing"
	"time"
)

// testFlags is the command line of a test binary in the guest, and what comes back afterwards.
type testFlags struct {
	args    []string
	timeout time.Duration
	back    []copied
}

// copied is a file or folder in the share, and where it belongs; it need not exist.
type copied struct{ from, to string }

// guestFlags are the flags of this test binary for the guest. The files they name are written to the share.
func guestFlags() testFlags {
	f := testFlags{back: []copied{{"results", "."}}}
	flag.Visit(func(set *flag.Flag) {
		name, value := set.Name, set.Value.String()
		switch name {
		case "test.testlogfile": // for the cache of results, which knows nothing of the guest's kernel
			return
		case "test.timeout":
			f.timeout = set.Value.(flag.Getter).Get().(time.Duration)
		case "test.outputdir":
			f.back[0].to = value
			return
		case "test.gocoverdir":
			value = f.bring("gocoverdir", value)
		case "test.coverprofile", "test.cpuprofile", "test.memprofile", "test.blockprofile", "test.mutexprofile", "test.trace":
			if filepath.IsAbs(value) { // others are below outputdir
				value = f.bring(name, value)
			}
		}
		f.args = append(f.args, "-"+name+"="+value)
	})
	f.args = append(f.args, "-test.outputdir="+guestShare+"/results")
	if flag.NArg() > 0 {
		f.args = append(append(f.args, "--"), flag.Args()...)
	}
	return f
}

func (f *testFlags) bring(name, to string) string {
	f.back = append(f.back, copied{name, to})
	return filepath.Join(guestShare, name)
}

// testBinary runs this test binary in a guest.
func testBinary(ctx context.Context, kind kind, c Config, f testFlags, cmd Command) (code int, err error) {
	m, err := newMachine(ctx, kind, c)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, m.close()) }()
	if m.self == m.folder.share("guest.test") {
		fmt.Fprintln(os.Stderr, "vm: the race detector does not work in User-Mode Linux: these tests run in the guest without it")
	}
	for _, dir := range []string{"results", "gocoverdir"} {
		if err := os.Mkdir(m.folder.share(dir), 0o700); err != nil {
			return 0, err
		}
	}
	if f.timeout > 0 {
		cmd.limit = f.timeout + 10*time.Second // the binary itself panics at the timeout, with all stacks
	}
	cmd.Path, cmd.Args = m.self, f.args
	code, err = m.run(ctx, cmd)
	for _, b := range f.back {
		err = errors.Join(err, copyBack(m.folder.share(b.from), b.to))
	}
	return code, err
}

// copyBack copies a file, or all in a folder, over what is there.
func copyBack(from, to string) error {
	return filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		target := filepath.Join(to, strings.TrimPrefix(path, from))
		if err := os.MkdirAll(filepath.Dir(target), 0o777); err != nil {
			return err
		}
		return os.WriteFile(target, b, 0o666)
	})
}

// withoutRaceDetector builds this test binary again. The working directory is its package's, as `go test` has it.
func withoutRaceDetector(ctx context.Context, into string) (string, error) {
	if !testing.Testing() {
		return "", errors.New("a program with the race detector does not work in User-Mode Linux: build it without")
	}
	args := []string{"test", "-c", "-vet=off", "-o", into}
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			if s.Key == "-tags" {
				args = append(args, "-tags", s.Value)
			}
		}
	}
	out, err := exec.CommandContext(ctx, "go", append(args, ".")...).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("building the tests without the race detector: %w\n%s", err, out)
	}
	return into, nil
}
