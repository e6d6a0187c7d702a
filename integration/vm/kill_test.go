package vm

import (
	"bufio"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// However the process that wanted a guest goes, nothing of the guest stays.
func TestNothingOutlives(t *testing.T) {
	needsGuests(t)
	binary := filepath.Join(t.TempDir(), "fixture.test")
	if out, err := fixtureCommand(t.Context(), "-c", "-o", binary).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for name, c := range map[string]struct {
		command *exec.Cmd
		end     func(pid int) error
	}{
		"the test binary is killed": {exec.Command(binary, "-test.run=Hang", "-test.v"), func(pid int) error { return syscall.Kill(pid, syscall.SIGKILL) }},
		"go test is killed":         {exec.Command("go", "test", "-count=1", "-v", "-run", "Hang"), func(pid int) error { return syscall.Kill(pid, syscall.SIGKILL) }},
		"Ctrl-C":                    {exec.Command("go", "test", "-count=1", "-v", "-run", "Hang"), func(pid int) error { return syscall.Kill(-pid, syscall.SIGINT) }},
		"the group is killed":       {exec.Command("go", "test", "-count=1", "-v", "-run", "Hang"), func(pid int) error { return syscall.Kill(-pid, syscall.SIGKILL) }},
	} {
		t.Run(name, func(t *testing.T) {
			temp := t.TempDir()
			cmd := c.command
			cmd.Dir = filepath.Join("testdata", "fixture")
			cmd.Env = append(os.Environ(), "TMPDIR="+temp, "GOTMPDIR="+t.TempDir())
			cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			awaitLine(t, bufio.NewScanner(out), "hanging")
			folders, err := filepath.Glob(temp + "/stillpoint-vm-*")
			if err != nil || len(folders) != 1 || len(users(t, temp)) < 3 {
				t.Fatalf("while it runs: folders %q (%v), processes %v", folders, err, users(t, temp))
			}
			memory := filepath.Join("/dev/shm", filepath.Base(folders[0]))
			if _, err := os.Stat(memory); err != nil {
				t.Fatal(err)
			}
			if err := c.end(cmd.Process.Pid); err != nil {
				t.Fatal(err)
			}
			cmd.Wait()
			left := func() (all []string) {
				files, _ := filepath.Glob(temp + "/stillpoint-vm-*")
				shm, _ := filepath.Glob(memory)
				return append(append(files, shm...), users(t, temp)...)
			}
			for end := time.Now().Add(30 * time.Second); len(left()) > 0; time.Sleep(20 * time.Millisecond) {
				if time.Now().After(end) {
					t.Fatalf("left after 30 s: %v", left())
				}
			}
		})
	}
}

func awaitLine(t *testing.T, s *bufio.Scanner, line string) {
	t.Helper()
	var said []string
	for s.Scan() {
		if s.Text() == line {
			return
		}
		said = append(said, s.Text())
	}
	t.Fatalf("it ended without saying %q: %v\n%s", line, s.Err(), strings.Join(said, "\n"))
}

// users are the processes that work in a folder or name it in their arguments.
func users(t *testing.T, dir string) (all []string) {
	t.Helper()
	processes, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range processes {
		cwd, _ := os.Readlink(p + "/cwd") // a process may be gone, and what is left of it has neither
		args, _ := os.ReadFile(p + "/cmdline")
		if strings.HasPrefix(cwd, dir) || strings.Contains(string(args), dir) {
			all = append(all, filepath.Base(p)+" "+strings.ReplaceAll(string(args), "\x00", " "))
		}
	}
	return all
}
