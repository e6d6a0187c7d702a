package treefs

import (
	"bytes"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/adapters"
)

// kept are the prefixes of the attributes that can be set again as they were read. The others are the system's own
// answers (ceph.dir.entries, system.nfs4_acl, …).
var kept = []string{"user.", "trusted.", "security.", "btrfs.", "system.posix_acl_access", "system.posix_acl_default"}

func isKept(name string) bool {
	return slices.ContainsFunc(kept, func(prefix string) bool { return strings.HasPrefix(name, prefix) })
}

// attributes reads the extended attributes of what is at a path, itself if it is a link; of what it leads to with follow.
func attributes(path string, follow bool) ([]adapters.Attribute, error) {
	list, get := unix.Llistxattr, unix.Lgetxattr
	if follow {
		list, get = unix.Listxattr, unix.Getxattr
	}
	names, err := sized(func(p []byte) (int, error) { return list(path, p) })
	if err != nil || len(names) == 0 {
		return nil, err
	}
	var all []adapters.Attribute
	for n := range bytes.SplitSeq(bytes.TrimSuffix(names, []byte{0}), []byte{0}) {
		name := string(n)
		if !isKept(name) {
			continue
		}
		value, err := sized(func(p []byte) (int, error) { return get(path, name, p) })
		if err != nil {
			return nil, failed(err, "attribute %s", name)
		}
		all = append(all, adapters.Attribute{Name: name, Value: value})
	}
	slices.SortFunc(all, func(a, b adapters.Attribute) int { return strings.Compare(a.Name, b.Name) })
	return all, nil
}

// sized calls with a buffer that is large enough. A filesystem without attributes has none.
func sized(call func([]byte) (int, error)) ([]byte, error) {
	for size := 256; ; {
		p := make([]byte, size)
		n, err := call(p)
		switch {
		case err == unix.EOPNOTSUPP:
			return nil, nil
		case err == unix.ERANGE && size < 64<<10: // XATTR_SIZE_MAX and XATTR_LIST_MAX
			size = 64 << 10
		default:
			return p[:max(n, 0)], err
		}
	}
}

// setAttributes makes the attributes of what is at a path these, and removes all others but the labels that the system
// gives to files.
func setAttributes(path string, follow bool, want []adapters.Attribute) error {
	list, set, remove := unix.Llistxattr, unix.Lsetxattr, unix.Lremovexattr
	if follow {
		list, set, remove = unix.Listxattr, unix.Setxattr, unix.Removexattr
	}
	names, err := sized(func(p []byte) (int, error) { return list(path, p) })
	if err != nil {
		return err
	}
	for n := range bytes.SplitSeq(bytes.TrimSuffix(names, []byte{0}), []byte{0}) {
		name := string(n)
		wanted := slices.ContainsFunc(want, func(a adapters.Attribute) bool { return a.Name == name })
		if wanted || !isKept(name) || strings.HasPrefix(name, "security.") {
			continue
		}
		if err := remove(path, name); err != nil && err != unix.ENODATA {
			return failed(err, "removing the attribute %s", name)
		}
	}
	for _, a := range want {
		if err := set(path, a.Name, a.Value, 0); err != nil {
			return failed(err, "setting the attribute %q", a.Name)
		}
	}
	return nil
}
