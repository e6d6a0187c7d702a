package ceph

import (
	"crypto/rand"
	"fmt"
	"strings"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

const (
	// draftPrefix starts the names of snapshots that are being made.
	draftPrefix = ".stillpoint."
	// targetPrefix starts the names of images that are being restored.
	targetPrefix = ".stillpoint-restore-"
)

// imageName is where an image is. Namespace is empty for the pool's own.
type imageName struct{ pool, namespace, image string }

// String is the canonical id of the volume.
func (n imageName) String() string {
	if n.namespace == "" {
		return n.pool + "/" + n.image
	}
	return n.pool + "/" + n.namespace + "/" + n.image
}

func (n imageName) id(backend string) adapters.VolumeID {
	return adapters.VolumeID{Backend: backend, ID: n.String()}
}

// target is the image that a restore of n fills, for a token.
func (n imageName) target(token string) imageName {
	n.image = targetPrefix + adapters.ShortName(n.image+"\x00"+token)
	return n
}

// parseImageName reads a volume's id that is not a handle of ceph-csi. With a pool, an id without a slash is an image of
// that one, and every other pool is refused. Errors are Invalid.
func parseImageName(id, pool string) (imageName, error) {
	bad := func(why string) (imageName, error) {
		return imageName{}, fault.Errorf(fault.Invalid, "volume %q: %s; an image is written POOL/IMAGE or POOL/NAMESPACE/IMAGE", id, why)
	}
	parts := strings.Split(id, "/")
	if len(parts) == 1 && pool != "" {
		parts = []string{pool, id}
	}
	for _, p := range parts {
		if p == "" {
			return bad("a part of it is empty")
		}
	}
	if strings.ContainsFunc(id, func(r rune) bool { return r == '@' || r < ' ' || r == 0x7f }) {
		return bad("Ceph's names have no @ and no control characters")
	}
	var n imageName
	switch len(parts) {
	case 2:
		n = imageName{pool: parts[0], image: parts[1]}
	case 3:
		n = imageName{pool: parts[0], namespace: parts[1], image: parts[2]}
	default:
		return bad("it has one, two or three parts")
	}
	if strings.HasPrefix(n.image, targetPrefix) {
		return bad("it is an unfinished restore")
	}
	if pool != "" && n.pool != pool {
		return bad(fmt.Sprintf("this backend is limited to the pool %s", pool))
	}
	return n, nil
}

// draftName is a name under which the snapshot of that name is made: another one each time.
func draftName(name string) string { return draftPrefix + name + "." + rand.Text() }

// isDraft reports whether a snapshot has such a name.
func isDraft(name string) bool { return strings.HasPrefix(name, draftPrefix) }
