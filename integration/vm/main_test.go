package vm

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// These tests are about guests, also where the machine needs none.
func TestMain(m *testing.M) {
	Init()
	if !Inside() && os.Getenv(envChoice) == "" {
		os.Setenv(envChoice, string(uml))
	}
	os.Exit(m.Run())
}

// fixture runs `go test` over the fixture, as a user would, and returns what it said.
func fixture(t *testing.T, args ...string) (string, error) {
	t.Helper()
	needsGuests(t)
	out, err := fixtureCommand(t.Context(), args...).CombinedOutput()
	return string(out), err
}

func fixtureCommand(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "go", append([]string{"test", "-count=1"}, args...)...)
	cmd.Dir = filepath.Join("testdata", "fixture")
	return cmd
}

func needsGuests(t *testing.T) {
	t.Helper()
	if testing.Short() {
		t.Skip("needs guests: left out by -short, `make test` runs it")
	}
}

func TestOutcomes(t *testing.T) {
	for _, c := range []struct {
		test string
		good bool
		says []string
	}{
		{"TestPass", true, []string{"ok "}},
		{"TestFail", false, []string{"--- FAIL: TestFail", "told to fail"}},
		{"TestExit", false, []string{"exit status 7"}},
		{"TestPanic", false, []string{"panic: told to panic", "fixture_test.go:"}},
		{"TestCrash", false, []string{"the guest gave no exit code", "Kernel panic - not syncing: sysrq triggered crash"}},
		{"TestPass|TestFail", false, []string{"told to fail"}},
	} {
		t.Run(c.test, func(t *testing.T) {
			out, err := fixture(t, "-run", "^("+c.test+")$")
			if (err == nil) != c.good {
				t.Errorf("go test: %v", err)
			}
			for _, s := range c.says {
				if !strings.Contains(out, s) {
					t.Errorf("it does not say %q", s)
				}
			}
			if c.good && strings.Contains(out, "Linux version") {
				t.Error("the kernel's messages are shown without a reason")
			}
			if t.Failed() {
				t.Log(out)
			}
		})
	}
}

func TestTimeout(t *testing.T) {
	out, err := fixture(t, "-run", "Hang", "-timeout", "2s")
	if err == nil {
		t.Error("no failure")
	}
	for _, s := range []string{"panic: test timed out after 2s", "fixture.TestHang(", "fixture_test.go:"} {
		if !strings.Contains(out, s) {
			t.Errorf("it does not say %q:\n%s", s, out)
		}
	}
}

// Arguments, environment and working directory arrive as they were, however many and whatever is in them.
func TestPassedOn(t *testing.T) {
	needsGuests(t)
	args := []string{"-run", "Show|Pass", "-v", "-args", "-word", "two words", "--", "", "\"quoted\"", "a=b", "ä\n"}
	env := map[string]string{}
	for i := range 100 {
		args = append(args, fmt.Sprint("argument ", i))
		env[fmt.Sprint("SHOWN", i)] = fmt.Sprintf("value %d \"'\n\\", i)
	}
	cmd := fixtureCommand(t.Context(), args...)
	cmd.Env = os.Environ()
	for name, value := range env {
		cmd.Env = append(cmd.Env, name+"="+value)
	}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	_, after, _ := strings.Cut(string(out), "shown: ")
	var shown struct {
		Env       map[string]string
		Dir, Word string
		Args      []string
		Kernel    string
		Disks     []string
	}
	if err := json.NewDecoder(strings.NewReader(after)).Decode(&shown); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for name, value := range env {
		if shown.Env[name] != value {
			t.Errorf("%s is %q", name, shown.Env[name])
		}
	}
	dir, err := filepath.Abs(cmd.Dir)
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(strings.Join(args, "\x00"), "--\x00")
	if shown.Dir != dir || shown.Word != "two words" || strings.Join(shown.Args, "\x00") != rest || len(shown.Disks) != 2 {
		t.Errorf("shown: %+v", shown)
	}
	ours, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		t.Fatal(err)
	}
	if shown.Kernel == strings.TrimSpace(string(ours)) {
		t.Errorf("the kernel is this machine's, %s", shown.Kernel)
	}
	if !strings.Contains(string(out), "--- PASS: TestPass") {
		t.Errorf("-v is not heeded:\n%s", out)
	}
}

// Nothing of what is written is lost or out of order, also at the end.
func TestMuchOutput(t *testing.T) {
	out, err := fixture(t, "-v", "-run", "Much")
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	next := 0
	for line := range strings.Lines(out) {
		if strings.HasPrefix(line, "line ") {
			if line != fmt.Sprintf("line %d\n", next) {
				t.Fatalf("%q is where line %d should be", line, next)
			}
			next++
		}
	}
	if next != 20_000 {
		t.Errorf("%d lines", next)
	}
}

func TestProfiles(t *testing.T) {
	dir := t.TempDir()
	profile, data := filepath.Join(dir, "cover.out"), filepath.Join(dir, "data")
	if err := os.Mkdir(data, 0o700); err != nil {
		t.Fatal(err)
	}
	out, err := fixture(t, "-run", "Pass", "-coverprofile", profile, "-outputdir", dir, "-cpuprofile", "cpu.out", "-o", filepath.Join(dir, "test"),
		"-args", "-test.gocoverdir="+data)
	if err != nil || !strings.Contains(out, "coverage: 66.7% of statements") {
		t.Errorf("%v\n%s", err, out)
	}
	b, err := os.ReadFile(profile)
	if err != nil {
		t.Fatal(err)
	}
	var counts []string
	for line := range strings.Lines(string(b)) {
		if strings.Contains(line, "fixture.go:") {
			counts = append(counts, line[strings.LastIndex(line, " ")+1:len(line)-1])
		}
	}
	if !slices.Equal(counts, []string{"1", "1", "0"}) {
		t.Errorf("the profile of the coverage:\n%s", b)
	}
	if s, err := os.Stat(filepath.Join(dir, "cpu.out")); err != nil || s.Size() == 0 {
		t.Errorf("the profile of the processor: %v", err)
	}
	if out, err := exec.CommandContext(t.Context(), "go", "tool", "covdata", "percent", "-i="+data).CombinedOutput(); err != nil || !strings.Contains(string(out), "66.7%") {
		t.Errorf("the data of the coverage: %v\n%s", err, out)
	}
}

// A binary with the race detector does not work in User-Mode Linux: its tests run all the same.
func TestRaceDetector(t *testing.T) {
	out, err := fixture(t, "-race", "-v", "-run", "Pass")
	if err != nil || !strings.Contains(out, "--- PASS: TestPass") {
		t.Errorf("%v\n%s", err, out)
	}
	if said := strings.Contains(out, "without it"); said == (os.Getenv(envChoice) == string(qemu)) {
		t.Errorf("whether the race detector works:\n%s", out)
	}
	if out, err = fixture(t, "-race", "-run", "Pass", "-cover"); os.Getenv(envChoice) != string(qemu) && (err == nil || !strings.Contains(out, "leave one out")) {
		t.Errorf("with coverage: %v\n%s", err, out)
	}
}
