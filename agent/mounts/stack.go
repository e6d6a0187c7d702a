package mounts

import (
	"fmt"
	"slices"
	"strings"

	"stillpoint.io/stillpoint/fault"
)

// Foundation is all that something stands on, directly or not, from above to below.
type Foundation struct {
	Filesystems []Device
	Devices     []Device
	// Unknown are the places below which nothing could be found out, in words.
	Unknown []string
}

// On returns the filesystems that stand on any of the devices, directly or through partitions, device-mapper, md,
// overlays, and loop devices whose files lie on a filesystem that does; upper before lower, as Order has them. An
// overlay is among them when any layer of it is. The error is Order's.
func (t Table) On(devices ...Device) ([]Filesystem, error) {
	var found []Device
	for n := range t.upward(devices) {
		if n.filesystem {
			found = append(found, n.id)
		}
	}
	return t.Order(found...)
}

// DevicesOn returns the block devices that stand on any of the devices without a filesystem between, and those devices
// themselves: partitions, device-mapper, md, loop devices directly on a device. In order of their numbers.
func (t Table) DevicesOn(devices ...Device) []Device {
	var found []Device
	queue := slices.Clone(devices)
	for len(queue) > 0 {
		d := queue[0]
		queue = queue[1:]
		if slices.Contains(found, d) {
			continue
		}
		found = append(found, d)
		for _, up := range t.above[node{id: d}] {
			if !up.filesystem {
				queue = append(queue, up.id)
			}
		}
	}
	slices.Sort(found)
	return found
}

// Under returns what a filesystem stands on, itself left out. NotFound if it is not in the table; the error of Order
// if it stands on itself.
func (t Table) Under(fs Device) (Foundation, error) {
	f, err := t.find(fs)
	if err != nil {
		return Foundation{}, err
	}
	sorted, err := t.sort([]node{{true, f.ID}})
	if err != nil {
		return Foundation{}, err
	}
	var u Foundation
	for _, n := range sorted {
		switch {
		case n.filesystem:
			if n.id != f.ID {
				u.Filesystems = append(u.Filesystems, n.id)
			}
			if below, ok := t.Filesystem(n.id); ok && below.Unknown != "" {
				u.Unknown = append(u.Unknown, fmt.Sprintf("%s: %s", below, below.Unknown))
			}
		default:
			u.Devices = append(u.Devices, n.id)
			if d, ok := t.Device(n.id); !ok {
				u.Unknown = append(u.Unknown, fmt.Sprintf("device %s: not in sysfs", n.id))
			} else if d.Backing != nil && d.Backing.Filesystem == 0 {
				u.Unknown = append(u.Unknown, fmt.Sprintf("%s: %s", d.Name, d.Backing.Unknown))
			}
		}
	}
	return u, nil
}

// Order sorts filesystems so that each comes before those that it stands on, whether or not the ones between are
// among them. The answer depends only on the set that is asked for. NotFound for one that is not in the table, Invalid
// if one stands on itself.
func (t Table) Order(filesystems ...Device) ([]Filesystem, error) {
	wanted := map[Device]bool{}
	var start []node
	for _, id := range filesystems {
		f, err := t.find(id)
		if err != nil {
			return nil, err
		}
		if !wanted[f.ID] {
			wanted[f.ID] = true
			start = append(start, node{true, f.ID})
		}
	}
	sorted, err := t.sort(start)
	if err != nil {
		return nil, err
	}
	ordered := make([]Filesystem, 0, len(start))
	for _, n := range sorted {
		if n.filesystem && wanted[n.id] {
			f, _ := t.Filesystem(n.id)
			ordered = append(ordered, f)
		}
	}
	return ordered, nil
}

// Uncovered returns the members of a filesystem whose bytes do not lie wholly on the given devices: with any left, a
// cut of those devices is not a cut of the filesystem. A member lies on a device that it is or that all its parts
// stand on; one on a file lies where the file's filesystem does.
func (t Table) Uncovered(fs Device, devices ...Device) []Device {
	f, _ := t.Filesystem(fs)
	known := map[node]bool{}
	for _, d := range devices {
		known[node{id: d}] = true
	}
	return slices.DeleteFunc(slices.Clone(f.Members), func(d Device) bool { return t.covered(node{id: d}, known) })
}

