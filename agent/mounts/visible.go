package mounts

import (
	"path"
	"slices"
	"strings"

	"stillpoint.io/stillpoint/fault"
)

// At returns the mount that shows what is at an absolute path: the longest one that is not covered by another. The path
// is taken literally; Host.Resolve follows symbolic links first. There is none only in a table without "/".
func (t Table) At(p string) (Mount, bool) {
	m, _ := t.walk(p)
	return m, m.ID != 0
}

// OpenAt returns the mount through which to open a filesystem: one whose point really shows it, for which no remote
// filesystem has to be crossed, of the whole filesystem rather than of a folder, and else the oldest. NotFound if the
// filesystem is not in the table, Unsupported if it is remote or every mount of it is covered or out of reach.
func (t Table) OpenAt(fs Device) (Mount, error) {
	f, err := t.find(fs)
	if err != nil {
		return Mount{}, err
	}
	if f.Remote {
		return Mount{}, fault.Errorf(fault.Unsupported, "%s: not opened, because its server might never answer", f)
	}
	var best Mount
	for _, m := range f.Mounts {
		if t.reachable(m) && (best.ID == 0 || best.Root != "/" && m.Root == "/") {
			best = m
		}
	}
	if best.ID == 0 {
		return best, fault.Errorf(fault.Unsupported, "%s: every mount of it is covered by another, or lies behind a network or FUSE filesystem; mount it once more elsewhere", f)
	}
	return best, nil
}

// Nested returns the mounts of other filesystems that sit on a filesystem's folders, on whichever of its mounts and
// however deep, in order of their IDs.
func (t Table) Nested(fs Device) []Mount {
	var found []Mount
	for _, m := range t.mounts {
		if m.Filesystem == fs {
			continue
		}
		up, ok := t.parent(m)
		for range t.mounts { // enough for any depth, and an end to a circle in a made-up table
			if !ok || up.Filesystem == fs {
				break
			}
			up, ok = t.parent(up)
		}
		if ok && up.Filesystem == fs {
			found = append(found, m)
		}
	}
	slices.SortFunc(found, func(a, b Mount) int { return a.ID - b.ID })
	return found
}

// indexMounts notes which mount is on top of which place. Of several on one place, which older kernels made by
// propagation, the youngest is on top.
func (t *Table) indexMounts() {
	for _, f := range t.filesystems {
		for _, m := range f.Mounts {
			t.mounts[m.ID] = m
		}
	}
	for _, m := range t.mounts {
		if _, ok := t.parent(m); !ok {
			if m.Point == "/" && (t.root == 0 || m.ID < t.root) {
				t.root = m.ID
			}
			continue
		}
		at := place{m.Parent, m.Point}
		t.children[at] = max(t.children[at], m.ID)
	}
}

func (t Table) parent(m Mount) (Mount, bool) {
	up, ok := t.mounts[m.Parent]
	return up, ok && up.ID != m.ID
}

// walk goes down a path as the kernel does, stepping onto whatever is mounted where it passes. It returns the mount at
// the end, and whether a remote one had to be crossed before: the first mount does not count, because every process
// stands on it already.
func (t Table) walk(p string) (at Mount, crossed bool) {
	p = path.Clean("/" + p)
	at = t.mounts[t.root]
	for end := 1; ; {
		for { // mounts can be piled upon one place
			top, ok := t.children[place{at.ID, p[:end]}]
			if !ok || top == at.ID {
				break
			}
			crossed = crossed || at.ID != t.root && t.isRemote(at)
			at = t.mounts[top]
		}
		if end == len(p) {
			return at, crossed
		}
		from := end
		if end > 1 {
			from++
		}
		if i := strings.IndexByte(p[from:], '/'); i >= 0 {
			end = from + i
		} else {
			end = len(p)
		}
	}
}

// reachable reports whether a mount's point shows that mount, and can be walked to without meeting a remote one.
func (t Table) reachable(m Mount) bool {
	at, crossed := t.walk(m.Point)
	return at.ID == m.ID && !crossed
}

// touchable reports whether looking at a path can wait only for this kernel.
func (t Table) touchable(p string) bool {
	at, crossed := t.walk(p)
	return at.ID != 0 && !crossed && !t.isRemote(at)
}

func (t Table) isRemote(m Mount) bool { return t.filesystems[t.byID[m.Filesystem]].Remote }

// indexLayers finds the filesystems under overlays. One with a remote layer is remote itself.
func (t *Table) indexLayers() {
	for i := range t.filesystems {
		f := &t.filesystems[i]
		f.Layers = slices.Clone(f.Layers)
		for j, l := range f.Layers {
			if l.Filesystem != 0 || f.Unknown != "" || !path.IsAbs(l.Path) {
				continue
			}
			if m, ok := t.At(l.Path); ok && m.Filesystem != f.ID {
				f.Layers[j].Filesystem = m.Filesystem
			}
		}
	}
	for changed := true; changed; { // an overlay may lie on an overlay
		changed = false
		for i := range t.filesystems {
			f := &t.filesystems[i]
			if !f.Remote && slices.ContainsFunc(f.Layers, func(l Layer) bool {
				below, ok := t.byID[l.Filesystem]
				return ok && t.filesystems[below].Remote
			}) {
				f.Remote, changed = true, true
			}
		}
	}
}
