package lvmthin

import (
	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

// The CSI drivers whose volumes may be thin volumes of LVM.
const (
	topoLVM      = "topolvm.io"
	topoLVMOld   = "topolvm.cybozu.com" // its name before 0.16
	openEBSLVM   = "local.csi.openebs.io"
	csiDriverLVM = "lvm.csi.metal-stack.io"
)

// resolve is Resolve of the registry's row.
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
// Whether that is a thin volume shows when it is looked up.
func resolve(pv adapters.PersistentVolume) (id string, err error) {
	group := anyGroup
	if pv.Driver == openEBSLVM {
		group = pv.Attributes["openebs.io/volgroup"]
		if err := checkGroupName(group); err != nil {
			return "", fault.Errorf(fault.Invalid, "volume %q of %s: its attribute openebs.io/volgroup: %w", pv.Handle, pv.Driver, err)
		}
	}
	if err := checkVolumeName(pv.Handle); err != nil {
		return "", fault.Errorf(fault.Invalid, "volume %q of %s: %w", pv.Handle, pv.Driver, err)
	}
	return group + "/" + pv.Handle, nil
}
