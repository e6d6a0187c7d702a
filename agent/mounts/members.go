package mounts

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// complete finds what a filesystem stands on besides the device of its number.
func (r reader) complete(f *Filesystem, options string) {
	if own, ok := r.table.Device(f.ID); ok {
		f.Members = []Device{own.ID}
	}
	switch f.Type {
	case "btrfs":
		r.completeBtrfs(f)
	case "xfs":
		r.completeXFS(f, options)
	case "ext3", "ext4":
		r.completeExt(f)
	case "f2fs":
		r.completeF2FS(f)
	case "overlay":
		r.completeOverlay(f, options)
	}
}

// completeBtrfs takes the devices from /sys/fs/btrfs, where the folder is that of the filesystem's UUID: the one that
// has the mount's source among its devices. (The kernel shows a device that is part of the filesystem now, not the
// words of the mount command: fs/btrfs/super.c, btrfs_show_devname.) Each mount shows the number of its subvolume.
func (r reader) completeBtrfs(f *Filesystem) {
	for _, m := range f.Mounts {
		if !r.table.reachable(m) {
			continue
		}
		if st, err := r.look(m.Point); err == nil {
			f.addStat(MakeDevice(st.Dev_major, st.Dev_minor))
		}
	}
	source, err := r.device(f.Source)
	if err != nil {
		f.Unknown = err.Error()
		return
	}
	folders, _ := filepath.Glob(r.Path("/sys/fs/btrfs/*/devices"))
	for _, folder := range folders {
		var members []Device
		entries, _ := os.ReadDir(folder)
		for _, e := range entries {
			if id, ok := r.names[e.Name()]; ok {
				members = append(members, id)
			} else {
				f.Unknown = fmt.Sprintf("its device %s is not in sysfs", e.Name())
			}
		}
		if slices.Contains(members, source) {
			f.Members = members
			return
		}
		f.Unknown = ""
	}
	f.Unknown = fmt.Sprintf("no filesystem in /sys/fs/btrfs has the device %s", f.Source)
}

func (f *Filesystem) addStat(d Device) {
	if d != f.ID && !slices.Contains(f.Stats, d) {
		f.Stats = append(f.Stats, d)
	}
}

// completeXFS finds an external log and a realtime device by the options that name them (xfs(5)).
func (r reader) completeXFS(f *Filesystem, options string) {
	for _, o := range strings.Split(options, ",") {
		key, value, _ := strings.Cut(o, "=")
		if key != "logdev" && key != "rtdev" {
			continue
		}
		id, err := r.device(unescape(value))
		if err != nil {
			f.Unknown = fmt.Sprintf("%s: %v", key, err)
			return
		}
		f.Members = append(f.Members, id)
	}
}

// completeExt finds an external journal. No option shows it. But each journal in use has a folder in /proc/fs/jbd2,
// named after the filesystem's device and an inode number if it is a file in it, after the journal's own device if it
// is external (fs/jbd2/journal.c); and the journal's thread, whose pid /sys/fs/ext4/*/journal_task gives, bears that
// name too, but is not to be seen from another pid namespace.
func (r reader) completeExt(f *Filesystem) {
	own, ok := r.table.Device(f.ID)
	if !ok {
		return
	}
	journals := map[string]Device{} // the external ones
	entries, _ := os.ReadDir(r.Path("/proc/fs/jbd2"))
	for _, e := range entries {
		if id, ok := r.names[e.Name()]; ok {
			journals[e.Name()] = id
		} else if i := strings.LastIndexByte(e.Name(), '-'); i > 0 && e.Name()[:i] == own.Name {
			return
		}
	}
	pid, err := readLine(r.Path("/sys/fs/ext4/" + own.Name + "/journal_task"))
	if err != nil || pid == "<none>" {
		return // without a journal
	}
	comm, _ := readLine(r.Path("/proc/" + pid + "/comm"))
	if id, ok := journals[strings.TrimPrefix(comm, "jbd2/")]; ok {
		f.Members = append(f.Members, id)
		return
	}
	if len(journals) != 1 {
		f.Unknown = "it has an external journal, and which device that is cannot be told from here"
		return
	}
	f.Members = slices.AppendSeq(f.Members, maps.Values(journals))
}

