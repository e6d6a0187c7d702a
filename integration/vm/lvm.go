package vm

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// modules are loaded always: LVM asks for dm-snapshot even when it makes a thin snapshot.
var modules = []string{"loop", "dm-mod", "dm-thin-pool", "dm-snapshot", "xfs", "btrfs", "ext4"}

// configureLVM writes an lvm.conf that sees only these devices and returns the environment that
// makes LVM's programs and dmsetup use it. There is no udevd in a guest: they make their device nodes themselves. The
// names of the settings are from lvm.conf(5).
func configureLVM(dir string, devices []string) ([]string, error) {
	var accept strings.Builder
	for _, d := range devices {
		fmt.Fprintf(&accept, `"a|^%s$|", `, d)
	}
	conf := fmt.Sprintf(`devices {
	dir = "/dev"
	scan = [ "/dev" ]
	filter = [ %s"r|.*|" ]
	types = [ "ubd", 16 ]
	obtain_device_list_from_udev = 0
	external_device_info_source = "none"
	use_devicesfile = 0
}
activation {
	udev_sync = 0
	udev_rules = 0
	verify_udev_operations = 0
	monitoring = 0
}
backup {
	backup = 0
	archive = 0
}
global {
	use_lvmpolld = 0
	event_activation = 0
	locking_dir = "%s/lock"
}
`, accept.String(), dir)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	return []string{"LVM_SYSTEM_DIR=" + dir, "DM_DISABLE_UDEV=1", "LVM_SUPPRESS_FD_WARNINGS=1"},
		os.WriteFile(filepath.Join(dir, "lvm.conf"), []byte(conf), 0o644)
}
