package lvmthin

import (
	"stillpoint.io/stillpoint/fault"
)

// PersistentVolume is what a Kubernetes PersistentVolume says of a CSI volume: spec.csi of it.
type PersistentVolume struct {
	Driver     string
	Handle     string            // volumeHandle
	Attributes map[string]string // volumeAttributes
}

// The CSI drivers whose volumes may be thin volumes of LVM.
const (
	TopoLVM      = "topolvm.io"
	TopoLVMOld   = "topolvm.cybozu.com" // its name before 0.16
	OpenEBSLVM   = "local.csi.openebs.io"
	CSIDriverLVM = "lvm.csi.metal-stack.io"
)

// Resolve is the id, as a person would type it, of the logical volume behind a PersistentVolume.
//
//	driver                volume group                        logical volume
//	topolvm.io            any that has it: a device class     the handle
//	                      stands for it, outside the PV
//	local.csi.openebs.io  attribute openebs.io/volgroup       the handle
//	lvm.csi.metal-stack.io  any that has it: an argument of   the handle
//	                      the driver, --vgname
//
// Sources: topolvm's internal/driver/node.go (getLvFromContext finds the handle among the names of the device class's
// volumes), lvm-localpv's pkg/lvm/volume.go (VolGroupKey) and pkg/driver/controller.go (the handle is the LVMVolume's
// name, and that the logical volume's), csi-driver-lvm's pkg/server/node.go (MountLV of the volume's id in the driver's
// group).
//
// Whether that is a thin volume shows when it is looked up. Errors are Unsupported for another driver and Invalid for a
// volume that cannot be one of LVM's.
func Resolve(pv PersistentVolume) (id string, err error) {
	group := anyGroup
	switch pv.Driver {
	case TopoLVM, TopoLVMOld, CSIDriverLVM:
	case OpenEBSLVM:
		group = pv.Attributes["openebs.io/volgroup"]
		if err := checkGroupName(group); err != nil {
			return "", fault.Errorf(fault.Invalid, "volume %q of %s: its attribute openebs.io/volgroup: %w", pv.Handle, pv.Driver, err)
		}
	default:
		return "", fault.Errorf(fault.Unsupported, "volumes of the CSI driver %q are not LVM's; known are %s, %s and %s", pv.Driver, TopoLVM, OpenEBSLVM, CSIDriverLVM)
	}
	if err := checkVolumeName(pv.Handle); err != nil {
		return "", fault.Errorf(fault.Invalid, "volume %q of %s: %w", pv.Handle, pv.Driver, err)
	}
	return group + "/" + pv.Handle, nil
}
