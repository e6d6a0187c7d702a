package freezer

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// mount is one line of mountinfo (proc_pid_mountinfo(5)).
type mount struct {
	ID, Parent          int
	Device              Device
	Point, Type, Source string
}

func readMounts(path string) ([]mount, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	return parseMounts(b)
}

func parseMounts(b []byte) ([]mount, error) {
	var out []mount
	for line := range bytes.Lines(b) {
		head, tail, ok := strings.Cut(strings.TrimSuffix(string(line), "\n"), " - ")
		h, t := strings.Split(head, " "), strings.Split(tail, " ")
		if !ok || len(h) < 6 || len(t) < 2 {
			return nil, fmt.Errorf("mountinfo: cannot read the line %q", line)
		}
		id, err1 := strconv.Atoi(h[0])
		parent, err2 := strconv.Atoi(h[1])
		device, err3 := ParseDevice(h[2])
		if err1 != nil || err2 != nil || err3 != nil {
			return nil, fmt.Errorf("mountinfo: cannot read the line %q", line)
		}
		out = append(out, mount{id, parent, device, unescape(h[4]), t[0], unescape(t[1])})
	}
	return out, nil
}

// unescape resolves the octal escapes of mountinfo.
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// route gives the mounts that the kernel passes through on its way to a clean absolute path without symbolic links;
// the last one holds it. It looks at nothing but the list, so a path below a dead server costs nothing.
func route(mounts []mount, path string) []mount {
	at := slices.IndexFunc(mounts, func(m mount) bool {
		return m.Point == "/" && !slices.ContainsFunc(mounts, func(p mount) bool { return p.ID == m.Parent && p.ID != m.ID })
	})
	var passed []mount
	for at >= 0 && len(passed) <= len(mounts) {
		here := mounts[at]
		passed = append(passed, here)
		at = -1
		for i, m := range mounts {
			if m.Parent == here.ID && m.ID != here.ID && within(path, m.Point) && (at < 0 || len(m.Point) <= len(mounts[at].Point)) {
				at = i
			}
		}
	}
	return passed
}

// within tells whether path is folder or lies below it.
func within(path, folder string) bool {
	return folder == "/" || path == folder || strings.HasPrefix(path, folder+"/")
}

// mountOf gives the mount that an open descriptor came through.
func mountOf(mounts []mount, fd int) (mount, bool) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", fd))
	if err != nil {
		return mount{}, false
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "mnt_id:"); ok {
			id, err := strconv.Atoi(strings.TrimSpace(v))
			i := slices.IndexFunc(mounts, func(m mount) bool { return m.ID == id })
			if err == nil && i >= 0 {
				return mounts[i], true
			}
		}
	}
	return mount{}, false
}

// storedOn gives the superblocks on whose files the superblock d, mounted from source, is stored, through loop
// devices, partitions, device-mapper and md, all the way down. It reads sysfs only.
func storedOn(mounts []mount, d Device, source string) []Device {
	var found []Device
	seen := map[string]bool{}
	var visit func(d Device, source string)
	device := func(dir string) {
		visitBlock(dir, seen, func(file string) {
			passed := route(mounts, file)
			if len(passed) == 0 {
				return
			}
			m := passed[len(passed)-1]
			if !slices.Contains(found, m.Device) {
				found = append(found, m.Device)
				visit(m.Device, m.Source)
			}
		})
	}
	visit = func(d Device, source string) {
		device("/sys/dev/block/" + d.String())
		var st unix.Stat_t
		if strings.HasPrefix(source, "/dev/") && unix.Stat(source, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFBLK {
			dir := "/sys/dev/block/" + Device(st.Rdev).String()
			device(dir)
			if real, err := filepath.EvalSymlinks(dir); err == nil { // the other members of a btrfs
				members, _ := filepath.Glob("/sys/fs/btrfs/*/devices/" + filepath.Base(real))
				for _, m := range members {
					all, _ := filepath.Glob(filepath.Dir(m) + "/*")
					for _, other := range all {
						device(other)
					}
				}
			}
		}
	}
	visit(d, source)
	return found
}

// visitBlock walks down from a block device's folder in sysfs to the files that loop devices are made of.
func visitBlock(dir string, seen map[string]bool, file func(path string)) {
	dir, err := filepath.EvalSymlinks(dir)
	if err != nil || seen[dir] {
		return
	}
	seen[dir] = true
	if b, err := os.ReadFile(dir + "/loop/backing_file"); err == nil {
		file(strings.TrimSuffix(strings.TrimSuffix(string(b), "\n"), " (deleted)"))
	}
	if _, err := os.Stat(dir + "/partition"); err == nil {
		visitBlock(filepath.Dir(dir), seen, file)
	}
	slaves, _ := filepath.Glob(dir + "/slaves/*")
	for _, s := range slaves {
		visitBlock(s, seen, file)
	}
}
