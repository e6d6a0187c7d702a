package kube

import (
	"fmt"
	"os"
	"testing"

	"stillpoint.io/stillpoint/integration/kubernetes"
)

var cluster = kubernetes.Shared{Options: kubernetes.Options{Nodes: 1}}

func TestMain(m *testing.M) {
	kubernetes.Init()
	code := m.Run()
	if err := cluster.Close(); err != nil {
		fmt.Fprintln(os.Stderr, "stopping the cluster:", err)
		code = 1
	}
	os.Exit(code)
}