// completeF2FS reads the devices from the superblock, because the kernel shows them nowhere (include/linux/f2fs_fs.h,
// struct f2fs_super_block: devs). The list is empty when there is only one, and begins with that one otherwise.
func (r reader) completeF2FS(f *Filesystem) {
	const superblock, list, entry, count, nameLen = 1024, 2201, 68, 8, 64
	own, ok := r.table.Device(f.ID)
	if !ok {
		return
	}
	disk, err := r.openDevice(own, 0)
	if err != nil {
		f.Unknown = "its superblock cannot be read: " + err.Error()
		return
	}
	defer disk.Close()
	var devs [count * entry]byte
	if _, err := disk.ReadAt(devs[:], superblock+list); err != nil {
		f.Unknown = "its superblock cannot be read: " + err.Error()
		return
	}
	for i := range count {
		name, _, _ := bytes.Cut(devs[i*entry:][:nameLen], []byte{0})
		if i == 0 || len(name) == 0 {
			continue
		}
		id, err := r.device(string(name))
		if err != nil {
			f.Unknown = err.Error()
			return
		}
		f.Members = append(f.Members, id)
	}
}

// completeOverlay reads the layers from the options (kernel: Documentation/filesystems/overlayfs.rst). They are names
// from the mount namespace in which the overlay was mounted, so it is checked that the writable one is to be seen here.
func (r reader) completeOverlay(f *Filesystem, options string) {
	add := func(role Role, paths ...string) {
		for _, p := range paths {
			if real, err := r.Resolve(r.table, p); err == nil {
				p = real
			}
			f.Layers = append(f.Layers, Layer{Role: role, Path: p})
			if role != Upper {
				continue
			}
			if _, err := r.look(p); err != nil && !errors.Is(err, unix.EREMOTE) {
				f.Unknown = fmt.Sprintf("its upperdir %s is not to be seen from here: %v", p, err)
			}
		}
	}
	for _, o := range strings.Split(options, ",") {
		key, value, _ := strings.Cut(o, "=")
		value = unescape(value)
		switch key {
		case "upperdir":
			add(Upper, splitFolders(value, false)...)
		case "workdir":
			add(Work, splitFolders(value, false)...)
		case "lowerdir":
			add(Lower, splitFolders(value, true)...)
		case "lowerdir+", "datadir+": // one folder each, without backslashes
			add(Lower, value)
		}
	}
}

// splitFolders undoes the backslashes that an overlay's options have before special characters in a name, and splits a
// list at its bare colons; an empty name in it separates the layers that hold data only.
func splitFolders(value string, list bool) (folders []string) {
	var name strings.Builder
	for i := 0; i <= len(value); i++ {
		switch {
		case i == len(value) || list && value[i] == ':':
			if name.Len() > 0 {
				folders = append(folders, name.String())
				name.Reset()
			}
		case value[i] == '\\' && i+1 < len(value):
			i++
			name.WriteByte(value[i])
		default:
			name.WriteByte(value[i])
		}
	}
	return folders
}

// device finds a block device by a path in /dev: by its name in sysfs, or else by what the path leads to.
func (r reader) device(path string) (Device, error) {
	if name, ok := strings.CutPrefix(path, "/dev/"); ok {
		if id, ok := r.names[name]; ok {
			return id, nil
		}
		if id, ok := r.names[strings.ReplaceAll(name, "/", "!")]; ok {
			return id, nil
		}
	}
	real, err := r.Resolve(r.table, path)
	if err != nil {
		return 0, err
	}
	st, err := r.look(real)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", path, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return 0, fmt.Errorf("%s is not a block device", path)
	}
	return MakeDevice(st.Rdev_major, st.Rdev_minor), nil
}

// unescape undoes the kernel's \ooo (fs/seq_file.c, mangle_path), which package mountinfo leaves in the options.
func unescape(s string) string {
	octal := func(c byte) bool { return c >= '0' && c <= '7' }
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) && s[i+1] <= '3' && octal(s[i+1]) && octal(s[i+2]) && octal(s[i+3]) {
			b.WriteByte((s[i+1]-'0')<<6 | (s[i+2]-'0')<<3 | (s[i+3] - '0'))
			i += 3
			continue
		}
		b.WriteByte(s[i])
	}
	return b.String()
}
