package adapters

import (
	"context"
	"fmt"
	"log/slog"
	"strings"

	"stillpoint.io/stillpoint/fault"
)

// Config is what a backend is opened with. Parameters come from the configuration file or a VolumeSnapshotClass; the
// adapter reads them through Params, which refuses unknown keys.
type Config struct {
	Name       string // the backend's name: the first part of its handles
	Parameters map[string]string
	Secrets    map[string]Secret
}

// Secret is a string that never shows: every way of printing or encoding it gives ***. Reveal is the one way to its
// value, easy to search for.
type Secret struct{ value string }

// NewSecret wraps a value.
func NewSecret(value string) Secret { return Secret{value} }

// Reveal returns the secret itself, to be handed to the system it belongs to and to nothing else.
func (s Secret) Reveal() string { return s.value }

func (s Secret) String() string               { return "***" }
func (s Secret) GoString() string             { return "***" }
func (s Secret) Format(f fmt.State, _ rune)   { fmt.Fprint(f, "***") }
func (s Secret) LogValue() slog.Value         { return slog.StringValue("***") }
func (s Secret) MarshalText() ([]byte, error) { return []byte("***"), nil }

// Kind is one row of the registry's table: an adapter that can be configured.
type Kind struct {
	Name    string // "reflink"; the word in `adapter:`
	Summary string // one line for `stillpoint adapters`
	Keys    []Key  // the parameters it takes
	Open    func(ctx context.Context, c Config) (Adapter, error)

	// Drivers are the CSI drivers whose PersistentVolumes may be volumes of this adapter: their names, or *.NAME for every
	// name that ends in .NAME. Resolve finds the volume behind one of those: its id as a person would type it, for the
	// adapter's Volume to look up. It does no I/O; a PersistentVolume that cannot be one of the driver's is Invalid.
	Drivers []string
	Resolve func(pv PersistentVolume) (id string, err error)
}

// PersistentVolume is what a Kubernetes PersistentVolume says of a CSI volume: of its spec.csi.
type PersistentVolume struct {
	Driver     string
	Handle     string            // volumeHandle
	Attributes map[string]string // volumeAttributes
}

// VolumeOf is the id of the volume behind a PersistentVolume, from Resolve. A driver that is not among the adapter's is
// Unsupported.
func (k Kind) VolumeOf(pv PersistentVolume) (id string, err error) {
	for _, d := range k.Drivers {
		if suffix, any := strings.CutPrefix(d, "*"); d == pv.Driver || any && strings.HasSuffix(pv.Driver, suffix) {
			return k.Resolve(pv)
		}
	}
	known := "it knows volumes of no CSI driver"
	if len(k.Drivers) > 0 {
		known = "it knows those of " + strings.Join(k.Drivers, ", ")
	}
	return "", fault.Errorf(fault.Unsupported, "volume %q of the CSI driver %q is none of the adapter %s: %s", pv.Handle, pv.Driver, k.Name, known)
}

// Key documents one parameter of an adapter.
type Key struct {
	Name     string
	Usage    string // what it means, its unit and its default
	Required bool
	Secret   bool // looked for in Secrets instead of Parameters
}
