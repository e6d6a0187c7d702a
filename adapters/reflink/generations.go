package reflink

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"iter"
	"maps"
	"math"
	"os"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"
)

// What changed between two snapshots of a subvolume follows from generations. Every block of a subvolume's tree bears the
// transaction that wrote it, and every inode item the transaction that last changed the inode: its data, its attributes,
// its names (the count of links), and of a directory the names in it. A snapshot is made at the end of a transaction, so
// what changed after the base was made bears a later one. The search skips blocks that are not later than the base, with
// all below them: its cost follows what changed, not what there is. btrfs gives no inode number twice.
//
// An inode bears a later transaction also when it was only read: its time of access is in it. So what is later is compared
// with the base item by item (names, attributes, and where the data is, which nobody can change while a snapshot has it),
// and what differs in nothing but times of access and of change is taken for what it is.
//
// So a directory that is the same inode at the same path, and has no inode later than the base in it or below it, is the
// same in both snapshots: its names lead to the same inodes, and those did not change. Deletions, renames and new links
// change the directories that they happen in.

// changes are the inodes of a snapshot that changed since its base.
type changes struct {
	themselves map[uint64]bool // the inodes
	below      map[uint64]bool // those, and every directory that leads to one
}

// changesMax is how many changed inodes are remembered, at about 80 bytes each with what leads to them. Of more, nothing
// is called unchanged.
const changesMax = 1 << 20

// Keys of a subvolume's tree: include/uapi/linux/btrfs_tree.h.
const (
	inodeItem   = 1
	inodeRef    = 12
	inodeExtref = 13
)

// changesSince searches a snapshot's tree for inodes that are later than a transaction. It returns nil if there are too
// many.
func changesSince(ctx context.Context, root, base *os.File, transaction uint64) (*changes, error) {
	c := &changes{themselves: map[uint64]bool{}, below: map[uint64]bool{}}
	parents := map[uint64][]uint64{} // of inodes that changed, as far as they were met
	links := map[uint64]uint32{}     // how many names of them were not met yet
	search := treeSearch{root: root, from: key{objectid: subvolRoot}, to: key{math.MaxUint64 - 256, math.MaxUint32, math.MaxUint64}, later: transaction + 1}
	for item, err := range search.items(ctx) {
		if err != nil {
			return nil, err
		}
		switch {
		case item.kind == inodeItem && len(item.data) >= 160:
			if binary.LittleEndian.Uint64(item.data[8:]) <= transaction {
				continue
			}
			if len(c.themselves) == changesMax {
				return nil, nil
			}
			c.themselves[item.objectid] = true
			links[item.objectid] = binary.LittleEndian.Uint32(item.data[40:])
		case c.themselves[item.objectid]:
			for parent := range item.parents() {
				parents[item.objectid] = append(parents[item.objectid], parent)
				links[item.objectid]--
			}
		}
	}
	if err := c.drop(ctx, root, base); err != nil {
		return nil, err
	}
	for ino := range c.themselves {
		if err := c.mark(ctx, root, ino, parents[ino], links[ino] == 0); err != nil {
			return nil, err
		}
	}
	return c, nil
}

// runGap is how far apart the numbers of changed inodes may be to be compared in one search.
const runGap = 8

// drop takes out the inodes that are in the base as they are now, item by item.
func (c *changes) drop(ctx context.Context, root, base *os.File) error {
	inodes := slices.Sorted(maps.Keys(c.themselves))
	for len(inodes) > 0 {
		n := 1
		for n < len(inodes) && inodes[n]-inodes[n-1] <= runGap {
			n++
		}
		if err := c.dropRun(ctx, root, base, inodes[:n]); err != nil {
			return err
		}
		inodes = inodes[n:]
	}
	return nil
}

// dropRun does so for inodes whose numbers are close to each other.
func (c *changes) dropRun(ctx context.Context, root, base *os.File, inodes []uint64) error {
	run := treeSearch{from: key{objectid: inodes[0]}, to: key{inodes[len(inodes)-1], math.MaxUint8, math.MaxUint64}}
	next := func(at *os.File) (pull func() (treeItem, error, bool), stop func()) {
		s := run
		s.root = at
		return iter.Pull2(s.items(ctx))
	}
	pullNow, stopNow := next(root)
	defer stopNow()
	pullThen, stopThen := next(base)
	defer stopThen()
	differ := map[uint64]bool{}
	now, err, isNow := pullNow()
	then, err2, isThen := pullThen()
	for isNow || isThen {
		if err != nil || err2 != nil {
			return errors.Join(err, err2)
		}
		order := now.key.compare(then.key)
		switch {
		case !isThen || isNow && order < 0:
			differ[now.objectid] = true
		case !isNow || order > 0:
			differ[then.objectid] = true
		case !now.same(then):
			differ[now.objectid] = true
		}
		advanceNow, advanceThen := isNow && (!isThen || order <= 0), isThen && (!isNow || order >= 0)
		if advanceNow {
			now, err, isNow = pullNow()
		}
		if advanceThen {
			then, err2, isThen = pullThen()
		}
	}
	for _, ino := range inodes {
		if !differ[ino] {
			delete(c.themselves, ino)
		}
	}
	return nil
}

