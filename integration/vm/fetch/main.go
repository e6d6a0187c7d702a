// Command fetch puts the kernels for package vm into the user's cache, and says what it fetched: "uml-newer", "qemu".
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"stillpoint.io/stillpoint/integration/vm"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	for _, name := range os.Args[1:] {
		if _, err := vm.Fetch(ctx, name, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, "fetch:", err)
			os.Exit(1)
		}
	}
}
