package vm

import (
	"context"
	"crypto/sha256"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"

	"golang.org/x/sys/unix"
)

//go:embed fetch.sh
var fetchScript []byte

// Fetch makes sure that a kernel is in the user's cache, and returns its folder there: "uml-newer" or "qemu". The first
// time it takes some 10 s and the network: the packages come from the Debian mirror of this machine, nothing is
// installed, and what was fetched is said in progress. The cache's key is the recipe: another one fetches anew.
func Fetch(ctx context.Context, name string, progress io.Writer) (string, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	cache = filepath.Join(cache, "stillpoint")
	dir := filepath.Join(cache, fmt.Sprintf("%s-%x", name, sha256.Sum256(fetchScript))[:len(name)+13])
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return "", err
	}
	lock, err := os.OpenFile(filepath.Join(cache, name+".lock"), os.O_CREATE|os.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return "", err
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return "", err
	}
	if _, err := os.Stat(dir); err == nil { // somebody else fetched it meanwhile
		return dir, nil
	}
	draft := dir + ".draft"
	if err := os.RemoveAll(draft); err != nil {
		return "", err
	}
	fetch := exec.CommandContext(ctx, "bash", "-c", string(fetchScript), "fetch.sh", name, draft, dir)
	fetch.Stdout, fetch.Stderr = progress, progress
	if err := fetch.Run(); err != nil {
		return "", errors.Join(fmt.Errorf("fetching the kernel %s: %w", name, err), os.RemoveAll(draft))
	}
	return dir, os.Rename(draft, dir)
}