// mark notes that something is changed below every directory that leads to an inode. known says that parents are all.
func (c *changes) mark(ctx context.Context, root *os.File, ino uint64, parents []uint64, known bool) error {
	pending := []uint64{ino}
	for len(pending) > 0 {
		ino := pending[len(pending)-1]
		pending = pending[:len(pending)-1]
		if c.below[ino] {
			continue
		}
		c.below[ino] = true
		if !known {
			parents = nil
			search := treeSearch{root: root, from: key{ino, inodeRef, 0}, to: key{ino, inodeExtref, math.MaxUint64}}
			for item, err := range search.items(ctx) {
				if err != nil {
					return err
				}
				for parent := range item.parents() {
					parents = append(parents, parent)
				}
			}
		}
		pending = append(pending, parents...)
		known = false
	}
	return nil
}

// key is a key of a tree.
type key struct {
	objectid uint64
	kind     uint32
	offset   uint64
}

func (k key) compare(o key) int {
	return cmp.Or(cmp.Compare(k.objectid, o.objectid), cmp.Compare(k.kind, o.kind), cmp.Compare(k.offset, o.offset))
}

// treeItem is an item of a tree.
type treeItem struct {
	key
	data []byte
}

// same compares two items of one key. Of an inode, the transaction, the group of blocks where its next data is put, the
// sequence for NFS and the times of access and of change do not count.
func (i treeItem) same(o treeItem) bool {
	if i.kind != inodeItem || len(i.data) < 160 || len(o.data) != len(i.data) {
		return bytes.Equal(i.data, o.data)
	}
	for _, part := range [][2]int{{0, 8}, {16, 32}, {40, 72}, {80, 112}, {136, len(i.data)}} {
		if !bytes.Equal(i.data[part[0]:part[1]], o.data[part[0]:part[1]]) {
			return false
		}
	}
	return true
}

// parents gives the directories that an item of names says an inode is in: once for each name.
func (i treeItem) parents() func(yield func(uint64) bool) {
	return func(yield func(uint64) bool) {
		parent := i.offset
		for p := i.data; ; {
			head := 10 // struct btrfs_inode_ref: index, length of the name
			if i.kind == inodeExtref {
				head = 18 // struct btrfs_inode_extref: parent, index, length of the name
			}
			if i.kind != inodeRef && i.kind != inodeExtref || len(p) < head {
				return
			}
			if i.kind == inodeExtref {
				parent = binary.LittleEndian.Uint64(p)
			}
			name := int(binary.LittleEndian.Uint16(p[head-2:]))
			if !yield(parent) || len(p) < head+name {
				return
			}
			p = p[head+name:]
		}
	}
}

// treeSearch reads the items of the subvolume's tree from one key to another, those in blocks that are not older than a
// transaction.
type treeSearch struct {
	root     *os.File
	from, to key
	later    uint64
}

// searchBuffer is how much one call may answer, in bytes.
const searchBuffer = 256 << 10

func (s treeSearch) items(ctx context.Context) func(yield func(treeItem, error) bool) {
	return func(yield func(treeItem, error) bool) {
		const headSize = 112                               // struct btrfs_ioctl_search_args_v2, without its buffer
		args := make([]byte, headSize+int(s.bufferSize())) // it does not move: it is kept alive by its use below
		from := s.from
		for {
			if err := ctx.Err(); err != nil {
				yield(treeItem{}, err)
				return
			}
			for i, v := range []uint64{0, from.objectid, s.to.objectid, from.offset, s.to.offset, s.later, math.MaxUint64} {
				binary.NativeEndian.PutUint64(args[8*i:], v)
			}
			binary.NativeEndian.PutUint32(args[56:], from.kind)
			binary.NativeEndian.PutUint32(args[60:], s.to.kind)
			binary.NativeEndian.PutUint32(args[64:], math.MaxUint32)
			binary.NativeEndian.PutUint64(args[104:], uint64(len(args)-headSize))
			if err := query(s.root, iocTreeSearchV2, unsafe.Pointer(unsafe.SliceData(args))); err == unix.EINTR {
				continue
			} else if err != nil {
				yield(treeItem{}, err)
				return
			}
			n := binary.NativeEndian.Uint32(args[64:])
			if n == 0 {
				return
			}
			p := args[headSize:]
			for range n { // struct btrfs_ioctl_search_header, and the item
				item := treeItem{key: key{binary.NativeEndian.Uint64(p[8:]), binary.NativeEndian.Uint32(p[24:]), binary.NativeEndian.Uint64(p[16:])}}
				length := int(binary.NativeEndian.Uint32(p[28:]))
				item.data = p[32:][:length]
				if from = item.key; !yield(item, nil) {
					return
				}
				p = p[32+length:]
			}
			if from = from.next(); from == (key{}) {
				return
			}
		}
	}
}

// bufferSize is small for the items of one inode.
func (s treeSearch) bufferSize() uint64 {
	if s.from.objectid == s.to.objectid {
		return 64 << 10 // an item is never larger than a block
	}
	return searchBuffer
}

// next is the key after k, the zero key after the last.
func (k key) next() key {
	if k.offset++; k.offset != 0 {
		return k
	}
	if k.kind++; k.kind <= math.MaxUint8 {
		return k
	}
	return key{objectid: k.objectid + 1}
}
