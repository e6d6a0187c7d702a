// Package freezer freezes filesystems under a lease, and thaws them whatever happens.
//
// A frozen filesystem (FIFREEZE) holds every write to it, and the kernel neither limits nor tells how long. So the
// freeze belongs to a small program of its own, cmd/stillpoint-freezer, and this package is that program's engine
// (Serve, Guard, Sweep) and the client (Spawn, Connect, Client, Lease) that everybody else uses.
//
// # Words
//
//   - Lease: a freeze of several filesystems, with two timers. The heartbeat is renewed by the client; the absolute
//     deadline (at most MaxFreeze) by nobody. Both run on CLOCK_BOOTTIME, from the receipt of the request.
//   - Holder: the first process. It talks to clients, freezes, thaws.
//   - Guard: the second process. It has descriptors of its own of everything that is about to be frozen, before it is.
//   - Ledger: memory that both share, as a file on a tmpfs. It says what each filesystem's freeze is at; whoever wants
//     to thaw first takes that on himself there, by compare-and-swap. What both leave behind is found in it by a sweep.
//
// # Life of a lease
//
// Everything that a request names is judged, opened and handed to the guard before the first FIFREEZE. Then the
// filesystems are frozen: those that are not stored on each other at the same time, each on a thread of its own, and
// what is stored on another before that other. A lease may stop in between (Request.First) and go on (Lease.More), so
// that something can be written to a lower filesystem while an upper one is frozen already: a clone into a pool whose
// own device is snapshotted next. The thaw goes in reverse order, one after the other.
//
// # Life of one freeze
//
//	            FIFREEZE failed
//	 freezing ────────────────────────────────────────────► unfrozen
//	  │    │ the lease ended      FIFREEZE failed               ▲
//	  │    └───────────────► doomed ────────────────────────────┘
//	  │ FIFREEZE returned 0    │ FIFREEZE returned 0
//	  ▼                        │ (its own thread goes on)
//	frozen                     │
//	  │ the lease ended        │                 FITHAW = 0
//	  └──────► thawing by ◄────┘  ┌───────────► thawed  (it was ours to the end)
//	           holder, guard ─────┤
//	           or a sweep         └───────────► gone    (somebody else had thawed it: the cut is void)
//	                                EINVAL
//
// Whoever makes the step to "thawing" is the only one who calls FITHAW. The other takes it over only from a process
// that cannot go on any more: one that is gone, or one that stands still and is therefore killed first. A freeze under
// way is thawed by its own thread as it lands, or by the survivor once that thread has left the kernel. So no FITHAW
// is sent into a freeze that somebody else made; it could undo it, or the one of device-mapper.
//
// # Promises
//
// Each has its test in this package.
//
//   - With any one process killed or stopped (client, holder, guard), every filesystem is thawed within 1 s of the
//     later of the deadline and FIFREEZE's own return. A client's end thaws at once, and so does the end of the holder
//     or of the guard.
//   - With holder and guard both gone, it is thawed within 1 s of the restart of the freezer (or by
//     `stillpoint-freezer sweep`), also if it was unmounted meanwhile, and also if they were killed inside FIFREEZE,
//     where a killed process goes only when the freeze has landed.
//   - Freeze answers by the deadline even if FIFREEZE does not return. Nothing waits without a limit for FIFREEZE, for
//     FITHAW or for a process that writes to a frozen filesystem: no signal reaches these.
//   - All or nothing: Freeze returns a lease over everything, or everything is thawed.
//   - A filesystem that somebody else has frozen is left alone. The root, what holds the system, the freezer's records,
//     socket and output, and what these are stored on, are refused. Filesystems of a network or of FUSE are told from
//     mountinfo and never touched, nor is anything behind them.
//   - A report says Held only if FITHAW found the freeze that we made, or one that looks the same: see Frozen.Held.
//   - Between freeze and thaw nothing is written, logged, or read from a disk. Every descriptor is closed by the time
//     that Thaw returns: an unmount succeeds at once.
//
// # Assumptions and limits
//
// The kernel runs our threads: a machine that does not schedule thaws late. Linux 5.6 or later (openat2; detached
// mounts are of 5.2). The freezer runs as root with CAP_SYS_ADMIN, CAP_IPC_LOCK and CAP_DAC_READ_SEARCH;
// CAP_SYS_RESOURCE keeps the OOM killer away, CAP_SYS_NICE puts it ahead of others; without these two it says so in
// Status.Weakness, or works at its normal priority.
//
// If holder, guard and sweep all fail, `echo j > /proc/sysrq-trigger` thaws every filesystem of the machine, those of
// others too. The freezer never does that by itself.
//
// A stranger can defeat the ownership of a freeze in two ways, because the kernel has no question "who froze this?":
// by thawing ours and freezing again; and by freezing the same filesystem in the very moment in which one of our
// processes is killed inside FIFREEZE. Then our FITHAW ends the stranger's freeze.
//
// # Security
//
// The socket is in a folder that only root may enter, and the kernel is asked who connected; a spawned freezer has no
// socket in the tree at all. The program leaves the network and all other capabilities as its first act. Messages are
// JSON of at most 64 KiB over SOCK_SEQPACKET (wire.go); rubbish ends the connection, and the connection's end thaws.
package freezer
