package repository

import (
	"fmt"
	"os"
	"testing"

	"stillpoint.io/stillpoint/integration/s3"
)

// stores are the S3 stores that tests use, started when the first one asks.
var stores s3.Stores

// testDir is for what tests share.
var testDir string

func TestMain(m *testing.M) {
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
