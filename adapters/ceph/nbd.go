package ceph

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/adapters"
)

// nbdMappings finds the images that rbd-nbd has mapped, as `rbd-nbd list-mapped` does: /sys/block/nbd*/pid is the process
// that serves a device (drivers/block/nbd.c), and its command line names the image. Neither tells which cluster that is, so
// the backend's parameter nbd does.
func nbdMappings(sysBlock, proc string) (all []mapping, err error) {
	devices, err := filepath.Glob(filepath.Join(sysBlock, "nbd*"))
	if err != nil {
		return nil, err
	}
	for _, folder := range devices {
		pid, err := readLine(filepath.Join(folder, "pid"))
		if err != nil {
			continue // not connected
		}
		line, err := os.ReadFile(filepath.Join(proc, pid, "cmdline"))
		if err != nil {
			continue // gone
		}
		name, live, ok := parseNBD(strings.Split(strings.TrimSuffix(string(line), "\x00"), "\x00"))
		if !ok {
			continue
		}
		device, err := number(folder)
		if err != nil {
			return nil, err
		}
		if device == 0 {
			continue
		}
		all = append(all, mapping{name: name, live: live, device: device, path: "/dev/" + filepath.Base(folder)})
	}
	return all, nil
}

// nbdValued are the options of rbd-nbd, and of every client of Ceph, whose value is an argument of its own
// (src/tools/rbd_nbd/rbd-nbd.cc, ceph(8)).
var nbdValued = strings.Fields("--device --max_part --nbds_max --timeout --reattach-timeout --io-timeout --quiesce-hook --cookie --snap-id --log-file --admin-socket " +
	"-c --conf --cluster -i --id -n --name --user -m --mon-host --mon_host -k --keyring --key --keyfile")

// parseNBD reads the command line of an rbd-nbd that serves a device: what it maps, and whether that is the image itself
// and not a snapshot of it.
func parseNBD(args []string) (name imageName, live, ok bool) {
	if len(args) == 0 || filepath.Base(args[0]) != "rbd-nbd" {
		return name, false, false
	}
	var words []string
	live = true
	for i := 1; i < len(args); i++ {
		switch option, _, _ := strings.Cut(args[i], "="); {
		case option == "--snap-id":
			live = false
			fallthrough
		case slices.Contains(nbdValued, args[i]):
			if option == args[i] {
				i++
			}
		case !strings.HasPrefix(args[i], "-"):
			words = append(words, args[i])
		}
	}
	if len(words) != 2 || words[0] != "map" && words[0] != "attach" {
		return name, false, false
	}
	spec, snapshot, _ := strings.Cut(words[1], "@")
	const defaultPool = "rbd"
	name, err := parseImageName(spec, "")
	if !strings.Contains(spec, "/") {
		name, err = parseImageName(spec, defaultPool)
	}
	return name, live && snapshot == "", err == nil
}

// number is a block device's; 0 if it is just going away.
func number(folder string) (adapters.Device, error) {
	text, err := readLine(filepath.Join(folder, "dev"))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
		return 0, nil
	}
	var major, minor uint32
	if err == nil {
		_, err = fmt.Sscanf(text, "%d:%d", &major, &minor)
	}
	if err != nil {
		return 0, fmt.Errorf("reading the number of %s: %w", filepath.Base(folder), err)
	}
	return adapters.Device(unix.Mkdev(major, minor)), nil
}
