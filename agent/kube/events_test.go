package kube

import (
	"errors"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	corev1 "k8s.io/api/core/v1"

	"stillpoint.io/stillpoint/fault"
)

func TestWords(t *testing.T) {
	for _, c := range []struct {
		event Event
		says  string
	}{
		{Frozen(0, 0), "nothing had to be frozen"},
		{Frozen(1, 12345678*time.Nanosecond), "was frozen for 12.35ms"},
		{Frozen(3, 2*time.Second), "3 filesystems were frozen together, for 2s"},
		{BackingUp(2, 5), "at 40 %"},
		{BackingUp(1<<62, 1<<62), "at 100 %"},
		{BackedUp("backup:r/1"), "backup:r/1"},
		{Failed("Cutting the volume", fault.Errorf(fault.Busy, "pool p is held")), "Cutting the volume failed: pool p is held. It is tried again."},
		{Failed("Cutting the volume", fault.Errorf(fault.Void, "it thawed")), "discarded"},
		{Failed("Cutting the volume", errors.New("a bug")), "Trying again will not help"},
	} {
		if !strings.Contains(c.event.Message, c.says) || c.event.Reason == "" || (c.event.Type == corev1.EventTypeWarning) != strings.Contains(c.event.Message, "failed") {
			t.Errorf("%+v does not say %q", c.event, c.says)
		}
	}
}

func TestMilestone(t *testing.T) {
	told := 0
	for done := int64(1); done <= 1000; done++ {
		if Milestone(done-1, done, 1000) {
			told++
		}
	}
	if told != 5 || Milestone(0, 0, 0) {
		t.Errorf("told %d times", told)
	}
}

func TestTruncated(t *testing.T) {
	long := strings.Repeat("ü", 2000)
	if got := truncated(long); len(got) > mostMessage || !utf8.ValidString(got) || !strings.HasSuffix(got, "ü …") {
		t.Errorf("%d bytes: …%q", len(got), got[len(got)-9:])
	}
	if got := truncated("short"); got != "short" {
		t.Error(got)
	}
}
