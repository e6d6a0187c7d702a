package ceph

import (
	"encoding/hex"
	"regexp"
	"strconv"
	"strings"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

// A PersistentVolume of ceph-csi (driver rbd.csi.ceph.com, and names that end in it under Rook) names its image in its
// volumeHandle and its volumeAttributes. The handle that ceph-csi makes is
//
//	VVVV-LLLL-CLUSTER-PPPPPPPPPPPPPPPP-UUID
//
// where VVVV is 0001 and the version of the encoding, LLLL the length of CLUSTER in bytes, CLUSTER the id of the cluster
// in ceph-csi's configuration (often, but not always, Ceph's fsid), P… the number of the pool that has ceph-csi's journal
// of the volume, and UUID of 36 characters the image's, whose name is csi-vol-UUID unless the StorageClass had a
// volumeNamePrefix. Numbers are hexadecimal. Source: ceph-csi, internal/util/volid.go, ComposeCSIID.
//
// The attributes, written at the volume's creation, say more: pool and imageName are the image's own (the pool differs
// from the journal's in a topology), radosNamespace is its namespace (internal/rbd/rbd_util.go, ToCSI). Static
// volumes, with staticVolume: "true", have the image's name as their handle and its pool in the attributes
// (docs/static-pvc.md).

// rbdDriver is ceph-csi's driver for RBD; Rook puts the namespace of its operator before it: rook-ceph.rbd.csi.ceph.com.
const rbdDriver = "rbd.csi.ceph.com"

// csiHandle is a volume handle of ceph-csi, taken apart.
type csiHandle struct {
	cluster string
	pool    int64
	uuid    string
}

// csiImagePrefix starts the names of ceph-csi's images.
const csiImagePrefix = "csi-vol-"

var uuidForm = regexp.MustCompile(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)

// parseCSIHandle reads a handle; ok is false for everything that ceph-csi would not have made.
func parseCSIHandle(s string) (h csiHandle, ok bool) {
	version, rest, _ := strings.Cut(s, "-")
	length, rest, _ := strings.Cut(rest, "-")
	raw, err := hex.DecodeString(length)
	if version != "0001" || err != nil || len(raw) != 2 {
		return h, false
	}
	n := int(raw[0])<<8 | int(raw[1])
	if len(rest) != n+1+16+1+36 || rest[n] != '-' || rest[n+17] != '-' {
		return h, false
	}
	pool, err := strconv.ParseInt(rest[n+1:n+17], 16, 64)
	h = csiHandle{cluster: rest[:n], pool: pool, uuid: rest[n+18:]}
	return h, err == nil && n > 0 && uuidForm.MatchString(h.uuid)
}

// resolveRBD is Resolve of ceph-rbd's row: POOL/IMAGE, or, for a dynamic volume whose attributes do not say where it is,
// the handle itself, which the adapter resolves by asking the cluster for the pool's name.
func resolveRBD(pv adapters.PersistentVolume) (id string, err error) {
	at := imageName{pool: pv.Attributes["pool"], namespace: pv.Attributes["radosNamespace"], image: pv.Attributes["imageName"]}
	h, dynamic := parseCSIHandle(pv.Handle)
	switch {
	case pv.Attributes["staticVolume"] == "true":
		at.image = pv.Handle
		if at.pool == "" {
			return "", fault.Errorf(fault.Invalid, "PersistentVolume with the handle %q: a static volume of ceph-csi names its pool in the volume attribute pool, and this one does not", pv.Handle)
		}
	case !dynamic:
		return "", fault.Errorf(fault.Invalid, "PersistentVolume with the handle %q: that is not a handle of ceph-csi, and the volume attribute staticVolume is not \"true\"", pv.Handle)
	case at.pool == "":
		return pv.Handle, nil
	case at.image == "":
		at.image = csiImagePrefix + h.uuid
	}
	n, err := parseImageName(at.String(), "")
	if err == nil && n != at {
		err = fault.Errorf(fault.Invalid, "PersistentVolume with the handle %q: its attributes name the image %q, which cannot be one", pv.Handle, at)
	}
	return n.String(), err
}
