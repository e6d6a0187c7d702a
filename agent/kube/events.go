package kube

import (
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"

	"stillpoint.io/stillpoint/fault"
)

// Event is something that happened to a VolumeSnapshot, in words for whoever looks at it with `kubectl describe`.
type Event struct {
	Type    string // corev1.EventTypeNormal or corev1.EventTypeWarning
	Reason  string // one word, the same for the same kind of thing
	Message string // sentences
}

// Frozen tells that a snapshot's point in time is fixed, and what it cost.
func Frozen(filesystems int, d time.Duration) Event {
	message := "The point in time is fixed; nothing had to be frozen."
	switch {
	case filesystems == 1:
		message = fmt.Sprintf("The point in time is fixed; the volume's filesystem was frozen for %s.", short(d))
	case filesystems > 1:
		message = fmt.Sprintf("The point in time is fixed; %d filesystems were frozen together, for %s.", filesystems, short(d))
	}
	return Event{corev1.EventTypeNormal, "SnapshotCut", message}
}

// BackingUp tells how far a backup is. Callers tell it when [Milestone] says so.
func BackingUp(done, total int64) Event {
	return Event{corev1.EventTypeNormal, "BackupProgress", fmt.Sprintf("The backup is at %d %%.", percent(done, total))}
}

// BackedUp tells that a backup is complete, and was read back.
func BackedUp(handle string) Event {
	return Event{corev1.EventTypeNormal, "BackupComplete", fmt.Sprintf("The backup is complete: %s.", handle)}
}

// Failed tells why something failed and what happens next. doing is what was done, such as "cutting the volume".
func Failed(doing string, err error) Event {
	next := map[fault.Kind]string{
		fault.Busy:        "It is tried again.",
		fault.Exhausted:   "It is tried again, and fails until there is room.",
		fault.Unavailable: "It is tried again.",
		fault.Void:        "What was cut is discarded, and it is tried again.",
		fault.Corrupt:     "It is not papered over: this needs a person.",
	}[fault.KindOf(err)]
	if next == "" {
		next = "Trying again will not help until that is changed."
	}
	return Event{corev1.EventTypeWarning, "SnapshotFailed", fmt.Sprintf("%s failed: %v. %s", doing, err, next)}
}

// milestone is after how many percent a backup's progress is an event: nobody reads a hundred.
const milestone = 20

// Milestone says whether a backup has passed a fifth of its way since it was last asked.
func Milestone(before, done, total int64) bool {
	return percent(done, total)/milestone > percent(before, total)/milestone
}

func percent(done, total int64) int64 {
	if total <= 0 {
		return 0
	}
	return int64(float64(done) / float64(total) * 100)
}

// short is a duration with three digits.
func short(d time.Duration) time.Duration {
	for _, unit := range []time.Duration{time.Second, time.Millisecond, time.Microsecond} {
		if d >= unit {
			return d.Round(unit / 100)
		}
	}
	return d
}
