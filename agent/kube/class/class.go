// Package class is the vocabulary of the classes that people write for Stillpoint's CSI driver in Kubernetes: what the
// parameters of a StorageClass, a VolumeSnapshotClass or a VolumeGroupSnapshotClass and the keys of its secret mean. It
// knows nothing else of Kubernetes and does no I/O.
package class

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

// Driver is the name of Stillpoint's CSI driver, and the first part of every key of a class.
const Driver = "snap.stillpoint.io"

// Kind is what a class is a class of. It decides which keys there are.
type Kind uint8

const (
	Volumes   Kind = iota // StorageClass
	Snapshots             // VolumeSnapshotClass
	Groups                // VolumeGroupSnapshotClass
)

// String is the name of the resource in Kubernetes.
func (k Kind) String() string {
	return [...]string{"StorageClass", "VolumeSnapshotClass", "VolumeGroupSnapshotClass"}[k]
}

// Class is what a class says.
type Class struct {
	Adapter string // the adapter's name; empty: what the volume is of
	Backend string // the configured backend's; empty: the one that the adapter has
	Cut     Cut
	Backup  *Backup // nil: snapshots stay in the backend, and nowhere else
}

// Cut is how the class wants its volumes cut.
type Cut struct {
	MaxFreeze     time.Duration // longest freeze, over 0 and at most MostFreeze
	AllowCrash    bool          // a volume that cannot be frozen is snapshotted all the same
	AllowSeparate bool          // a group whose backends freeze by themselves may have several instants
}

const (
	DefaultFreeze = 10 * time.Second
	MostFreeze    = time.Minute
)

// The keys, without Driver and the slash before them.
const (
	keyAdapter     = "adapter"
	keyBackend     = "backend"
	keyMaxFreeze   = "max-freeze"
	keyCrash       = "allow-crash-consistent"
	keySeparate    = "allow-separate-instants"
	keyType        = "type"
	keyRemote      = "remote-name"
	keyIncremental = "allow-incremental"
	keyDeleteLocal = "delete-local"
	keyBucket      = "s3-bucket"
	keyEndpoint    = "s3-endpoint"
	keyRegion      = "s3-signing-region"
	keyPathStyle   = "s3-use-path-style"
)

// Key documents a key of a class.
type Key struct {
	Name  string // in full
	Kinds []Kind // the classes that may have it
	Usage string
}

var everywhere, snapshots, groups = []Kind{Volumes, Snapshots, Groups}, []Kind{Snapshots, Groups}, []Kind{Groups}

// Keys are all keys that there are.
func Keys() []Key {
	return []Key{
		{full(keyAdapter), everywhere, "which adapter the volumes are of, such as ceph-rbd; default: the only one configured that knows the volume"},
		{full(keyBackend), everywhere, "which configured backend the volumes are in; default: the only one that the adapter has"},
		{full(keyMaxFreeze), everywhere, "how long a filesystem may be frozen at most, like 500ms; at most 60s, default: 10s"},
		{full(keyCrash), everywhere, "true: what cannot be frozen is snapshotted all the same, as after a power failure; default: false, it fails"},
		{full(keySeparate), groups, "true: volumes that freeze by themselves may be cut at instants of their own; default: false, it fails"},
		{full(keyType), snapshots, "S3: snapshots are backed up there; default: they stay in the backend"},
		{full(keyRemote), snapshots, "the name of the place of backups, which their handles begin with; required with type S3"},
		{full(keyIncremental), snapshots, "false: every backup reads the whole volume; default: true, it reads what changed"},
		{full(keyDeleteLocal), snapshots, "true: the backend's snapshot is deleted when no backup needs it any more; default: false, it is kept"},
		{full(keyBucket), snapshots, "the bucket, which exists; required with type S3"},
		{full(keyEndpoint), snapshots, "the S3 store: a host, with a port if it is not the usual one; TLS unless http:// is before it; required with type S3"},
		{full(keyRegion), snapshots, "the region that requests are signed for; default: the bucket's, which the store is asked for"},
		{full(keyPathStyle), snapshots, "true: the bucket is named in the path of requests, not in the host; default: what the store is known to want"},
	}
}

