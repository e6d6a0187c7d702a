package ceph

import (
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

const (
	// noGroup is the group of subvolumes that are in none, as Ceph's manager names its directory.
	noGroup = "_nogroup"
	// volumesDir is where the manager keeps subvolumes: /volumes/GROUP/SUBVOLUME. Source: src/pybind/mgr/volumes/fs/vol_spec.py.
	volumesDir = "/volumes"
	// snapDir is the hidden directory of snapshots that every directory has.
	snapDir = ".snap"
	// growing is the directory in which the tree of a subvolume that is being restored grows. Beside other volumes a hash follows.
	growing = ".stillpoint-restore"
)

// treeName is where a tree is: a subvolume, or a plain directory (dir is set, absolute).
type treeName struct{ fs, group, subvolume, dir string }

// String is the canonical id of the volume.
func (n treeName) String() string {
	if n.dir != "" {
		return n.fs + ":" + n.dir
	}
	return n.fs + "/" + n.group + "/" + n.subvolume
}

func (n treeName) id(backend string) adapters.VolumeID {
	return adapters.VolumeID{Backend: backend, ID: n.String()}
}

// top is the directory whose snapshots are the volume's.
func (n treeName) top() string {
	if n.dir != "" {
		return n.dir
	}
	return volumesDir + "/" + n.group + "/" + n.subvolume
}

// snapshot is the path of a snapshot.
func (n treeName) snapshot(name string) string {
	if n.dir == "/" {
		return "/" + snapDir + "/" + name
	}
	return n.top() + "/" + snapDir + "/" + name
}

// mgrGroup is the group as the manager's commands want it: empty for none.
func (n treeName) mgrGroup() string {
	if n.group == noGroup {
		return ""
	}
	return n.group
}

// parseTreeName reads a volume's id. With a filesystem, every other one is refused. Errors are Invalid.
func parseTreeName(id, fs string) (treeName, error) {
	bad := func(why string) (treeName, error) {
		return treeName{}, fault.Errorf(fault.Invalid, "volume %q: %s; a subvolume is written FS/GROUP/SUBVOLUME (in no group FS/SUBVOLUME), any other directory FS:/PATH", id, why)
	}
	if strings.ContainsFunc(id, func(r rune) bool { return r < ' ' || r == 0x7f }) || !utf8.ValidString(id) {
		return bad("it has control characters, or is not UTF-8")
	}
	var n treeName
	if i := strings.IndexAny(id, ":/"); i >= 0 && id[i] == ':' {
		n = treeName{fs: id[:i], dir: id[i+1:]}
		if !strings.HasPrefix(n.dir, "/") {
			return bad("a path begins with a slash")
		}
		if n.dir != "/" {
			if err := checkTreePath(n.dir[1:]); err != nil {
				return bad("it is no plain path")
			}
		}
		if n.dir == volumesDir || strings.HasPrefix(n.dir, volumesDir+"/") {
			return bad("what is below " + volumesDir + " is the manager's")
		}
	} else {
		switch parts := strings.Split(id, "/"); len(parts) {
		case 2:
			n = treeName{fs: parts[0], group: noGroup, subvolume: parts[1]}
		case 3:
			n = treeName{fs: parts[0], group: parts[1], subvolume: parts[2]}
		default:
			return bad("it has two or three parts")
		}
		for _, p := range []string{n.group, n.subvolume} {
			if p == "" || p == "." || p == ".." || p == snapDir || strings.HasPrefix(p, "_") && p != noGroup || n.subvolume == noGroup {
				return bad(fmt.Sprintf("%q names no subvolume or group", p))
			}
		}
	}
	switch {
	case n.fs == "":
		return bad("no filesystem is named")
	case strings.Contains(n.String(), growing):
		return bad("it is an unfinished restore")
	case fs != "" && n.fs != fs:
		return bad(fmt.Sprintf("this backend is limited to the filesystem %s", fs))
	}
	return n, nil
}

// checkTreePath refuses a path that no tree in CephFS has.
func checkTreePath(path string) error {
	if path == "" {
		return nil
	}
	for element := range strings.SplitSeq(path, "/") {
		switch {
		case element == "" || element == "." || element == ".." || strings.IndexByte(element, 0) >= 0 || len(element) > 255:
			return fault.Errorf(fault.Invalid, "path %q: an element of a path is a name of at most 255 bytes, not %q", path, element)
		case element == snapDir:
			return fault.Errorf(fault.Invalid, "path %q: CephFS keeps snapshots under the name %s, nothing else can have it", path, snapDir)
		}
	}
	return nil
}

func splitPath(path string) (dir, name string) {
	i := strings.LastIndexByte(path, '/')
	return path[:max(i, 0)], path[i+1:]
}

// below joins a directory and a relative path.
func below(dir, path string) string {
	if path == "" {
		return dir
	}
	return strings.TrimSuffix(dir, "/") + "/" + path
}

// parseDescription reads the manager's description of a subvolume: lines of KEY = VALUE in sections.
func parseDescription(name treeName, text string) (d description, err error) {
	var path string
	section := ""
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if strings.HasPrefix(line, "[") {
			section = line
		}
		key, value, _ := strings.Cut(line, "=")
		if section != "[GLOBAL]" {
			continue
		}
		switch strings.TrimSpace(key) {
		case "path":
			path = strings.TrimSpace(value)
		case "state":
			d.state = strings.TrimSpace(value)
		}
	}
	rest, ok := strings.CutPrefix(path, name.top()+"/")
	if d.data = rest; !ok || checkTreePath(rest) != nil || rest == "" || d.state == "" {
		return d, fault.Errorf(fault.Unsupported, "the manager's description of the subvolume is none that is known: path %q, state %q", path, d.state)
	}
	return d, nil
}

// description is what the manager has written about a subvolume: its state, and where below its top its data is.
type description struct{ state, data string }

// complete is the state of a subvolume that is whole.
const complete = "complete"

// keptAttributes are the prefixes of the attributes that can be set again as they were read. The others are CephFS's own
// answers (ceph.dir.entries, …).
var keptAttributes = []string{"user.", "trusted.", "security.", "system.posix_acl_access", "system.posix_acl_default"}

func isKeptAttribute(name string) bool {
	return slices.ContainsFunc(keptAttributes, func(prefix string) bool { return strings.HasPrefix(name, prefix) })
}

func hasAttribute(all []adapters.Attribute, name string) bool {
	return slices.ContainsFunc(all, func(a adapters.Attribute) bool { return a.Name == name })
}
