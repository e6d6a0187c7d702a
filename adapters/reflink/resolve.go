package reflink

import (
	"errors"
	"os"
	"path"
	"strings"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

// rawfile is the CSI driver whose volumes are files: OpenEBS rawfile-localpv.
const rawfile = "rawfile.csi.openebs.io"

// inPool begins the id of a file by its path in a pool, whichever of the backend's that is in. No other id does.
const inPool = "./"

// resolve is Resolve of the registry's row. rawfile-localpv has a volume in the file disk.img of a folder that is named as
// its handle, in the folder of a storage pool on the node (create_volume and _get_volume_path in its
// rawfile/utils/volume_manager.py; /var/csi/rawfile by default). Which folder that is stands in the driver's configuration,
// so it must stand among the backend's pools.
func resolve(pv adapters.PersistentVolume) (id string, err error) {
	if pv.Handle == "" || pv.Handle == "." || pv.Handle == ".." || strings.ContainsRune(pv.Handle, '/') {
		return "", fault.Errorf(fault.Invalid, "volume %q of %s: a handle of that driver is the name of a folder", pv.Handle, pv.Driver)
	}
	return inPool + pv.Handle + "/disk.img", nil
}

// find looks for the file of an id that begins with inPool: it must be in just one pool.
func (a *Adapter) find(id adapters.VolumeID) (adapters.VolumeID, error) {
	if len(a.pools) == 0 {
		return id, fault.Errorf(fault.Invalid, "volume %s: it is in one of the backend's pools, and none are configured: name them with the parameter pools", id)
	}
	var found []string
	for _, pool := range a.pools {
		file := path.Join(pool, id.ID[len(inPool):])
		switch _, err := os.Lstat(file); {
		case err == nil:
			found = append(found, file)
		case !errors.Is(err, os.ErrNotExist):
			return id, failed(errno(err), "volume %s", id)
		}
	}
	switch len(found) {
	case 0:
		return id, fault.Errorf(fault.NotFound, "volume %s: it is in none of the backend's pools on this node (%s)", id, strings.Join(a.pools, ", "))
	case 1:
		return adapters.VolumeID{Backend: id.Backend, ID: found[0]}, nil
	}
	return id, fault.Errorf(fault.Invalid, "volume %s: it is in several of the backend's pools: %s", id, strings.Join(found, ", "))
}
