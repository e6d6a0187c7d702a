// Package repository keeps backups in a kopia repository: where it is, what is in it, and how a backup lies in it. To
// kopia a backup is an ordinary snapshot of a folder with two files; `kopia restore` and `kopia mount` read it
// without Stillpoint.
//
// # Layout, version 1
//
// The repository is a kopia repository of format version 3: contents are named by BLAKE3-256 keyed with the
// repository's secret, encrypted with AES256-GCM, and packed. A manifest with the label type=stillpoint holds
//
//	{"version":1,"chunk_size":1048576}
//
// and makes it one of ours. The chunk size never changes. Kopia's maintenance is owned by stillpoint@HOST.
//
// A backup is a manifest with the label type=snapshot, of the source stillpoint@HOST:/BACKEND/VOLUME, where HOST is a
// cluster or a machine and VOLUME a canonical id, which contains the locality of a node-local volume. Its start is the
// instant of the volume's snapshot. Three tags say what it is: backup (the id, chosen when it was begun), volume (its
// handle) and stillpoint (the text of volume.json in one line). The root is a kopia directory (a content with prefix k)
// of two files:
//
//	volume.json   what it was: see Backup; "version" is the layout's, "image" the object id of disk.img,
//	              "base" and "base_image" those of the backup that an incremental was made from
//	disk.img      the volume, byte for byte
//
// disk.img is an index of indexes, in kopia's words an indirect object whose parts are indirect objects:
//
//	top level     {"stream":"kopia:indirect","entries":[{"l":67108864,"o":"Ix<hash>"},{"s":67108864,"l":…,"o":…},…]}
//	segment       {"stream":"kopia:indirect","entries":[{"l":1048576,"o":"<hash>"},{"s":1048576,"l":…,"o":…},…]}
//	chunk         the bytes
//
// s is where a part starts within the object (left out when 0), l its length in bytes, o its object id: the content's
// id, with an I before it when that content is an index. Indexes are contents with prefix x and end in a newline. A
// segment is SegmentSize bytes and its index one content; a chunk is the chunk size; the last of either is what
// remains. The top level is cut into contents of 1 MiB if it is longer, and its own index is one more level of the same
// kind. All chunks of zeros are one content (for each length), and all segments of zeros are one index. A volume of no
// bytes is an empty file.
//
// So the id of disk.img is a digest of every byte, an index costs about 110 bytes for each chunk and segment that
// changed, and every backup is complete: an incremental differs from a full one only in what had to be done for it.
//
// An unfinished backup is kept by a checkpoint, which to kopia is an incomplete snapshot of the same source: a folder with
// disk.img as far as it is done (whole segments from the start), and for an incremental base.img, its base's image, so
// that kopia's maintenance leaves alone what will be referred to. Two tags say what it is: checkpoint (the backup's id)
// and stillpoint-checkpoint (done, taken, and the description of the backup so far). It goes when the backup is
// committed, or a newer one of the volume.
//
// A record is a manifest with the label type=stillpoint-KIND and a label key: what was learnt about backups and volumes.
// What was found damaged is in such records, too, with the pack where it lay. A writer stores anew what they name, and a
// backup that refers to it is not committed, as long as kopia's index names that pack.
//
// Beside kopia's blobs there is kopia.repository.copy, which is what its name says: the key to everything else is in
// kopia.repository, and in no other blob of kopia's. Mend keeps a damaged index as damaged-NAME. Kopia looks at neither.
//
// # Layout of a tree
//
// The backup of a volume that is a tree of files has, instead of disk.img, a directory tree: an ordinary kopia directory,
// with all that is in it, and in its volume.json "form" is "tree" and "tree" the object id of that directory. Directories,
// files and symbolic links are kopia's own: a content of prefix k, in JSON, a directory; the bytes; a link's target. A file
// of at most the chunk size is one content; a larger one lies in the repository like a disk.img. Entries are in kopia's own
// order, directories first, then everything else, each by the bytes of its name. A directory whose JSON is longer than 1
// MiB is cut into contents of that size.
//
// What kopia's entry has no place for is in a field of it that kopia leaves alone, "stillpoint", with
//
//	name        the name, in base64, if kopia's is another: a name that is not UTF-8, that ends in .kopia-entry (what kopia
//	            removes when it restores), or that looks like one made here. Kopia's is then its readable part, a tilde
//	            and 16 hexadecimal digits of its SHA-256
//	type        fifo, socket, char-device or block-device: to kopia these are empty files
//	target      of a symbolic link, in base64
//	device      of a device, as stat(2) has st_rdev
//	link        a number that all names of one file share, of a file that has several
//	links       of a directory, how many names with a link there are below it; not in what was written before this was
//	            counted, of adapters that do not need it
//	seconds     of the time since 1970, where kopia's clock does not reach it; the nanoseconds are in kopia's time
//	attributes  extended attributes, access control lists among them: names and values in base64
//
// Permissions are in kopia's notation, which is that of Go's os.FileMode. Kopia restores times of directories as the newest
// time of what is in them. Holes are not noted: what is zero in whole blocks of 4 KiB is a hole in what we restore.
//
// So two trees that are the same have the same id, and an incremental backup refers to the directories of its base that
// did not change, without reading them.
//
// # Maintenance
//
// Forgetting frees nothing by itself. Maintain runs kopia's maintenance, with all of kopia's safety times
// (maintenance.SafetyFull): every hour the quick cycle, which tidies indexes, and every 24 hours the full one. A full cycle
//
//   - deletes checkpoints whose backup exists, or that are a week old, and manifests that came back after they were
//     forgotten;
//   - marks contents as deleted that nothing refers to and that are 24 hours old, and takes the mark from those that
//     something refers to again. Until a marked content is dropped, it is read as if it had no mark;
//   - packs anew what lies in packs that are less than 60 % full, except manifests;
//   - drops from the index what was marked an hour or more before an earlier cycle began, one that had ended four hours or
//     more before this one;
//   - deletes packs that no index names and that are 24 hours old, an hour or more after the last packing.
//
// So space comes back in the third or fourth daily cycle after a backup was forgotten. What stays are dead contents in
// packs that are at least 60 % alive, and in the last pack that is not full.
//
// Only the owner may run it, stillpoint@HOST of Init or whoever took over; on one host one process at a time
// (OpenOptions.Locks). Several hosts that open a repository as the same HOST must agree among themselves. It needs no
// silence: a running backup is safe because what it relies on cannot be dropped for five hours after it was marked, a
// checkpoint or the commit takes the mark away before, and a commit that comes later than four hours after its writer
// began, or continues another, makes sure of everything that it refers to (see confirm). With a clock that is wrong it
// refuses to run. It stops, and frees nothing, at a manifest that cannot be read and at a backup that refers to what is
// not there. Killed at any point it has done part of its work, and the next goes on.
//
// In a repository that retains (Options.Retain) a full cycle also begins the time anew of every blob that there is. What
// maintenance deletes there, or in a bucket that locks by itself, gets a marker: its versions are the store's business.
//
// Kopia's own command may maintain the repository as well, connected as the owner. It marks the same contents, more slowly.
//
// # Promises
//
// No blob is rewritten in place, except those that kopia's own maintenance owns. A backup is listed only after its data
// was made durable and a sample of it read back. Forgetting a backup deletes its manifest and the records about it, and
// nothing else; killed at any point it has forgotten the backup or has not.
package repository
