package mounts

import (
	"context"
	"errors"
	"os"
	"testing"

	"stillpoint.io/stillpoint/fault"
	"stillpoint.io/stillpoint/integration/lab"
)

// A loop device counts by its setting. (One of device-mapper that counts regardless is in integration/thin.)
func TestCountsRegardless(t *testing.T) {
	l := lab.Test(t)
	fs, err := l.Pool(t.Context(), "v", "ext4", 32<<20)
	must(t, err)
	id := rdev(t, fs.Device)
	setting := "/sys/dev/block/" + id.String() + "/queue/iostats"
	t.Cleanup(func() { must(t, os.WriteFile(setting, []byte("1"), 0)) })
	for _, value := range []string{"1", "0"} {
		must(t, os.WriteFile(setting, []byte(value), 0))
		c, err := Host{}.Counters(t.Context(), id)
		must(t, err)
		if c[0].Kept != (value == "1") {
			t.Errorf("set to %s: %+v", value, c[0])
		}
		if counts, err := (Host{}).CountsRegardless(t.Context(), id); counts || err != nil {
			t.Errorf("set to %s: counts regardless: %v, %v", value, counts, err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if counts, err := (Host{}).CountsRegardless(ctx, id); counts || err != nil && !errors.Is(err, fault.Unavailable) {
		t.Errorf("cancelled: %v, %v", counts, err)
	}
	if _, err := (Host{}).CountsRegardless(t.Context(), MakeDevice(250, 1<<18)); !errors.Is(err, fault.NotFound) {
		t.Errorf("a device that is not there: %v", err)
	}
}
