// Package child is for test programs that start themselves again, to be killed at some moment or to be measured.
package child

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
)

// Program is the running test program without the race detector: itself if it has none, else it is built into dir, with
// the same tags. What becomes of data when a process dies does not depend on who watches its goroutines, and with nobody
// watching, its memory and its pace are those of the real program; races are looked for by the tests in the process.
// The working directory must be the package's own, as it is when a test program starts.
func Program(dir string) (string, error) {
	built, ok := debug.ReadBuildInfo()
	if !ok {
		return "", fmt.Errorf("the test program does not know how it was built")
	}
	settings := map[string]string{}
	for _, s := range built.Settings {
		settings[s.Key] = s.Value
	}
	if settings["-race"] != "true" {
		return os.Executable()
	}
	path := filepath.Join(dir, "child")
	args := []string{"test", "-c", "-o", path}
	if tags := settings["-tags"]; tags != "" {
		args = append(args, "-tags", tags)
	}
	out, err := exec.Command("go", append(args, ".")...).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("building the child: %w\n%s", err, out)
	}
	return path, nil
}
