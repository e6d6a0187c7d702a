// Package audit is how Stillpoint distrusts changed blocks. Everything here is a pure decision: nothing is read, nothing
// is written, chance comes from the caller's source. Whoever reads volumes (agent/backup) does what it says.
//
// A backend's list of changed blocks is the one thing in a backup that no checksum covers: what it leaves out is never
// read, so a wrong list makes wrong backups that verify. All that can be done is to look where it says there is nothing.
// There are four layers.
//
//  1. Quirks (Judge): sources known to have been wrong, by name and version, under circumstances that can be recognised.
//  2. The canary (Pattern, Compare): known writes on a volume of our own must be in the list.
//  3. The sample (Field.Sample): each backup reads some of what the list leaves out and compares it with the backup before.
//  4. The coverage (Coverage, Due): when each stretch of a volume was last compared; a scrub reads what is due.
//
// # What a sample finds
//
// Let a fraction f of the chunks that could be drawn have changed without being listed. With n of them drawn at random,
// the chance to find at least one is at least
//
//	1 − (1 − f)^n
//
// exactly that if chunks were drawn with replacement, and a little more without, as they are here. A sample has three
// parts, and the chances to miss multiply: n/2 chunks from stretches that hold data, n/4 from anywhere, n/4 from those
// compared longest ago. The last part is no matter of chance: a volume of s bytes of which a backup's share is r bytes is
// covered in ⌈s/r⌉ backups, and a change missed that stays is found with certainty by then.
package audit
