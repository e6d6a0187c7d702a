package csi

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

// Prefix begins every key of ours in the parameters of a class. Keys that begin with csi.storage.k8s.io/ come from the
// sidecars and are not the class's.
const (
	Prefix        = "snap.stillpoint.io/"
	sidecarPrefix = "csi.storage.k8s.io/"
)

// The keys of classes.
const (
	keyAdapter  = Prefix + "adapter"
	keyBackend  = Prefix + "backend"
	keyFreeze   = Prefix + "max-freeze"
	keyCrash    = Prefix + "allow-crash-consistent"
	keySeparate = Prefix + "allow-separate-instants"
)

// Which keys a class may have depends on what it is a class of.
var (
	volumeKeys   = []string{keyAdapter, keyBackend, keyFreeze, keyCrash} // of a StorageClass; the last two for clones of volumes
	snapshotKeys = []string{keyAdapter, keyBackend, keyFreeze, keyCrash}
	groupKeys    = []string{keyAdapter, keyBackend, keyFreeze, keyCrash, keySeparate}
)

// class is what the parameters of a StorageClass, VolumeSnapshotClass or VolumeGroupSnapshotClass say.
type class struct {
	Adapter, Backend string // empty: not said
	MaxFreeze        time.Duration
	AllowCrash       bool
	AllowSeparate    bool
	Sidecar          map[string]string // what a sidecar added about the objects in Kubernetes
}

const defaultMaxFreeze = 10 * time.Second

// parseClass reads parameters. Everything that is wrong with them is in the one error, Invalid, with what was probably
// meant.
func parseClass(parameters map[string]string, keys []string) (class, error) {
	c := class{MaxFreeze: defaultMaxFreeze, Sidecar: map[string]string{}}
	var wrong []error
	fail := func(format string, args ...any) { wrong = append(wrong, fmt.Errorf(format, args...)) }
	flag := func(key, value string) bool {
		b, err := strconv.ParseBool(value)
		if err != nil {
			fail("%s: %q is not true or false", key, value)
		}
		return b
	}
	for _, key := range slices.Sorted(maps.Keys(parameters)) {
		value := parameters[key]
		switch {
		case strings.HasPrefix(key, sidecarPrefix):
			c.Sidecar[key] = value
		case !slices.Contains(keys, key):
			fail("there is no parameter %q%s", key, hint(key, keys))
		case key == keyAdapter:
			c.Adapter = value
		case key == keyBackend:
			c.Backend = value
		case key == keyCrash:
			c.AllowCrash = flag(key, value)
		case key == keySeparate:
			c.AllowSeparate = flag(key, value)
		case key == keyFreeze:
			var err error
			if c.MaxFreeze, err = time.ParseDuration(value); err != nil || c.MaxFreeze <= 0 || c.MaxFreeze > time.Minute {
				fail("%s: %q is not a time of more than 0 and at most 60s, like 500ms or 10s", key, value)
			}
		}
	}
	if len(wrong) > 0 {
		return class{}, fault.Errorf(fault.Invalid, "the class's parameters: %w", errors.Join(wrong...))
	}
	return c, nil
}

// hint is the end of a sentence about an unknown word. What all our keys begin with does not make them alike.
func hint(word string, known []string) string {
	bare := make([]string, len(known))
	for i, k := range known {
		bare[i] = strings.TrimPrefix(k, Prefix)
	}
	if near := adapters.Nearest(strings.TrimPrefix(word, Prefix), bare); near != "" {
		return fmt.Sprintf("; did you mean %q?", known[slices.Index(bare, near)])
	}
	return "; there is " + strings.Join(known, ", ")
}
