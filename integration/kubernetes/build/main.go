// Command build builds the programs of Kubernetes that tests run, if they are not in the user's cache yet.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"

	"stillpoint.io/stillpoint/integration/kubernetes"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if _, err := kubernetes.Build(ctx, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "build:", err)
		os.Exit(1)
	}
}
