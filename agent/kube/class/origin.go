package class

import (
	"strings"

	"stillpoint.io/stillpoint/fault"
)

// Origin is the VolumeSnapshot that a CreateSnapshot call is for, as the sidecar adds it to the class's parameters when it
// runs with --extra-create-metadata.
type Origin struct {
	Namespace, Name string
	UID             string // from the name that the call asks for
}

// What the sidecar adds.
const (
	NameKey      = sidecarPrefix + "volumesnapshot/name"
	NamespaceKey = sidecarPrefix + "volumesnapshot/namespace"
)

// String names the snapshot for people.
func (o Origin) String() string { return o.Namespace + "/" + o.Name }

// OriginOf reads what the sidecar added to the parameters of a CreateSnapshot call, and the name that it asks for:
// --snapshot-name-prefix, a dash, and the VolumeSnapshot's UID. Invalid if it is not all there: then it cannot be known
// whose volume is to be snapshotted.
func OriginOf(parameters map[string]string, wanted string) (Origin, error) {
	o := Origin{Namespace: parameters[NamespaceKey], Name: parameters[NameKey]}
	if o.Namespace == "" || o.Name == "" {
		return Origin{}, fault.Errorf(fault.Invalid, "snapshot %s: the call does not say which VolumeSnapshot it is for: run csi-snapshotter with --extra-create-metadata", wanted)
	}
	var is bool
	if o.UID, is = UIDOf(wanted); !is {
		return Origin{}, fault.Errorf(fault.Invalid, "VolumeSnapshot %s: its snapshot is to be named %q, which does not end in a UID: run csi-snapshotter without --snapshot-name-uuid-length", o, wanted)
	}
	return o, nil
}

// UIDOf is the UID that the name which a sidecar asks for ends in, if it does.
func UIDOf(wanted string) (string, bool) {
	if len(wanted) < uidLength || !isUID(wanted[len(wanted)-uidLength:]) {
		return "", false
	}
	return wanted[len(wanted)-uidLength:], true
}

const uidLength = 36

// isUID recognizes the usual spelling of a UUID (RFC 9562), which is what API servers give.
func isUID(s string) bool {
	for i := range len(s) {
		dash := i == 8 || i == 13 || i == 18 || i == 23
		if dash != (s[i] == '-') || !dash && !strings.ContainsRune("0123456789abcdef", rune(s[i])) {
			return false
		}
	}
	return len(s) == uidLength
}
