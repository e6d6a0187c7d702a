// Package cut takes one instant over a set of volumes.
//
// A cut goes through these steps, each of which can fail, be cancelled, or be the last thing that the process did:
//
//	look up    volumes, mounts, stacking; what an earlier cut of this name left is adopted or removed
//	plan       pure: which filesystems freeze, in which order, between which snapshots; what is refused
//	gate       every backend says that it can snapshot now, and how long it will take
//	pre-sync   dirty pages and staged clones leave for the disk while nobody waits
//	freeze     through the freezer, upper before lower
//	snapshot   all volumes in parallel; each call returns when its point in time is fixed
//	thaw       in reverse, by descriptor; waits for nothing but the kernel
//	verify     pure: was every freeze held, did nothing write, is everything where it was
//	publish    the snapshots are marked verified; only now are they anybody's
//
// Until publish the snapshots bear the mark cutting, which nothing hands out. A void cut deletes them; a process that
// died leaves them for the next cut of the same name, which deletes them, unless the dead one had verified the cut and
// published a part: then the rest is published too (adopt.go).
//
// One instant means: no write that a process made after seeing another write is in the cut without that other write.
// Filesystems are frozen one after the other, but none is thawed before every snapshot is fixed, so a process that
// writes to one volume because of what it wrote to another cannot straddle the cut.
//
// # Volumes that freeze themselves
//
// Some snapshots cannot be taken under our freeze (adapters.FreezeSelf): device-mapper freezes ext4, XFS and f2fs by
// itself when it suspends a volume, and before about Linux 6.8 fails with EBUSY where they are frozen already (found by
// trying, never by the version; 6.1 fails, 6.12 does not). Such a snapshot fixes an instant of its own: the moment at
// which its backend has stopped all writers, somewhere within CreateSnapshot. One such volume can be in a cut that is
// one instant still. Let t be its instant. Everything else is frozen before its CreateSnapshot is called, and thawed
// after that has returned, so all other volumes stand still from before t until after t, and their snapshots, taken
// anywhere in that time, are what these volumes are at t. The cut is the state of all volumes at t: a write that is in
// it came before t, and so did every write that its author had seen. Two such volumes have two instants, and between
// these a process may write to one, and then, because of that, to the other.
//
// So the plan refuses a second one, or marks it VolumeConsistent where that is allowed; it also refuses what would
// have to be frozen by us for another volume's snapshot (a filesystem on several volumes), and what must be frozen
// only after the one's snapshot, because that writes to it. Filesystems on top of the volume's own, in files or
// encrypted, and btrfs, which device-mapper does not freeze, are frozen by us as always.
//
// What is proved of such a volume is less: that everything else stood still around its instant, and that what was
// mounted before is mounted after. That its backend froze it is the backend's promise; its write counters move before
// and after, as they may. The snapshots' notes say so.
package cut
