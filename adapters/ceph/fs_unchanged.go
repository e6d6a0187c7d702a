package ceph

import (
	"time"
)

// node is what CephFS says of an inode.
type node struct {
	number, size, version, device uint64
	links, uid, gid               uint32
	mode                          uint16
	modified, changed             time.Time // mtime and ctime
}

// comparison is what is known of a base when a snapshot is compared with it: the rule under which something is unchanged.
//
// A client, or the metadata server, sets the time of change (ctime) of an inode whenever anything of it changes, and never to
// one that is earlier than it was; the version (change_attr) grows, too. So a file is unchanged if both are what they were,
// and no later change can have failed to move the time: it was over, by lag, when the base was made. That leaves
// only clocks that differ by more than lag, and a version that did not grow either.
//
// The time of change of everything below a directory (rctime) moves up level by level: at the latest when the
// metadata server nudges the directory, every few seconds, and when clients have written back what they hold, which a
// snapshot makes them begin. In the snapshot it moves too, as long as it is on its way there. So what it says is believed only
// once the snapshot is older than lag. Something below that changed after the base then shows a time after the
// base's, less what clocks differ. A time in the future hides nothing: it makes everything above it look changed. What moves
// up from a file of several names goes to the directory of one of them only; the others' do not see it.
//
// What is not covered, and is what the full walks of backups are for: a client that holds written data back for longer than
// lag, and a file that lost its first name and was written through an open descriptor before anybody looked up its other one.
type comparison struct {
	created time.Time // of the base
	lag     time.Duration
}

// file reports whether what is not a directory is unchanged.
func (c comparison) file(now, was node) bool {
	return now == was && now.changed.Before(c.created.Add(-c.lag))
}

// directory reports whether a directory, and everything below it but for files of several names, is unchanged. below is its
// rctime.
func (c comparison) directory(now, was node, below time.Time) bool {
	return c.file(now, was) && below.Before(c.created.Add(-c.lag))
}

// settling is how long to wait until the times of directories in a snapshot are to be believed. ok is false where that would
// take longer than to look at everything: entries are the names in the tree.
func (c comparison) settling(now, taken time.Time, entries int64) (wait time.Duration, ok bool) {
	wait = max(0, taken.Add(c.lag).Sub(now))
	return wait, wait <= time.Duration(entries)*perEntry
}

// perEntry is what looking at an entry takes at least, when nothing is unchanged.
const perEntry = 200 * time.Microsecond
