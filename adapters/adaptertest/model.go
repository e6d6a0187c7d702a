package adaptertest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"stillpoint.io/stillpoint/adapters"
)

// TreeVolume is a live volume that is a tree of files, as its user sees it. Paths are as in adapters.Tree.
type TreeVolume interface {
	ID() adapters.VolumeID
	Mkdir(path string) error
	// Write writes to a regular file, and makes it if it is not there.
	Write(path string, p []byte, off int64) error
	Truncate(path string, size int64) error
	Symlink(path, target string) error
	Special(path string, t adapters.FileType, d adapters.Device) error
	Link(old, path string) error
	// Rename moves what is at old to a path where nothing is.
	Rename(old, path string) error
	// Remove removes what is at a path, with all below it.
	Remove(path string) error
	// Describe sets owner, mode, attributes and time.
	Describe(path string, e adapters.Entry) error
}

// TreeModel is what a live tree must hold. It changes the tree at random and compares trees with itself.
type TreeModel struct {
	volume  TreeVolume
	at      map[string]*plant // by path; the root's is empty. Names of one file share a plant
	touched map[string]bool   // paths to be described again
	serial  int

	// Times gives a time that the volume can keep; nil: it keeps any.
	Times func(time.Time) time.Time
}

type plant struct {
	entry adapters.Entry // Name, Link, Unchanged and ButLinks are not set
	data  []byte
}

// NewTreeModel is the model of a tree that is empty.
func NewTreeModel(v TreeVolume) *TreeModel {
	m := &TreeModel{volume: v, at: map[string]*plant{"": {entry: adapters.Entry{Type: adapters.Directory}}}, touched: map[string]bool{"": true}}
	return m
}

// Clone is the model as it is now, of a tree that nobody changes any more.
func (m *TreeModel) Clone() *TreeModel {
	c := &TreeModel{at: map[string]*plant{}}
	copies := map[*plant]*plant{}
	for path, p := range m.at {
		if copies[p] == nil {
			q := *p
			q.data = bytes.Clone(p.data)
			copies[p] = &q
		}
		c.at[path] = copies[p]
	}
	return c
}

// Len is how many names there are, the root included.
func (m *TreeModel) Len() int { return len(m.at) }

// Paths lists all paths, ascending.
func (m *TreeModel) Paths() []string { return slices.Sorted(maps.Keys(m.at)) }

// Get is what is at a path, and the bytes of a file.
func (m *TreeModel) Get(path string) (adapters.Entry, []byte) {
	x := m.at[path]
	return x.entry, x.data
}

// Only is the model of what is below a path, or at it, as a tree of its own.
func (m *TreeModel) Only(path string) *TreeModel {
	c := &TreeModel{at: map[string]*plant{}}
	for p, x := range m.at {
		if below(p, path) {
			c.at[strings.TrimPrefix(strings.TrimPrefix(p, path), "/")] = x
		}
	}
	return c
}

// Apply makes the volume and the model differ by what change does to both, and settles the metadata.
func (m *TreeModel) Apply(changes ...func(*TreeModel) error) error {
	for _, change := range changes {
		if err := change(m); err != nil {
			return err
		}
	}
	return m.settle()
}

// hostile are names that a tree may have.
var hostile = []string{
	"new\nline", "caf\xe9", "\xff\xfe", "caf%E9", "\xed\xa0\x80", " ", "tab\t", "quote\"\\", "<&>", "-rf", "...", "雪", "\u202e", "~", "a:b@c", "volume.json", "tree", "x.kopia-entry",
	strings.Repeat("n", 255), "\x01\x7f", "$(reboot)", ".stillpoint-restore-x", "\u2028",
}

// Grow makes n random changes to the tree and to the model.
func (m *TreeModel) Grow(r *rand.Rand, n int) error {
	for range n {
		if err := m.change(r); err != nil {
			return err
		}
	}
	return m.settle()
}

func (m *TreeModel) change(r *rand.Rand) error {
	dir, file, any := m.pick(r, adapters.Directory), m.pick(r, adapters.RegularFile), m.pick(r)
	fresh := m.fresh(r, dir)
	switch k := r.IntN(20); {
	case k < 3:
		return m.Mkdir(fresh, r)
	case k < 8 || file == "":
		return m.Write(fresh, random(r, r.Int64N(1<<(r.IntN(18)))), int64(r.IntN(2)*r.IntN(1<<18)), r)
	case k < 11:
		return m.Write(file, random(r, r.Int64N(5000)), r.Int64N(int64(len(m.at[file].data))+1), nil)
	case k < 12:
		return m.Truncate(file, r.Int64N(1<<17))
	case k < 13:
		return m.Symlink(fresh, []string{"..", "/etc/passwd", "caf\xe9", "a/b", strings.Repeat("t", 1000)}[r.IntN(5)], r)
	case k < 14:
		return m.Special(fresh, []adapters.FileType{adapters.Fifo, adapters.Socket, adapters.CharDevice, adapters.BlockDevice}[r.IntN(4)], r)
	case k < 15:
		if old := m.pickFile(r); old != "" {
			return m.Link(old, fresh)
		}
	case k < 17 && any != "" && !below(fresh, any):
		return m.Rename(any, fresh)
	case k < 18 && any != "" && (len(m.at) > 40 || m.at[any].entry.Type != adapters.Directory):
		return m.Remove(any)
	case any != "":
		m.at[any].entry = m.dressed(m.at[any].entry, r)
		m.touched[any] = true
	}
	return nil
}

