package backup

import (
	"bufio"
	"encoding/json"
	"os"
	"os/exec"
	"testing"
	"time"
)

// childEnd is how a child ended: killed, or by itself and without an error.
type childEnd struct {
	said   []string      // lines, after "open"
	lived  time.Duration // since it said "open"
	killed bool
}

// newChild prepares this program to be run again, as one of children.
func newChild(t testing.TB, what string, env ...string) *exec.Cmd {
	t.Helper()
	program, err := childProgram()
	if err != nil {
		t.Fatal(err)
	}
	child := exec.CommandContext(t.Context(), program)
	child.Env = append(append(os.Environ(), childVariable+"="+what), env...)
	child.Stderr = os.Stderr
	return child
}

// childReport runs a child to its end, and takes what it prints for JSON.
func childReport(t testing.TB, report any, what string, env ...string) {
	t.Helper()
	text, err := newChild(t, what, env...).Output()
	if err == nil {
		err = json.Unmarshal(text, report)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// runChild runs a child, and kills it so long after it said "open", or, unless most is 0,
// when it has said so many lines more. A child may also be killed by itself. One that fails fails the test.
func runChild(t testing.TB, what string, after time.Duration, most int, env ...string) (end childEnd) {
	t.Helper()
	child := newChild(t, what, env...)
	out, err := child.StdoutPipe()
	if err == nil {
		err = child.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	if !lines.Scan() || lines.Text() != "open" {
		child.Process.Kill()
		t.Fatalf("the child says %q: %v", lines.Text(), child.Wait())
	}
	opened := time.Now()
	timer := time.AfterFunc(after, func() { child.Process.Kill() })
	defer timer.Stop()
	for lines.Scan() {
		if end.said = append(end.said, lines.Text()); len(end.said) == most {
			child.Process.Kill()
		}
	}
	err = child.Wait()
	end.lived, end.killed = time.Since(opened), !child.ProcessState.Exited()
	if err != nil && !end.killed {
		t.Fatalf("the child failed: %v", err)
	}
	return end
}
