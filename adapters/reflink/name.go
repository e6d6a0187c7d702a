package reflink

import (
	"errors"
	"os"
	"path"
	"regexp"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

var canonicalID = regexp.MustCompile(`(?s)^([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})(/.+)$`)

// parseID takes a canonical id apart: the filesystem's UUID, and the path inside it.
func parseID(id adapters.VolumeID) (uuid, inside string, err error) {
	m := canonicalID.FindStringSubmatch(id.ID)
	switch {
	case m == nil:
		return "", "", fault.Errorf(fault.Invalid, "volume %s: a canonical id is <filesystem UUID>/<path inside the filesystem>", id)
	case path.Clean(m[2]) != m[2]:
		return "", "", fault.Errorf(fault.Invalid, "volume %s: the path inside the filesystem has empty, . or .. elements", id)
	case slices.Contains(strings.Split(m[2], "/"), folderName):
		return "", "", fault.Errorf(fault.Invalid, "volume %s: what lies in a folder %s is a snapshot, not a volume", id, folderName)
	case !utf8.ValidString(m[2]) || strings.ContainsFunc(m[2], func(r rune) bool { return r < ' ' || r == 0x7f }):
		return "", "", fault.Errorf(fault.Invalid, "volume %q: a volume's path is UTF-8 without control characters; rename the file", id.ID)
	}
	return m[1], m[2], nil
}

// canonical turns what a person typed into an id: an absolute path, of which the last element may be missing, a path in a
// pool, or a canonical id already.
func (a *Adapter) canonical(id adapters.VolumeID) (adapters.VolumeID, error) {
	if strings.HasPrefix(id.ID, inPool) {
		var err error
		if id, err = a.find(id); err != nil {
			return id, err
		}
	}
	if !path.IsAbs(id.ID) {
		_, _, err := parseID(id)
		return id, err
	}
	f, err := os.OpenFile(id.ID, unix.O_PATH|unix.O_CLOEXEC, 0)
	last := ""
	if errors.Is(err, unix.ENOENT) {
		clean := path.Clean(id.ID)
		if target, err := os.Readlink(clean); err == nil {
			return id, fault.Errorf(fault.NotFound, "volume %s: a symbolic link to %s, which does not exist", id, target)
		}
		last = path.Base(clean)
		f, err = os.OpenFile(path.Dir(clean), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	}
	if err != nil {
		return id, failed(errno(err), "volume %s", id)
	}
	defer f.Close()
	if last == "" {
		if _, err := formOf(f); err != nil {
			return id, failed(err, "volume %s", id)
		}
	}
	canonical, err := a.nameOf(f, last)
	if err != nil {
		return id, failed(errno(err), "volume %s", id)
	}
	_, _, err = parseID(canonical)
	return canonical, err
}

// nameOf is the canonical id of an open file, or of last in an open folder.
func (a *Adapter) nameOf(f *os.File, last string) (adapters.VolumeID, error) {
	id, err := mountID(f)
	if err != nil {
		return adapters.VolumeID{}, err
	}
	infos, err := mountinfo.GetMounts(func(i *mountinfo.Info) (skip, stop bool) { return i.ID != id, i.ID == id })
	if err != nil {
		return adapters.VolumeID{}, err
	}
	if len(infos) == 0 {
		return adapters.VolumeID{}, fault.Errorf(fault.Unavailable, "its mount is not visible in this process's mount namespace")
	}
	m := infos[0]
	if m.FSType != "xfs" && m.FSType != "btrfs" {
		return adapters.VolumeID{}, fault.Errorf(fault.Unsupported, "it lies on %s (%s), which cannot share blocks between files; move it to XFS (reflink=1) or btrfs", m.FSType, m.Mountpoint)
	}
	at, err := os.Readlink(procPath(f))
	if err != nil {
		return adapters.VolumeID{}, err
	}
	below, ok := under(at, m.Mountpoint)
	if !ok {
		return adapters.VolumeID{}, fault.Errorf(fault.Unavailable, "%s does not lie below its mount point %s: it is being moved", at, m.Mountpoint)
	}
	real, err := os.OpenFile(procPath(f), os.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return adapters.VolumeID{}, err
	}
	defer real.Close()
	p, err := identify(real, m.FSType)
	if err != nil {
		return adapters.VolumeID{}, err
	}
	return adapters.VolumeID{Backend: a.backend, ID: p.uuid + path.Join(m.Root, below, last)}, nil
}
