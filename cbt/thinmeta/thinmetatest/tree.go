package thinmetatest

import "sort"

// node is a node of a device's tree. Nodes are never changed: an update copies the path to the root, so that devices
// share what they have in common, as the kernel's btree does between commits.
type node struct {
	keys  []uint64
	words []uint64 // of a leaf
	kids  []*node  // of an internal node
}

func (n *node) leaf() bool { return n.kids == nil }

// find returns the entry of a key, or where the key would be inserted.
func (n *node) find(key uint64) (int, bool) {
	i := sort.Search(len(n.keys), func(i int) bool { return n.keys[i] >= key })
	return i, i < len(n.keys) && n.keys[i] == key
}

// way returns the entry whose subtree holds a key, if any does.
func (n *node) way(key uint64) int {
	i, exact := n.find(key)
	if !exact && i > 0 {
		i--
	}
	return i
}

func (n *node) get(key uint64) (uint64, bool) {
	for !n.leaf() {
		n = n.kids[n.way(key)]
	}
	i, ok := n.find(key)
	if !ok {
		return 0, false
	}
	return n.words[i], true
}

// slice copies a part of a node.
func (n *node) slice(from, to int) *node {
	c := &node{keys: append([]uint64(nil), n.keys[from:to]...)}
	if n.leaf() {
		c.words = append([]uint64(nil), n.words[from:to]...)
	} else {
		c.kids = append([]*node{}, n.kids[from:to]...)
	}
	return c
}

// set maps a key and returns the tree that has it: one node, or two that a full one was split into.
func (n *node) set(key, word uint64, capacity int) []*node {
	if n.leaf() {
		c := n.slice(0, len(n.keys))
		i, exact := c.find(key)
		if exact {
			c.words[i] = word
			return []*node{c}
		}
		c.keys = append(c.keys[:i:i], append([]uint64{key}, c.keys[i:]...)...)
		c.words = append(c.words[:i:i], append([]uint64{word}, c.words[i:]...)...)
		return c.split(capacity)
	}
	i := n.way(key)
	return n.with(i, i+1, n.kids[i].set(key, word, capacity)).split(capacity)
}

// remove unmaps a key, which must be mapped, and returns the tree without it, which may be too small.
func (n *node) remove(key uint64, capacity int) *node {
	if n.leaf() {
		i, _ := n.find(key)
		c := n.slice(0, len(n.keys))
		c.keys = append(c.keys[:i], c.keys[i+1:]...)
		c.words = append(c.words[:i], c.words[i+1:]...)
		return c
	}
	i := n.way(key)
	kid := n.kids[i].remove(key, capacity)
	if len(kid.keys) > capacity/3 || len(n.kids) == 1 {
		return n.with(i, i+1, []*node{kid})
	}
	if i > 0 {
		return n.with(i-1, i+1, n.kids[i-1].join(kid).split(capacity))
	}
	return n.with(i, i+2, kid.join(n.kids[i+1]).split(capacity))
}

// with replaces some children.
func (n *node) with(from, to int, kids []*node) *node {
	c := &node{keys: append([]uint64(nil), n.keys[:from]...), kids: append([]*node{}, n.kids[:from]...)}
	for i, kid := range kids {
		key := kid.keys[0]
		if i == 0 && n.keys[from] < key {
			key = n.keys[from] // a bound need not be met
		}
		c.keys, c.kids = append(c.keys, key), append(c.kids, kid)
	}
	c.keys, c.kids = append(c.keys, n.keys[to:]...), append(c.kids, n.kids[to:]...)
	return c
}

func (n *node) join(right *node) *node {
	c := n.slice(0, len(n.keys))
	c.keys = append(c.keys, right.keys...)
	c.words = append(c.words, right.words...)
	c.kids = append(c.kids, right.kids...)
	return c
}

// split halves a node that is too large.
func (n *node) split(capacity int) []*node {
	if len(n.keys) <= capacity {
		return []*node{n}
	}
	half := len(n.keys) / 2
	return []*node{n.slice(0, half), n.slice(half, len(n.keys))}
}

// grow makes one tree of what set returned.
func grow(nodes []*node) *node {
	if len(nodes) == 1 {
		return nodes[0]
	}
	root := new(node)
	for _, n := range nodes {
		root.keys, root.kids = append(root.keys, n.keys[0]), append(root.kids, n)
	}
	return root
}

// shrink drops roots with a single child.
func (n *node) shrink() *node {
	for !n.leaf() && len(n.kids) == 1 {
		n = n.kids[0]
	}
	return n
}

// build makes a tree of ascending keys, with so many entries in each node (the last ones share what is left).
func build(keys, words []uint64, fill int) *node {
	if len(keys) == 0 {
		return new(node)
	}
	var level []*node
	for _, r := range chunks(len(keys), fill) {
		level = append(level, &node{keys: keys[r[0]:r[1]:r[1]], words: words[r[0]:r[1]:r[1]]})
	}
	for len(level) > 1 {
		var up []*node
		for _, r := range chunks(len(level), fill) {
			n := new(node)
			for _, kid := range level[r[0]:r[1]] {
				n.keys, n.kids = append(n.keys, kid.keys[0]), append(n.kids, kid)
			}
			up = append(up, n)
		}
		level = up
	}
	return level[0]
}

// chunks divides n things into runs of size; the last two share what is left.
func chunks(n, size int) (runs [][2]int) {
	for at := 0; at < n; {
		end := min(at+size, n)
		if rest := n - end; rest > 0 && rest < size {
			end = at + (n-at+1)/2
		}
		runs = append(runs, [2]int{at, end})
		at = end
	}
	return runs
}
