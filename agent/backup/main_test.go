package backup

import (
	"fmt"
	"os"
	"testing"
)

// children are what this test program does when a test starts it again, by the value of childVariable.
var children = map[string]func() error{
	"kill":   killedChild,
	"sparse": sparseChild,
	"dense":  denseChild,
	"resume": resumedChild,

	"kill-tree": killedTreeChild,
	"wide":      wideChild,
}

// testDir is for what tests share.
var testDir string

const childVariable = "STILLPOINT_BACKUP_TEST_CHILD"

func TestMain(m *testing.M) {
	if run, ok := children[os.Getenv(childVariable)]; ok {
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
	return m.Run()
}
