package peer

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// Cached makes sure that a folder with certain content is in the user's cache, and returns it: NAME-KEY, where key is a
// digest of all that the content follows from, so that another recipe makes another folder. The first time, make fills an
// empty draft, which takes the final name when it is done; two processes that want the same folder make it once.
func Cached(ctx context.Context, name, key string, make func(draft, final string) error) (string, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	cache = filepath.Join(cache, "stillpoint")
	dir := filepath.Join(cache, name+"-"+key)
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
	if err := flock(ctx, lock); err != nil {
		return "", fmt.Errorf("waiting for another process that makes %s: %w", dir, err)
	}
	if _, err := os.Stat(dir); err == nil { // somebody else made it meanwhile
		return dir, nil
	}
	draft := dir + ".draft"
	if err := os.RemoveAll(draft); err != nil {
		return "", err
	}
	if err := os.Mkdir(draft, 0o755); err != nil {
		return "", err
	}
	if err := make(draft, dir); err != nil {
		return "", errors.Join(err, os.RemoveAll(draft))
	}
	return dir, os.Rename(draft, dir)
}

// flock takes the exclusive lock of a file, for as long as ctx allows.
func flock(ctx context.Context, f *os.File) error {
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil || !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return err
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
