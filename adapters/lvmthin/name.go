package lvmthin

import (
	"fmt"
	"regexp"
	"strings"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

// groupID is the UUID of a volume group, in LVM's form: 32 letters and digits in seven parts.
type groupID string

var (
	uuidPattern  = regexp.MustCompile(`^[0-9A-Za-z]{6}(?:-[0-9A-Za-z]{4}){5}-[0-9A-Za-z]{6}$`)
	namePattern  = regexp.MustCompile(`^[0-9A-Za-z+_.][0-9A-Za-z+_.-]*$`)
	reservedPart = []string{"_cdata", "_cmeta", "_corig", "_cpool", "_cvol", "_imeta", "_iorig", "_mimage", "_mlog", "_pmspare",
		"_rimage", "_rmeta", "_tdata", "_tmeta", "_vdata", "_vorigin", "_wcorig"}
	reservedStart = []string{"snapshot", "pvmove"}
)

// nameMax is the longest name that device-mapper keeps, in bytes (DM_NAME_LEN in linux/dm-ioctl.h, without the NUL).
const nameMax = 127

// checkGroupName refuses what cannot be the name of a volume group: lvm(8), "VALID NAMES".
func checkGroupName(name string) error {
	if !namePattern.MatchString(name) || name == "." || name == ".." || len(name) > nameMax {
		return fault.Errorf(fault.Invalid, "%q cannot be a volume group: LVM's names are of a-z A-Z 0-9 + _ . -, do not begin with a hyphen and have at most %d bytes", name, nameMax)
	}
	return nil
}

// checkVolumeName refuses what cannot be the name of a logical volume that people use: lvm(8), "VALID NAMES", and
// apply_lvname_restrictions in lvm2's lib/misc/lvm-string.c, which reserves every name that begins with the two words.
func checkVolumeName(name string) error {
	if !namePattern.MatchString(name) || name == "." || name == ".." || len(name) > nameMax {
		return fault.Errorf(fault.Invalid, "%q cannot be a logical volume: LVM's names are of a-z A-Z 0-9 + _ . -, do not begin with a hyphen and have at most %d bytes", name, nameMax)
	}
	for _, s := range reservedStart {
		if strings.HasPrefix(name, s) {
			return fault.Errorf(fault.Invalid, "%q cannot be a logical volume: LVM keeps names that begin with %q for itself", name, s)
		}
	}
	for _, s := range reservedPart {
		if strings.Contains(name, s) {
			return fault.Errorf(fault.Invalid, "%q cannot be a logical volume that is used: LVM keeps names with %q in them for itself", name, s)
		}
	}
	return nil
}

// address is a volume's id taken apart. Group is empty where any group will do, a UUID, or a name that a person typed.
type address struct {
	group  string
	isUUID bool
	volume string
}

// anyGroup stands for the only group that has such a volume.
const anyGroup = "*"

// parseID takes an id apart, a typed or a canonical one. Errors are Invalid.
func (a *Adapter) parseID(id adapters.VolumeID) (address, error) {
	if id.Backend != a.backend {
		return address{}, fault.Errorf(fault.Invalid, "volume %s: this is backend %s", id, a.backend)
	}
	group, volume, ok := strings.Cut(strings.TrimPrefix(id.ID, "/dev/"), "/")
	if !ok || group == "mapper" && strings.HasPrefix(id.ID, "/dev/") {
		return address{}, fault.Errorf(fault.Invalid, "volume %s: a volume of LVM is written VG/LV, or VG-UUID/LV", id)
	}
	if err := checkVolumeName(volume); err != nil {
		return address{}, fault.Errorf(fault.Invalid, "volume %s: %w", id, err)
	}
	switch {
	case uuidPattern.MatchString(group):
		return address{group: group, isUUID: true, volume: volume}, nil
	case group == anyGroup:
		return address{volume: volume}, nil
	}
	if err := checkGroupName(group); err != nil {
		return address{}, fault.Errorf(fault.Invalid, "volume %s: %w", id, err)
	}
	return address{group: group, volume: volume}, nil
}

// Our own logical volumes. A hyphen keeps the names clear of LVM's reserved parts, which begin with an underscore.
const (
	snapshotPrefix = "sp-"
	restorePrefix  = "sp-restore-"
	scratchPrefix  = "sp-scratch-"
)

// snapshotVolume is the logical volume of a snapshot: the volume's name as 80 bits of hash, and the snapshot's own. Two
// volumes with one hash, should that ever happen, are told apart by the tags.
func snapshotVolume(volume, snapshot string) string {
	return snapshotPrefix + adapters.ShortName(volume)[:16] + "." + snapshot
}

// restoreVolume is the logical volume of a restore that is not finished.
func restoreVolume(volume, token string) string {
	return restorePrefix + adapters.ShortName(volume+"\x00"+token)
}

// mapperUUID is device-mapper's UUID of a logical volume, which LVM makes of its own without the hyphens and a layer.
func mapperUUID(group groupID, volume, layer string) string {
	s := "LVM-" + strings.ReplaceAll(string(group), "-", "") + strings.ReplaceAll(volume, "-", "")
	if layer != "" {
		s += "-" + layer
	}
	return s
}

// mapperName is device-mapper's name of a logical volume: hyphens doubled, so that one separates (dm_build_dm_name).
func mapperName(group, volume string) string {
	double := strings.NewReplacer("-", "--").Replace
	return fmt.Sprintf("%s-%s", double(group), double(volume))
}
