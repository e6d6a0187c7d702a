package backup

import (
	"fmt"
	"os"
	"sync"
	"testing"

	"stillpoint.io/stillpoint/integration/child"
	"stillpoint.io/stillpoint/integration/s3"
)

// children are what this test program does when a test starts it again, by the value of childVariable.
var children = map[string]func() error{
	"kill":    func() error { return killedChild(killedForms["kill"]) },
	"sparse":  sparseChild,
	"dense":   denseChild,
	"restore": restoringChild,
	"resume":  resumedChild,
	"repair":  repairChild,

	"kill-tree": func() error { return killedChild(killedForms["kill-tree"]) },
	"plant":     plantingChild,
	"wide":      wideChild,
	"halfway":   halfwayChild,
}

// kills is how often a test kills: as often as it is made for, or as STILLPOINT_KILLS says, which `make soak` sets.
func kills(otherwise int) int {
	n := otherwise
	if _, err := fmt.Sscan(os.Getenv("STILLPOINT_KILLS"), &n); err != nil {
		return otherwise
	}
	return n
}

// testDir is for what tests share.
var testDir string

// stores are the S3 stores that tests use, started when the first one asks.
var stores s3.Stores

// childProgram is what children run, built when the first test asks.
var childProgram = sync.OnceValues(func() (string, error) { return child.Program(testDir) })

const childVariable = "STILLPOINT_BACKUP_TEST_CHILD"

func TestMain(m *testing.M) {
	if name, ok := os.LookupEnv(childVariable); ok {
		run, ok := children[name]
		if !ok { // to run the tests in it would be a child with children
			fmt.Fprintf(os.Stderr, "no child does %q\n", name)
			os.Exit(1)
		}
		if err := run(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(runTests(m))
}

func runTests(m *testing.M) int {
	var err error
	if testDir, err = os.MkdirTemp("", "stillpoint-backup-"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(testDir)
	code := m.Run()
	if err := stores.Close(); err != nil {
		fmt.Fprintln(os.Stderr, "stopping the stores:", err)
		return 1
	}
	return code
}