// Mkdir makes a directory.
func (m *TreeModel) Mkdir(path string, r *rand.Rand) error {
	m.plant(path, adapters.Entry{Type: adapters.Directory}, r)
	return m.volume.Mkdir(path)
}

// Write writes to a file, a new one or an old one.
func (m *TreeModel) Write(path string, p []byte, off int64, r *rand.Rand) error {
	if m.at[path] == nil {
		m.plant(path, adapters.Entry{Type: adapters.RegularFile}, r)
	}
	m.touched[path] = true
	x := m.at[path]
	if need := off + int64(len(p)); len(p) > 0 && need > int64(len(x.data)) {
		x.data = append(x.data, make([]byte, need-int64(len(x.data)))...)
	}
	copy(x.data[min(off, int64(len(x.data))):], p)
	x.entry.Size = int64(len(x.data))
	return m.volume.Write(path, p, off)
}

// Truncate makes a file shorter or longer.
func (m *TreeModel) Truncate(path string, size int64) error {
	x := m.at[path]
	x.data = append(x.data, make([]byte, max(0, size-int64(len(x.data))))...)[:size]
	x.entry.Size = size
	m.touched[path] = true
	return m.volume.Truncate(path, size)
}

// Symlink makes a symbolic link.
func (m *TreeModel) Symlink(path, target string, r *rand.Rand) error {
	m.plant(path, adapters.Entry{Type: adapters.Symlink, Target: target}, r)
	return m.volume.Symlink(path, target)
}

// Special makes a pipe, a socket or a device.
func (m *TreeModel) Special(path string, t adapters.FileType, r *rand.Rand) error {
	e := adapters.Entry{Type: t}
	if t == adapters.CharDevice || t == adapters.BlockDevice {
		e.Device = 0x123*256 + 7 // 291:7
	}
	m.plant(path, e, r)
	return m.volume.Special(path, t, e.Device)
}

// Link gives a file another name.
func (m *TreeModel) Link(old, path string) error {
	m.at[path] = m.at[old]
	m.touched[path], m.touched[parent(path)] = true, true
	return m.volume.Link(old, path)
}

// Rename moves something, with all below it.
func (m *TreeModel) Rename(old, path string) error {
	moved := map[string]*plant{}
	for p, x := range m.at {
		if below(p, old) {
			moved[path+strings.TrimPrefix(p, old)] = x
			delete(m.at, p)
			if m.touched[p] {
				delete(m.touched, p)
				m.touched[path+strings.TrimPrefix(p, old)] = true
			}
		}
	}
	maps.Copy(m.at, moved)
	m.touched[path], m.touched[parent(path)], m.touched[parent(old)] = true, true, true
	return m.volume.Rename(old, path)
}

// Remove removes something, with all below it. Of a file that was touched and has other names, those are touched now.
func (m *TreeModel) Remove(path string) error {
	touched := map[*plant]bool{}
	for p, x := range m.at {
		if below(p, path) {
			touched[x] = touched[x] || m.touched[p]
			delete(m.at, p)
			delete(m.touched, p)
		}
	}
	for p, x := range m.at {
		if touched[x] {
			m.touched[p] = true
		}
	}
	m.touched[parent(path)] = true
	return m.volume.Remove(path)
}

// plant puts a new entry into the model.
func (m *TreeModel) plant(path string, e adapters.Entry, r *rand.Rand) {
	if r == nil {
		r = rand.New(rand.NewPCG(uint64(len(m.at)), 1))
	}
	m.at[path] = &plant{entry: m.dressed(e, r)}
	m.touched[path], m.touched[parent(path)] = true, true
}

