package vm

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// sh runs a script in a guest, with its two streams apart.
func sh(t *testing.T, c Config, script string) (stdout, stderr string, code int, err error) {
	t.Helper()
	needsGuests(t)
	var out, errs bytes.Buffer
	code, err = Run(t.Context(), c, Command{Path: "/bin/sh", Args: []string{"-c", script}, Stdout: &out, Stderr: &errs})
	return out.String(), errs.String(), code, err
}

func TestRun(t *testing.T) {
	out, errs, code, err := sh(t, Config{}, "echo to out; echo to err >&2; exit 3")
	if out != "to out\n" || errs != "to err\n" || code != 3 || err != nil {
		t.Errorf("%q, %q, %d, %v", out, errs, code, err)
	}
	if _, _, code, err = sh(t, Config{}, "kill -9 $$"); code != 128+9 || err != nil {
		t.Errorf("killed: %d, %v", code, err)
	}
	if _, err = Run(t.Context(), Config{}, Command{Path: "/does/not/exist"}); err == nil || !strings.Contains(err.Error(), "/does/not/exist") {
		t.Errorf("a program that is not there: %v", err)
	}
	if _, err = Run(t.Context(), Config{Modules: []string{"no-such-module"}}, Command{Path: "/bin/true"}); err == nil || !strings.Contains(err.Error(), "no-such-module") {
		t.Errorf("a module that is not there: %v", err)
	}
}

// What a guest may rely on, and that it cannot write to the machine.
func TestSurroundings(t *testing.T) {
	canary := filepath.Join(t.TempDir(), "canary")
	if err := os.WriteFile(canary, []byte("alive"), 0o600); err != nil {
		t.Fatal(err)
	}
	out, errs, code, err := sh(t, Config{
		Memory: 700 << 20, Disks: []int64{64 << 20, 3 << 30}, Scratch: 5 << 30,
		Modules: []string{"dm-zero", "dm-flakey", "dm-delay"}, Programs: []string{"stillpoint.io/stillpoint/cmd/stillpoint-freezer"},
		Tests: []string{"stillpoint.io/stillpoint/fault"},
	}, `
set -eu
! echo dead 2>/dev/null >`+canary+`
! touch /etc/written-by-guest 2>/dev/null
set -- $STILLPOINT_VM_DISKS
[ $# = 2 ]
[ "$(blockdev --getsize64 $1) $(blockdev --getsize64 $2)" = "$((64 << 20)) $((3 << 30))" ]
echo written | dd of=$2 bs=4k seek=700000 conv=sync oflag=direct status=none
[ "$(dd if=$2 bs=4k skip=700000 count=1 iflag=direct status=none | head -n 1)" = written ]
for target in thin-pool zero flakey delay snapshot; do dmsetup targets | grep -q "^$target "; done
[ "$(stat -f -c %T "$TMPDIR")" = xfs ]
[ $(($(stat -f -c '%b * %S' "$TMPDIR"))) -gt $((4 << 30)) ]
touch /var/tmp/stillpoint-lab/x /dev/shm/x /run/x "$HOME/x"
[ $(awk '/MemTotal/ { print $2 }' /proc/meminfo) -gt 600000 ]
[ -x "$STILLPOINT_VM_BIN/stillpoint-freezer" ]
"$STILLPOINT_VM_BIN/fault.test" >/dev/null
[ "$(cat /sys/class/net/lo/carrier)" = 1 ]
(sleep 0.1 & echo $! >/run/orphan); sleep 0.5; ! kill -0 "$(cat /run/orphan)" 2>/dev/null # buried by init
echo all right`)
	if out != "all right\n" || code != 0 || err != nil {
		t.Errorf("%q, %q, %d, %v", out, errs, code, err)
	}
	if b, err := os.ReadFile(canary); string(b) != "alive" {
		t.Errorf("the guest wrote to the machine: %q, %v", b, err)
	}
}

// A program that should have ended by itself and did not is reported, with what blocks in the kernel.
func TestLimit(t *testing.T) {
	needsGuests(t)
	kind, err := chosen()
	if err != nil {
		t.Fatal(err)
	}
	m, err := newMachine(t.Context(), kind, Config{})
	if err != nil {
		t.Fatal(err)
	}
	_, err = m.run(t.Context(), Command{Path: "/bin/sleep", Args: []string{"1000"}, limit: time.Second})
	if err == nil || !strings.Contains(err.Error(), "did not end in 1s") || !strings.Contains(err.Error(), "Show Blocked State") {
		t.Error(err)
	}
	if err := m.close(); err != nil {
		t.Error(err)
	}
}

func TestCancel(t *testing.T) {
	needsGuests(t)
	ctx, cancel := context.WithCancelCause(t.Context())
	enough := errors.New("enough")
	_, err := Run(ctx, Config{}, Command{Path: "/bin/sh", Args: []string{"-c", "echo up; sleep 1000"}, Stdout: writerFunc(func([]byte) { cancel(enough) })})
	if err == nil || !strings.Contains(err.Error(), "enough") {
		t.Error(err)
	}
}

type writerFunc func([]byte)

func (f writerFunc) Write(p []byte) (int, error) { f(p); return len(p), nil }
