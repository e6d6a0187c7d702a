package ceph

import (
	"strings"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

// A PersistentVolume of ceph-csi's driver for CephFS has a handle of the form in csi.go, with the number of the filesystem in
// the pool's place, and says in its volumeAttributes where it is: fsName is the filesystem, subvolumePath the path of the
// subvolume's data, /volumes/GROUP/SUBVOLUME/UUID, and subvolumeName the subvolume's name (ceph-csi,
// internal/cephfs/controllerserver.go, CreateVolume; GROUP is csi unless the cluster's configuration says otherwise).
// Static volumes, with staticVolume: "true", have any handle and a directory in rootPath (docs/static-pvc.md); that may be a
// subvolume's.

// fsDriver is ceph-csi's driver for CephFS; Rook puts the namespace of its operator before it.
const fsDriver = "cephfs.csi.ceph.com"

// resolveFS is Resolve of ceph-fs's row.
func resolveFS(pv adapters.PersistentVolume) (id string, err error) {
	bad := func(why string) (string, error) {
		return "", fault.Errorf(fault.Invalid, "PersistentVolume with the handle %q: %s", pv.Handle, why)
	}
	fs, path, attribute := pv.Attributes["fsName"], pv.Attributes["subvolumePath"], "subvolumePath"
	_, dynamic := parseCSIHandle(pv.Handle)
	static := pv.Attributes["staticVolume"] == "true"
	switch {
	case static:
		path, attribute = pv.Attributes["rootPath"], "rootPath"
	case !dynamic:
		return bad(`that is not a handle of ceph-csi, and the volume attribute staticVolume is not "true"`)
	}
	switch {
	case fs == "":
		return bad("the volume attribute fsName, which names its filesystem, is missing: take FS/GROUP/SUBVOLUME as the volume's id")
	case path == "":
		return bad("the volume attribute " + attribute + " is missing: take FS/GROUP/SUBVOLUME as the volume's id")
	}
	n := treeName{fs: fs, dir: path}
	parts := strings.Split(path, "/")
	switch subvolume := len(parts) == 5 && strings.HasPrefix(path, volumesDir+"/"); {
	case subvolume:
		n = treeName{fs: fs, group: parts[2], subvolume: parts[3]}
		if name := pv.Attributes["subvolumeName"]; name != "" && name != n.subvolume {
			return bad("its attributes name the subvolume " + name + " and the path " + path)
		}
	case !static:
		return bad("the volume attribute subvolumePath is no path of a subvolume: " + path)
	}
	same, err := parseTreeName(n.String(), "")
	if err == nil && same != n {
		return bad("its attributes name " + n.String() + ", which cannot be a volume")
	}
	return n.String(), err
}
