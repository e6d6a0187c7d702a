// Command fakecri is the container runtime of a test's nodes: the one that ships with the kubelet's client of such runtimes
// for tests of the kubelet itself. It answers as containerd would and never runs a container; what the kubelet does with
// volumes is real. It serves on the Unix socket that its argument names.
package main

import (
	"fmt"
	"os"

	"k8s.io/cri-client/pkg/fake"
)

func main() {
	if err := fake.NewFakeRemoteRuntime().Start("unix://" + os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "fakecri:", err)
		os.Exit(1)
	}
	select {}
}
