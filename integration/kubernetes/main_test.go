package kubernetes

import (
	"fmt"
	"os"
	"testing"
	"time"
)

var began = time.Now() // before any cluster

var shared = Shared{Options: Options{Nodes: 1}}

func TestMain(m *testing.M) {
	Init()
	code := m.Run()
	if err := shared.Close(); err != nil {
		fmt.Fprintln(os.Stderr, "stopping the cluster:", err)
		code = 1
	}
	os.Exit(code)
}