// covered reports whether all that n stands on is known to be covered. What is being looked at counts as not covered,
// so a circle ends.
func (t Table) covered(n node, known map[node]bool) bool {
	if yes, ok := known[n]; ok {
		return yes
	}
	known[n] = false
	below := t.below(n)
	if f, ok := t.Filesystem(n.id); len(below) == 0 || n.filesystem && ok && f.Unknown != "" {
		return false
	}
	for _, b := range below {
		if !t.covered(b, known) {
			return false
		}
	}
	known[n] = true
	return true
}

// node is a filesystem or a block device; both kinds have numbers of their own, which overlap.
type node struct {
	filesystem bool
	id         Device
}

// below returns what n stands on directly.
func (t Table) below(n node) []node {
	var found []node
	if n.filesystem {
		f, _ := t.Filesystem(n.id)
		for _, d := range f.Members {
			found = append(found, node{id: d})
		}
		for _, l := range f.Layers {
			if n := t.filesystemNode(l.Filesystem); l.Filesystem != 0 && !slices.Contains(found, n) {
				found = append(found, n)
			}
		}
		return found
	}
	d, _ := t.Device(n.id)
	for _, b := range d.Below {
		found = append(found, node{id: b})
	}
	if d.Backing != nil && d.Backing.Filesystem != 0 {
		found = append(found, t.filesystemNode(d.Backing.Filesystem))
	}
	return found
}

func (t Table) filesystemNode(id Device) node {
	if f, ok := t.Filesystem(id); ok {
		id = f.ID // it may be a number of Stats
	}
	return node{true, id}
}

func (t *Table) indexStack() {
	add := func(n node) {
		for _, b := range t.below(n) {
			t.above[b] = append(t.above[b], n)
		}
	}
	for _, f := range t.filesystems {
		add(node{true, f.ID})
	}
	for _, d := range t.devices {
		add(node{id: d.ID})
	}
}

// upward returns the devices and all that stands on them.
func (t Table) upward(devices []Device) map[node]bool {
	seen := map[node]bool{}
	var queue []node
	for _, d := range devices {
		queue = append(queue, node{id: d})
	}
	for len(queue) > 0 {
		n := queue[len(queue)-1]
		queue = queue[:len(queue)-1]
		if !seen[n] {
			seen[n] = true
			queue = append(queue, t.above[n]...)
		}
	}
	return seen
}

// sort returns start and all that it stands on, each before what it stands on: a depth-first search in the order of
// numbers, which makes the answer the same whatever the order of start.
func (t Table) sort(start []node) ([]node, error) {
	slices.SortFunc(start, func(a, b node) int {
		switch {
		case a.id > b.id: // the result is reversed in the end
			return -1
		case a.id < b.id:
			return 1
		}
		return 0
	})
	const open, done = 1, 2
	state := map[node]int{}
	var trail, sorted []node
	var visit func(node) error
	visit = func(n node) error {
		switch state[n] {
		case done:
			return nil
		case open:
			return t.circle(append(trail[slices.Index(trail, n):], n))
		}
		state[n] = open
		trail = append(trail, n)
		for _, b := range t.below(n) {
			if err := visit(b); err != nil {
				return err
			}
		}
		trail = trail[:len(trail)-1]
		state[n] = done
		sorted = append(sorted, n)
		return nil
	}
	for _, n := range start {
		if err := visit(n); err != nil {
			return nil, err
		}
	}
	slices.Reverse(sorted)
	return sorted, nil
}

func (t Table) circle(nodes []node) error {
	var names []string
	for _, n := range nodes {
		if d, ok := t.Device(n.id); !n.filesystem && ok {
			names = append(names, d.Name)
		} else if f, ok := t.Filesystem(n.id); n.filesystem && ok {
			names = append(names, f.String())
		} else {
			names = append(names, n.id.String())
		}
	}
	return fault.Errorf(fault.Invalid, "filesystems stand on themselves, so they have no order: %s", strings.Join(names, " on "))
}
