package ceph

import (
	"stillpoint.io/stillpoint/adapters"
)

// The adapter ceph-fs: trees of files in CephFS.
//
// # Names
//
// A volume is FS/GROUP/SUBVOLUME, a subvolume of the filesystem FS as `ceph fs subvolume` makes them (a subvolume in no
// group is in the group _nogroup; FS/SUBVOLUME is short for that), or FS:/PATH, any other directory of the filesystem.
//
// # Snapshots and marks
//
// A snapshot is one of CephFS: a name in the hidden directory .snap, of a subvolume where `ceph fs subvolume snapshot ls`
// shows it too. It is made together with a tag, metadata that CephFS keeps with it and nobody can change later: the wanted
// name. So what bears the tag is whole and ours, and a crash leaves a snapshot that is cutting, or none.
//
// The mark is in an object of the filesystem's metadata pool (stillpoint.snapshots, in the namespace stillpoint of RADOS): a
// key for each snapshot, written before the snapshot is made, by which they are listed; and one with the notes for each that
// is published. That one has the snapshot's number, which no other snapshot of the filesystem ever has: a mark is never
// another snapshot's.
//
// # What is unchanged
//
// A file is when it has its inode's number, its times, size and version in both snapshots. Of a directory CephFS knows when
// something below it last changed (ceph.dir.rctime). It learns so late, and by the clocks of its clients; fs_unchanged.go has
// the rule under which that is believed, and what it does not cover: files of several names, whose changes show above one
// name only (adapters.Entry, ButLinks). Backups compare everything now and then.
//
// # Restores
//
// A subvolume is made at once, empty and with an owner that nobody else gives; as long as it has that one, it is no volume to
// this adapter. The tree grows in a directory beside its data, .stillpoint-restore, and Commit moves it to the data's place in
// one step. A restore is locked by the object stillpoint.restores, beside the other one.
//
// # Never hanging
//
// As package ceph has it; but a call to a metadata server has no limit in Ceph's library: one that was left to itself ends when
// a metadata server answers, the same or one that took over. Until then the backend is Unavailable, and asks for nothing more.

// FS is the row of the adapter ceph-fs in the registry.
func FS() adapters.Kind {
	return adapters.Kind{
		Name:    "ceph-fs",
		Summary: "subvolumes and directories of CephFS" + lacking,
		Keys: append(connectionKeys(),
			adapters.Key{Name: "fs", Usage: "the filesystem that the backend is limited to; default: every one"},
			adapters.Key{Name: "lag", Usage: "after how long a change shows in the times of all directories above it, and clients' clocks agree; directories are called unchanged only with this to spare; default: 1m"},
		),
		Open:    openFS,
		Drivers: []string{fsDriver, "*." + fsDriver},
		Resolve: resolveFS,
	}
}

// connectionKeys are the parameters that say how a cluster is reached.
func connectionKeys() []adapters.Key {
	return []adapters.Key{
		{Name: "conf", Usage: "path of ceph.conf; default: /etc/ceph/ceph.conf, or none with monitors"},
		{Name: "monitors", Usage: "addresses of the monitors, as mon_host in ceph.conf has them: 10.0.0.1,10.0.0.2"},
		{Name: "user", Usage: "the cephx user, without client. before it; default: admin"},
		{Name: "keyring", Usage: "path of the file with the user's key; default: where ceph.conf says"},
		{Name: "key", Usage: "the user's key itself, instead of keyring", Secret: true},
		{Name: "timeout", Usage: "after how long a single request to a monitor or an OSD has failed, at least 1s; default: 30s"},
	}
}