// dressed gives an entry other metadata.
func (m *TreeModel) dressed(e adapters.Entry, r *rand.Rand) adapters.Entry {
	e.UID, e.GID = r.Uint32N(70000), r.Uint32N(70000)
	e.Mode = r.Uint32N(0o10000)
	e.Modified = time.Unix(r.Int64N(1<<32)-1<<31, r.Int64N(1e9)).UTC()
	if m.Times != nil {
		e.Modified = m.Times(e.Modified)
	}
	e.Attributes = nil
	if e.Type == adapters.Symlink {
		e.Mode = 0o777
	}
	if r.IntN(3) == 0 && (e.Type == adapters.RegularFile || e.Type == adapters.Directory) {
		e.Attributes = append(e.Attributes, adapters.Attribute{Name: "user.any", Value: random(r, r.Int64N(200))})
	}
	if r.IntN(3) == 0 {
		e.Attributes = slices.Insert(e.Attributes, 0, adapters.Attribute{Name: "trusted.any", Value: random(r, 1+r.Int64N(20))})
	}
	return e
}

// settle describes what was touched, the deepest first.
func (m *TreeModel) settle() error {
	paths := slices.Sorted(maps.Keys(m.touched))
	for _, p := range slices.Backward(paths) {
		if x := m.at[p]; x != nil {
			if x.entry.Modified.IsZero() {
				x.entry = m.dressed(x.entry, rand.New(rand.NewPCG(1, 1)))
			}
			if err := m.volume.Describe(p, x.entry); err != nil {
				return err
			}
		}
	}
	clear(m.touched)
	return nil
}

// pick chooses a path, not the root's unless a directory is wanted; empty if there is none.
func (m *TreeModel) pick(r *rand.Rand, types ...adapters.FileType) string {
	var paths []string
	for _, p := range m.Paths() {
		if t := m.at[p].entry.Type; len(types) == 0 && p != "" || slices.Contains(types, t) && (p == "" || strings.Count(p, "/") < 6) {
			paths = append(paths, p)
		}
	}
	if len(paths) == 0 {
		return ""
	}
	return paths[r.IntN(len(paths))]
}

func (m *TreeModel) pickFile(r *rand.Rand) string {
	return m.pick(r, adapters.RegularFile, adapters.Symlink, adapters.Fifo)
}

// fresh is a path in a directory at which nothing is.
func (m *TreeModel) fresh(r *rand.Rand, dir string) string {
	for {
		m.serial++
		name := fmt.Sprint("n", m.serial)
		if r.IntN(4) == 0 {
			name = hostile[r.IntN(len(hostile))]
		}
		if dir != "" {
			name = dir + "/" + name
		}
		if m.at[name] == nil {
			return name
		}
	}
}

func parent(path string) string { return path[:max(0, strings.LastIndexByte(path, '/'))] }

// below reports whether p is path or lies below it.
func below(p, path string) bool {
	return p == path || path == "" || strings.HasPrefix(p, path+"/")
}

// children lists what is in a directory, in a tree's order.
func (m *TreeModel) children(dir string) []string {
	var paths []string
	for p := range m.at {
		if p != "" && parent(p) == dir {
			paths = append(paths, p)
		}
	}
	slices.SortFunc(paths, func(a, b string) int {
		if x, y := m.at[a].entry.Type == adapters.Directory, m.at[b].entry.Type == adapters.Directory; x != y {
			if x {
				return -1
			}
			return 1
		}
		return strings.Compare(a, b)
	})
	return paths
}

// same says how two models differ at a path and below, "" if they do not. Without links, files that have several names in the
// other one may be anything.
func (m *TreeModel) same(o *TreeModel, path string, withoutLinks bool) string {
	for p, x := range m.at {
		if !below(p, path) {
			continue
		}
		y := o.at[p]
		if y == nil {
			return fmt.Sprintf("%q is new", p)
		}
		if withoutLinks && o.several(y) {
			continue
		}
		if d := differ(y.entry, x.entry); d != "" || !bytes.Equal(x.data, y.data) || m.several(x) != o.several(y) {
			return fmt.Sprintf("%q changed: %s", p, d)
		}
	}
	for p := range o.at {
		if below(p, path) && m.at[p] == nil {
			return fmt.Sprintf("%q is gone", p)
		}
	}
	return ""
}

// several reports whether a file has several names.
func (m *TreeModel) several(x *plant) bool {
	names := 0
	for _, y := range m.at {
		if x == y {
			names++
		}
	}
	return names > 1
}

// differ says how two entries differ in what a model knows.
func differ(got, want adapters.Entry) string {
	got.Name, got.Link, got.Unchanged, got.ButLinks = want.Name, want.Link, want.Unchanged, want.ButLinks
	a, b := fmt.Sprintf("%+v", printable(got)), fmt.Sprintf("%+v", printable(want))
	if a == b {
		return ""
	}
	return fmt.Sprintf("%s instead of %s", a, b)
}

func printable(e adapters.Entry) adapters.Entry {
	e.Modified = e.Modified.UTC()
	if len(e.Attributes) == 0 {
		e.Attributes = nil
	}
	return e
}

