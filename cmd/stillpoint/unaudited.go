package main

import (
	"fmt"
	"time"

	"stillpoint.io/stillpoint/agent/backup"
	"stillpoint.io/stillpoint/agent/repository"
)

// statusLine is a remote as `remote status --json` prints it.
type statusLine struct {
	repository.Status
	Unaudited *unauditedLine `json:"unaudited,omitempty"` // the volume of which some stretch was not looked at for longest
}

type unauditedLine struct {
	Volume string    `json:"volume"`
	Since  time.Time `json:"since"`
}

func newStatusLine(s repository.Status, looked []backup.Unaudited) statusLine {
	line := statusLine{Status: s}
	if len(looked) > 0 && !looked[0].Since.IsZero() {
		line.Unaudited = &unauditedLine{looked[0].Volume.String(), looked[0].Since}
	}
	return line
}

// describeUnaudited says it in words.
func describeUnaudited(u backup.Unaudited, now time.Time) string {
	if u.Since.IsZero() {
		return "nothing: every chunk of the newest backups was compared with its snapshot"
	}
	return fmt.Sprintf("some of %s since %s (%s); `stillpoint scrub` looks at it", u.Volume, u.Since.Local().Format(time.DateTime), age(now.Sub(u.Since)))
}
