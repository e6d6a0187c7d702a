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
package cut