// Compare reads a whole tree and says how it is not what the model says; with a base, the model of the tree that it is
// compared with, also where it calls unchanged what is not. It returns how many entries are called unchanged.
func (m *TreeModel) Compare(ctx context.Context, t adapters.Tree, base *TreeModel) (unchanged int, err error) {
	c := comparison{m, base, t, map[uint64]*plant{}, map[*plant]uint64{}, 0}
	root, err := t.Stat(ctx, "")
	if err == nil && root.Name != "" {
		err = fmt.Errorf("the root is called %q", root.Name)
	}
	if err == nil {
		err = c.entry(ctx, "", root)
	}
	if err == nil {
		err = c.directory(ctx, "")
	}
	return c.unchanged, err
}

type comparison struct {
	*TreeModel
	base      *TreeModel
	tree      adapters.Tree
	links     map[uint64]*plant
	names     map[*plant]uint64
	unchanged int
}

func (c *comparison) directory(ctx context.Context, dir string) error {
	want := c.children(dir)
	i := 0
	for e, err := range c.tree.Entries(ctx, dir) {
		if err != nil {
			return err
		}
		path := strings.TrimPrefix(dir+"/"+e.Name, "/")
		if i >= len(want) || path != want[i] {
			return fmt.Errorf("in %q, %q is in place %d of the order: %q", dir, e.Name, i, want)
		}
		i++
		if err := c.entry(ctx, path, e); err != nil {
			return err
		}
		again, err := c.tree.Stat(ctx, path)
		if a, b := fmt.Sprintf("%+v", again), fmt.Sprintf("%+v", e); err != nil || a != b {
			return fmt.Errorf("%q is %s to Stat and %s to Entries: %v", path, a, b, err)
		}
		switch e.Type {
		case adapters.Directory:
			err = c.directory(ctx, path)
		case adapters.RegularFile:
			err = c.content(ctx, path)
		default:
			if f, err := c.tree.OpenFile(ctx, path); err == nil {
				f.Close()
				return fmt.Errorf("%q was opened, a %s", path, e.Type)
			}
		}
		if err != nil {
			return err
		}
	}
	if i < len(want) {
		return fmt.Errorf("in %q, %q is missing", dir, want[i:])
	}
	return nil
}

// entry compares the metadata.
func (c *comparison) entry(_ context.Context, path string, e adapters.Entry) error {
	x := c.at[path]
	if x == nil {
		return fmt.Errorf("%q is not in the model", path)
	}
	if d := differ(e, x.entry); d != "" {
		return fmt.Errorf("%q: %s", path, d)
	}
	several := c.several(x)
	switch other, seen := c.links[e.Link]; {
	case !several && e.Link == 0:
	case several != (e.Link != 0), c.names[x] != 0 && c.names[x] != e.Link, seen && other != x:
		return fmt.Errorf("%q has the link %d, and several names: %v; the link was seen: %v", path, e.Link, several, seen)
	case e.Link != 0:
		c.links[e.Link], c.names[x] = x, e.Link
	}
	if !e.Unchanged {
		return nil
	}
	c.unchanged++
	if c.base == nil {
		return fmt.Errorf("%q is called unchanged since nothing", path)
	}
	if d := c.same(c.base, path, e.ButLinks); d != "" {
		return fmt.Errorf("%q is called unchanged: %s", path, d)
	}
	return nil
}

// content compares a file's bytes, and what is said about holes in it.
func (c *comparison) content(ctx context.Context, path string) error {
	want := c.at[path].data
	f, err := c.tree.OpenFile(ctx, path)
	if err != nil {
		return err
	}
	defer f.Close()
	p := make([]byte, len(want)+1)
	n, err := f.ReadAt(ctx, p, 0)
	if !errors.Is(err, io.EOF) || !bytes.Equal(p[:n], want) || f.Size() != int64(len(want)) {
		return fmt.Errorf("%q reads %d bytes of %d, which differ from the %d that were written: %v", path, n, f.Size(), len(want), err)
	}
	at := int64(0)
	for e, err := range f.Extents(ctx) {
		if err != nil {
			return err
		}
		if e.Offset != at || e.Length <= 0 || e.End() > int64(len(want)) {
			return fmt.Errorf("%q has the extent %+v after %d, of %d bytes", path, e, at, len(want))
		}
		if e.Zero && len(bytes.TrimLeft(want[e.Offset:e.End()], "\x00")) > 0 {
			return fmt.Errorf("%q has data in the hole %+v", path, e)
		}
		at = e.End()
	}
	if at != int64(len(want)) {
		return fmt.Errorf("the extents of %q end at %d of %d", path, at, len(want))
	}
	return f.Close()
}
