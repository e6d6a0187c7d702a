package csi

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/kube/class"
	"stillpoint.io/stillpoint/fault"
)

func TestCodes(t *testing.T) {
	for kind, want := range map[fault.Kind]codes.Code{
		fault.Internal: codes.Internal, fault.NotFound: codes.NotFound, fault.Invalid: codes.InvalidArgument, fault.Busy: codes.FailedPrecondition,
		fault.Unsupported: codes.FailedPrecondition, fault.Corrupt: codes.DataLoss, fault.Exhausted: codes.ResourceExhausted,
		fault.Unavailable: codes.Unavailable, fault.Void: codes.Aborted,
	} {
		err := toStatus(fmt.Errorf("outer: %w", fault.Errorf(kind, "inner")))
		if status.Code(err) != want || status.Convert(err).Message() != "outer: inner" {
			t.Errorf("%v: %v", kind, err)
		}
	}
	for _, c := range []struct {
		err  error
		want codes.Code
	}{
		{nil, codes.OK},
		{context.Canceled, codes.Canceled},
		{fmt.Errorf("x: %w", context.DeadlineExceeded), codes.DeadlineExceeded},
		{errors.New("unforeseen"), codes.Internal},
		{fmt.Errorf("x: %w", status.Error(codes.AlreadyExists, "taken")), codes.AlreadyExists},
		{missing("name"), codes.InvalidArgument},
	} {
		if got := status.Code(toStatus(c.err)); got != c.want {
			t.Errorf("%v: %v, want %v", c.err, got, c.want)
		}
	}
	st := status.Convert(toStatus(&fault.Error{Kind: fault.Exhausted, RetryAfter: time.Minute, Err: errors.New("slow down")}))
	if info, ok := st.Details()[0].(*errdetails.RetryInfo); !ok || info.GetRetryDelay().AsDuration() != time.Minute {
		t.Errorf("%v", st.Details())
	}
}

func TestChooseBackend(t *testing.T) {
	b := Backends{"a": {Kind: adapters.Kind{Name: "mem"}}, "b": {Kind: adapters.Kind{Name: "reflink"}}, "c": {Kind: adapters.Kind{Name: "reflink"}}}
	all := func(adapters.Adapter) bool { return true }
	for _, c := range []struct {
		class class.Class
		want  string
		says  string
	}{
		{class.Class{Adapter: "mem"}, "a", ""},
		{class.Class{Backend: "c"}, "c", ""},
		{class.Class{Backend: "c", Adapter: "reflink"}, "c", ""},
		{class.Class{Backend: "c", Adapter: "mem"}, "", `is of the adapter "reflink"`},
		{class.Class{Backend: "d"}, "", "there is no backend"},
		{class.Class{Adapter: "reflink"}, "", "b, c"},
		{class.Class{Adapter: "relfink"}, "", `did you mean "reflink"`},
		{class.Class{}, "", "3 backends"},
	} {
		got, _, err := b.choose(c.class, all, "can")
		if got != c.want || (err == nil) != (c.says == "") || err != nil && (!strings.Contains(err.Error(), c.says) || !errors.Is(err, fault.Invalid)) {
			t.Errorf("%+v: %q, %v", c.class, got, err)
		}
	}
	if _, _, err := b.choose(class.Class{}, func(adapters.Adapter) bool { return false }, "cannot"); !errors.Is(err, fault.Unsupported) {
		t.Error(err)
	}
}

func TestSizes(t *testing.T) {
	for _, c := range []struct {
		required, limit, least, want int64 // want 0: OutOfRange
	}{
		{0, 0, 0, 1 << 30}, {0, 1 << 20, 0, 1 << 20}, {1, 0, 0, 4096}, {4096, 4096, 0, 4096}, {5000, 8192, 0, 8192},
		{5000, 8191, 0, 0}, {8192, 4096, 0, 0}, {-1, 0, 0, 0}, {0, 4095, 0, 0}, {1 << 63 >> 1 & (1<<63 - 1), 0, 0, 0},
		{0, 0, 12345, 16384}, {1 << 20, 0, 4096, 1 << 20}, {4096, 0, 8192, 0}, {0, 4096, 8192, 0}, {1<<63 - 1, 0, 0, 0},
	} {
		got, err := chooseSize(&csipb.CapacityRange{RequiredBytes: c.required, LimitBytes: c.limit}, c.least)
		if got != c.want || (err == nil) != (c.want > 0) || err != nil && status.Code(err) != codes.OutOfRange {
			t.Errorf("%+v: %d, %v", c, got, err)
		}
	}
}

// Pages hold everything that was there all the time, once, whatever comes and goes between them.
func TestPages(t *testing.T) {
	make := func(ids string) (all []*csipb.Snapshot) {
		for _, id := range strings.Fields(ids) {
			all = append(all, &csipb.Snapshot{SnapshotId: id})
		}
		return all
	}
	ids := func(all []*csipb.Snapshot) (words []string) {
		for _, s := range all {
			words = append(words, s.GetSnapshotId())
		}
		return words
	}
	page, next := pageOf(make("e c a d b"), "", 2)
	if fmt.Sprint(ids(page)) != "[a b]" || next != "after:b" {
		t.Errorf("%v %q", ids(page), next)
	}
	after, err := pageAfter(next)
	if err != nil {
		t.Fatal(err)
	}
	if page, next = pageOf(make("f e c d aa a bb"), after, 3); fmt.Sprint(ids(page)) != "[bb c d]" || next != "after:d" {
		t.Errorf("%v %q", ids(page), next)
	}
	if page, next = pageOf(make("d e"), "d", 0); fmt.Sprint(ids(page)) != "[e]" || next != "" {
		t.Errorf("%v %q", ids(page), next)
	}
	if page, next = pageOf(make("a b"), "", 2); len(page) != 2 || next != "" {
		t.Errorf("%v %q: a last page that is full has no token", ids(page), next)
	}
	if _, err := pageAfter("2"); status.Code(err) != codes.Aborted {
		t.Error(err)
	}
}

func TestCapable(t *testing.T) {
	mode := func(m csipb.VolumeCapability_AccessMode_Mode, fs string) *csipb.VolumeCapability {
		return &csipb.VolumeCapability{AccessMode: &csipb.VolumeCapability_AccessMode{Mode: m},
			AccessType: &csipb.VolumeCapability_Mount{Mount: &csipb.VolumeCapability_MountVolume{FsType: fs}}}
	}
	good := mode(csipb.VolumeCapability_AccessMode_SINGLE_NODE_WRITER, "xfs")
	if err := capable([]*csipb.VolumeCapability{good}); err != nil {
		t.Error(err)
	}
	for says, bad := range map[string]*csipb.VolumeCapability{
		"by one node":           mode(csipb.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER, "xfs"),
		`did you mean "ext4"`:   mode(csipb.VolumeCapability_AccessMode_SINGLE_NODE_WRITER, "ext5"),
		"there is ext4":         mode(csipb.VolumeCapability_AccessMode_SINGLE_NODE_WRITER, "ntfs"),
		"has no access_type":    {AccessMode: good.AccessMode},
		"access mode UNKNOWN: ": {},
	} {
		if err := capable([]*csipb.VolumeCapability{good, bad}); status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), says) {
			t.Errorf("%v: %v, want %q", bad, err, says)
		}
	}
}
