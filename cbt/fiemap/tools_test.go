package fiemap_test

import (
	"os"
	"os/exec"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

func ioctl[T any](f *os.File, request uintptr, arg *T) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), request, uintptr(unsafe.Pointer(arg))); errno != 0 {
		return errno
	}
	return nil
}

// balance moves every extent of a btrfs.
func balance(t testing.TB, dir string) {
	t.Helper()
	if out, err := exec.CommandContext(t.Context(), "btrfs", "balance", "start", "--full-balance", dir).CombinedOutput(); err != nil {
		t.Fatalf("btrfs balance: %v: %s", err, out)
	}
}
