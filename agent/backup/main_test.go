package backup

import (
	"fmt"
	"os"
	"testing"

	"stillpoint.io/stillpoint/integration/s3"
)

// children are what this test program does when a test starts it again, by the value of childVariable.
var children = map[string]func() error{
	"kill":   killedChild,
	"sparse": sparseChild,
}

// testDir is for what tests share.
var testDir string

// stores are the S3 stores that tests use, started when the first one asks.
var stores s3.Stores

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
	code := m.Run()
	if err := stores.Close(); err != nil {
		fmt.Fprintln(os.Stderr, "stopping the stores:", err)
		return 1
	}
	return code
}
