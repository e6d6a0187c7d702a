package registry_test

import (
	"errors"
	"strings"
	"testing"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/adapters/registry"
	"stillpoint.io/stillpoint/fault"
)

func TestKinds(t *testing.T) {
	for _, k := range registry.Kinds() {
		found, err := registry.Find(k.Name)
		if err != nil || found.Name != k.Name {
			t.Errorf("Find(%q) = %q, %v", k.Name, found.Name, err)
		}
		if k.Summary == "" || k.Open == nil {
			t.Errorf("%s: incomplete row %+v", k.Name, k)
		}
		if (len(k.Drivers) > 0) != (k.Resolve != nil) {
			t.Errorf("%s: has drivers %v, and Resolve: %v", k.Name, k.Drivers, k.Resolve != nil)
		}
		_, err = k.VolumeOf(adapters.PersistentVolume{Driver: "csi.example", Handle: "vol-1"})
		if !errors.Is(err, fault.Unsupported) || !strings.Contains(err.Error(), "csi.example") {
			t.Errorf("%s says of a volume of another driver: %v", k.Name, err)
		}
		for _, key := range k.Keys {
			if key.Name == "" || key.Usage == "" {
				t.Errorf("%s: incomplete key %+v", k.Name, key)
			}
		}
		_, err = k.Open(t.Context(), adapters.Config{Name: "b", Parameters: map[string]string{"no-such-key": "x"}})
		if !errors.Is(err, fault.Invalid) || !strings.Contains(err.Error(), "no-such-key") {
			t.Errorf("%s opened with an unknown key: %v", k.Name, err)
		}
		a, err := k.Open(t.Context(), adapters.Config{Name: "b"})
		if errors.Is(err, fault.Unsupported) { // this program was built without it: both places say what to do
			if !strings.Contains(err.Error(), "`make ") || !strings.Contains(k.Summary, "`make ") {
				t.Errorf("%s does not say how to get it: %v, %q", k.Name, err, k.Summary)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s does not open without parameters: %v", k.Name, err)
			continue
		}
		if err := a.Close(); err != nil {
			t.Errorf("%s: %v", k.Name, err)
		}
	}
}

func TestFindUnknown(t *testing.T) {
	_, err := registry.Find("reflnik")
	if !errors.Is(err, fault.Invalid) || !strings.Contains(err.Error(), `did you mean "reflink"`) || !strings.Contains(err.Error(), "mem") {
		t.Errorf("%v", err)
	}
}
