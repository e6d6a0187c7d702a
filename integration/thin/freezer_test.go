package thin

import (
	"os"
	"os/exec"
	"testing"
	"time"

	"stillpoint.io/stillpoint/integration/vm"
)

// The freezer's own tests, all of them, with every filesystem on a thin volume.
func TestFreezer(t *testing.T) {
	needsDeviceMapper(t)
	pool := thinPool(t)
	args := []string{"-test.v"}
	if end, ok := t.Deadline(); ok {
		args = append(args, "-test.timeout="+time.Until(end.Add(-10*time.Second)).String())
	}
	cmd := exec.CommandContext(t.Context(), vm.Program("freezer.test"), args...)
	cmd.Env = append(os.Environ(), "STILLPOINT_TEST_THIN_POOL="+string(pool))
	cmd.Stdout, cmd.Stderr = t.Output(), t.Output()
	if err := cmd.Run(); err != nil {
		t.Error(err)
	}
}
