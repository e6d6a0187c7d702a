package repository

import (
	"fmt"
	"os"
	"sync"
	"testing"

	"stillpoint.io/stillpoint/integration/child"
	"stillpoint.io/stillpoint/integration/s3"
)

// stores are the S3 stores that tests use, started when the first one asks.
var stores s3.Stores

// children are what this test program does when a test starts it again, by the value of childVariable.
var children = map[string]func() error{
	"forget":   forgettingChild,
	"maintain": maintainingChild,
}

// childProgram is what children run, built when the first test asks.
var childProgram = sync.OnceValues(func() (string, error) { return child.Program(testDir) })

const childVariable = "STILLPOINT_REPOSITORY_TEST_CHILD"

// testDir is for what tests share.
var testDir string

func TestMain(m *testing.M) {
	if run, ok := children[os.Getenv(childVariable)]; ok {
		if err := run(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	var err error
	if testDir, err = os.MkdirTemp("", "stillpoint-repository-"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := m.Run()
	os.RemoveAll(testDir)
	if err := stores.Close(); err != nil {
		fmt.Fprintln(os.Stderr, "stopping the stores:", err)
		code = 1
	}
	os.Exit(code)
}
