package s3

import (
	"fmt"
	"os"
	"testing"
)

var stores Stores

func TestMain(m *testing.M) {
	code := m.Run()
	if err := stores.Close(); err != nil {
		fmt.Fprintln(os.Stderr, "stopping the stores:", err)
		code = 1
	}
	os.Exit(code)
}
