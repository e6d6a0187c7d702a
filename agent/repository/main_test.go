package repository

import (
	"fmt"
	"os"
	"testing"

	"stillpoint.io/stillpoint/integration/s3"
)

// stores are the S3 stores that tests use, started when the first one asks.
var stores s3.Stores

func TestMain(m *testing.M) {
	code := m.Run()
	if err := stores.Close(); err != nil {
		fmt.Fprintln(os.Stderr, "stopping the stores:", err)
		code = 1
	}
	os.Exit(code)
}
