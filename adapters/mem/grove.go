package mem

import (
	"bytes"
	"maps"
	"slices"
	"strings"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

// A volume that is a tree of files is a map from paths to files. A file is never changed: a change puts another in its
// place, under all its names, with the same number. So a snapshot is a copy of the map, and two entries are the same file,
// unchanged, if they are the same pointer. It is for small trees: most calls look at every path.

// grove is one version of a tree of files, by path; the root's is empty.
type grove map[string]*grown

type grown struct {
	number uint64         // the same as long as the file exists
	entry  adapters.Entry // Name, Link and Unchanged are not set
	data   []byte
}

// Grove is a live volume that is a tree of files, as its user sees it. Its methods are safe in parallel.
type Grove struct{ v *Volume }

// CreateTree makes a volume that is an empty tree of files.
func (s *Store) CreateTree(id string) (*Grove, error) {
	id, err := canonical(id)
	if err != nil {
		return nil, err
	}
	defer s.lock()()
	if s.volumes[id] != nil {
		return nil, fault.Errorf(fault.Busy, "volume %s exists", id)
	}
	v := &Volume{id: id, epoch: 1, files: newGrove()}
	set(&s.volumes, id, v)
	return &Grove{v}, nil
}

func newGrove() grove {
	return grove{"": {number: 1, entry: adapters.Entry{Type: adapters.Directory, Mode: 0o700}}}
}

// form is what a volume or a snapshot holds.
func (g grove) form() adapters.Form {
	if g == nil {
		return adapters.BlockForm
	}
	return adapters.TreeForm
}

// ID is the canonical id: LOCALITY/NAME.
func (x *Grove) ID() string { return x.v.id }

func (x *Grove) Mkdir(path string) error {
	return x.change(func(g grove) error { return g.plant(path, adapters.Entry{Type: adapters.Directory, Mode: 0o700}) })
}

func (x *Grove) Symlink(path, target string) error {
	return x.change(func(g grove) error {
		return g.plant(path, adapters.Entry{Type: adapters.Symlink, Mode: 0o777, Target: target})
	})
}

func (x *Grove) Special(path string, t adapters.FileType, d adapters.Device) error {
	return x.change(func(g grove) error { return g.plant(path, adapters.Entry{Type: t, Mode: 0o600, Device: d}) })
}

// Write writes to a file, and makes it if it is not there.
func (x *Grove) Write(path string, p []byte, off int64) error {
	return x.change(func(g grove) error {
		if g[path] == nil {
			if err := g.plant(path, adapters.Entry{Type: adapters.RegularFile, Mode: 0o600}); err != nil {
				return err
			}
		}
		return g.write(path, p, off)
	})
}

func (x *Grove) Truncate(path string, size int64) error {
	return x.change(func(g grove) error { return g.truncate(path, size) })
}

func (x *Grove) Link(old, path string) error {
	return x.change(func(g grove) error { return g.link(old, path) })
}

func (x *Grove) Describe(path string, e adapters.Entry) error {
	return x.change(func(g grove) error { return g.describe(path, e) })
}

// Rename moves what is at old to a path where nothing is.
func (x *Grove) Rename(old, path string) error {
	return x.change(func(g grove) error {
		if err := g.vacant(path); err != nil {
			return err
		}
		for _, p := range g.below(old) {
			g[path+strings.TrimPrefix(p, old)] = g[p]
			delete(g, p)
		}
		return nil
	})
}

// Remove removes what is at a path, with all below it.
func (x *Grove) Remove(path string) error {
	return x.change(func(g grove) error {
		for _, p := range g.below(path) {
			f := g[p]
			delete(g, p)
			for other, left := range g {
				if left == f { // it has another count of names
					if err := g.replace(other, func(*grown) {}); err != nil {
						return err
					}
					break
				}
			}
		}
		return nil
	})
}

// change runs a change of the live tree.
func (x *Grove) change(do func(grove) error) error {
	x.v.mu.Lock()
	defer x.v.mu.Unlock()
	return do(x.v.files)
}

// vacant checks that something can be made at a path.
func (g grove) vacant(path string) error {
	for element := range strings.SplitSeq(path, "/") {
		if element == "" || element == "." || element == ".." || strings.Contains(element, "\x00") || len(element) > 255 {
			return fault.Errorf(fault.Invalid, "path %q: %q is no name", path, element)
		}
	}
	switch dir := g[above(path)]; {
	case g[path] != nil:
		return fault.Errorf(fault.Busy, "path %q: there is something", path)
	case dir == nil || dir.entry.Type != adapters.Directory:
		return fault.Errorf(fault.NotFound, "path %q: %q is no directory", path, above(path))
	}
	return nil
}

func above(path string) string { return path[:max(0, strings.LastIndexByte(path, '/'))] }

func (g grove) plant(path string, e adapters.Entry) error {
	if err := g.vacant(path); err != nil {
		return err
	}
	number := uint64(0)
	for _, f := range g {
		number = max(number, f.number)
	}
	g[path] = &grown{number: number + 1, entry: e}
	return nil
}

// replace puts another version in the place of a file, under all its names.
func (g grove) replace(path string, change func(*grown)) error {
	old := g[path]
	if old == nil {
		return fault.Errorf(fault.NotFound, "path %q: there is nothing", path)
	}
	f := *old
	change(&f)
	for p, other := range g {
		if other == old {
			g[p] = &f
		}
	}
	return nil
}

func (g grove) write(path string, p []byte, off int64) error {
	return g.replace(path, func(f *grown) {
		size := int64(len(f.data))
		if len(p) > 0 {
			size = max(size, off+int64(len(p)))
		}
		data := make([]byte, size)
		copy(data, f.data)
		copy(data[min(off, size):], p)
		f.data, f.entry.Size = data, size
	})
}

func (g grove) truncate(path string, size int64) error {
	return g.replace(path, func(f *grown) {
		data := make([]byte, size)
		copy(data, f.data)
		f.data, f.entry.Size = data, size
	})
}

func (g grove) link(old, path string) error {
	if f := g[old]; f == nil || f.entry.Type == adapters.Directory {
		return fault.Errorf(fault.NotFound, "path %q: there is no file", old)
	}
	if err := g.vacant(path); err != nil {
		return err
	}
	g[path] = g[old]
	return g.replace(old, func(*grown) {}) // it has another count of names
}

func (g grove) describe(path string, e adapters.Entry) error {
	return g.replace(path, func(f *grown) {
		f.entry.UID, f.entry.GID, f.entry.Modified, f.entry.Attributes = e.UID, e.GID, e.Modified, nil
		if f.entry.Type != adapters.Symlink {
			f.entry.Mode = e.Mode
		}
		for _, a := range e.Attributes {
			f.entry.Attributes = append(f.entry.Attributes, adapters.Attribute{Name: a.Name, Value: bytes.Clone(a.Value)})
		}
	})
}

// below lists the paths at and below one.
func (g grove) below(path string) []string {
	var paths []string
	for p := range g {
		if p == path || path == "" || strings.HasPrefix(p, path+"/") {
			paths = append(paths, p)
		}
	}
	return paths
}

// children lists what is in a directory, in a tree's order.
func (g grove) children(dir string) []string {
	paths := slices.DeleteFunc(slices.Sorted(maps.Keys(g)), func(p string) bool { return p == "" || above(p) != dir })
	slices.SortStableFunc(paths, func(a, b string) int {
		switch x, y := g[a].entry.Type == adapters.Directory, g[b].entry.Type == adapters.Directory; {
		case x && !y:
			return -1
		case y && !x:
			return 1
		}
		return 0
	})
	return paths
}

// look describes what is at a path.
func (g grove) look(path string, base grove) (adapters.Entry, error) {
	f := g[path]
	if f == nil {
		return adapters.Entry{}, fault.Errorf(fault.NotFound, "path %q: there is nothing", path)
	}
	e := f.entry
	e.Name, e.Attributes = path[strings.LastIndexByte(path, '/')+1:], slices.Clone(e.Attributes)
	names := 0
	for _, other := range g {
		if other == f {
			names++
		}
	}
	if names > 1 {
		e.Link = f.number
	}
	if base != nil {
		mine, theirs := g.below(path), base.below(path)
		e.Unchanged = len(mine) == len(theirs) && !slices.ContainsFunc(mine, func(p string) bool { return g[p] != base[p] })
	}
	return e, nil
}
