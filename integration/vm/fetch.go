package vm

import (
	"context"
	"crypto/sha256"
	_ "embed"
	"fmt"
	"io"
	"os/exec"

	"stillpoint.io/stillpoint/integration/peer"
)

//go:embed fetch.sh
var fetchScript []byte

// Fetch makes sure that a kernel is in the user's cache, and returns its folder there: "uml-newer" or "qemu". The first
// time it takes some 10 s and the network: the packages come from the Debian mirror of this machine, nothing is
// installed, and what was fetched is said in progress. The cache's key is the recipe: another one fetches anew.
func Fetch(ctx context.Context, name string, progress io.Writer) (string, error) {
	return peer.Cached(ctx, name, fmt.Sprintf("%x", sha256.Sum256(fetchScript))[:12], func(draft, final string) error {
		fetch := exec.CommandContext(ctx, "bash", "-c", string(fetchScript), "fetch.sh", name, draft, final)
		fetch.Stdout, fetch.Stderr = progress, progress
		if err := fetch.Run(); err != nil {
			return fmt.Errorf("fetching the kernel %s: %w", name, err)
		}
		return nil
	})
}