func full(key string) string { return Driver + "/" + key }

// Keys that errors of others name.
const (
	AdapterKey  = Driver + "/" + keyAdapter
	BackendKey  = Driver + "/" + keyBackend
	CrashKey    = Driver + "/" + keyCrash
	SeparateKey = Driver + "/" + keySeparate
)

// sidecarPrefix begins what the CSI sidecars add to a class's parameters, and what they take from them.
const sidecarPrefix = "csi.storage.k8s.io/"

// Parse reads the parameters of a class, as they stand in it or as a CSI call carries them; what a sidecar added is left
// to [OriginOf]. Everything that is wrong with them is in the one error, Invalid, with what was probably meant.
func Parse(kind Kind, parameters map[string]string) (Class, error) {
	r := &reader{kind: kind, given: map[string]string{}}
	r.know(parameters)
	c := Class{
		Adapter: r.text(keyAdapter),
		Backend: r.text(keyBackend),
		Cut: Cut{MaxFreeze: r.duration(keyMaxFreeze, DefaultFreeze, MostFreeze), AllowCrash: r.flag(keyCrash, false),
			AllowSeparate: r.flag(keySeparate, false)},
	}
	c.Backup = r.backup()
	if len(r.wrong) > 0 {
		return Class{}, fault.Errorf(fault.Invalid, "the parameters of the %s: %w", kind, errors.Join(r.wrong...))
	}
	return c, nil
}

// reader reads parameters and gathers what is wrong with them.
type reader struct {
	kind  Kind
	given map[string]string // by the key without Driver
	wrong []error
}

func (r *reader) fail(format string, args ...any) {
	r.wrong = append(r.wrong, fmt.Errorf(format, args...))
}

// know sorts out what is a key of such a class.
func (r *reader) know(parameters map[string]string) {
	var known, elsewhere []string
	for _, k := range Keys() {
		if slices.Contains(k.Kinds, r.kind) {
			known = append(known, k.Name)
		} else {
			elsewhere = append(elsewhere, k.Name)
		}
	}
	for _, key := range slices.Sorted(maps.Keys(parameters)) {
		switch {
		case strings.HasPrefix(key, sidecarPrefix):
		case slices.Contains(known, key):
			r.given[strings.TrimPrefix(key, Driver+"/")] = strings.TrimSpace(parameters[key])
		case slices.Contains(elsewhere, key):
			r.fail("%q is no parameter of a %s", key, r.kind)
		default:
			r.fail("there is no parameter %q%s", key, Meant(key, known))
		}
	}
}

// Meant is the end of a sentence about a key that is not known: the known one that was probably meant, or else all of them.
// Only what is behind the driver's name counts: that may be left out or misspelt, and is too long to be compared with.
func Meant(key string, known []string) string {
	bare := func(k string) string { return k[strings.LastIndexByte(k, '/')+1:] }
	var names []string
	for _, k := range known {
		names = append(names, bare(k))
	}
	if i := slices.Index(names, adapters.Nearest(bare(key), names)); i >= 0 {
		return fmt.Sprintf("; did you mean %q?", known[i])
	}
	return "; there is " + strings.Join(known, ", ")
}

func (r *reader) text(key string) string { return r.given[key] }

func (r *reader) flag(key string, otherwise bool) bool {
	switch value, is := r.given[key]; {
	case !is:
		return otherwise
	case value == "true":
		return true
	case value != "false":
		r.fail("%s: %q is not true or false", full(key), value)
	}
	return false
}

func (r *reader) duration(key string, otherwise, most time.Duration) time.Duration {
	value, is := r.given[key]
	if !is {
		return otherwise
	}
	d, err := time.ParseDuration(value)
	if err != nil || d <= 0 || d > most {
		r.fail("%s: %q is not a time of more than 0 and at most %s, like 500ms or 10s", full(key), value, most)
	}
	return d
}
