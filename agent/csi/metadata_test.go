package csi_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/adapters/mem"
	"stillpoint.io/stillpoint/agent/csi"
	"stillpoint.io/stillpoint/agent/kube/class"
	"stillpoint.io/stillpoint/fault"
	integration "stillpoint.io/stillpoint/integration/csi"
)

// world is a driver over volumes in memory, and a client. Nothing in it can be frozen, so its class allows that.
type world struct {
	store  mem.Store
	config csi.Config
	csipb.ControllerClient
	csipb.GroupControllerClient
	csipb.SnapshotMetadataClient
}

var crash = map[string]string{class.CrashKey: "true"}

func newWorld(t *testing.T, change func(*world)) *world {
	t.Helper()
	w := &world{}
	a := w.store.Adapter("mem")
	t.Cleanup(func() {
		if err := a.Close(); err != nil {
			t.Error(err)
		}
	})
	dir := t.TempDir()
	w.config = csi.Config{Backends: csi.Backends{"mem": {Kind: adapters.Kind{Name: "mem"}, Adapter: a}}, Cut: integration.Node(t, freezerProgram)}
	if change != nil {
		change(w)
	}
	conn, err := grpc.NewClient("unix://"+integration.Serve(t, dir, w.config), grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	w.ControllerClient, w.GroupControllerClient = csipb.NewControllerClient(conn), csipb.NewGroupControllerClient(conn)
	w.SnapshotMetadataClient = csipb.NewSnapshotMetadataClient(conn)
	return w
}

func (w *world) volume(t *testing.T, name string, size int64) *mem.Volume {
	t.Helper()
	v, err := w.store.Create(name, size)
	must(t, err)
	return v
}

func (w *world) snapshot(t *testing.T, v *mem.Volume, name string) string {
	t.Helper()
	r, err := w.CreateSnapshot(t.Context(), &csipb.CreateSnapshotRequest{Name: name, SourceVolumeId: "mem:" + v.ID(), Parameters: crash})
	must(t, err)
	return r.GetSnapshot().GetSnapshotId()
}

func write(t *testing.T, v *mem.Volume, at ...int64) {
	t.Helper()
	for _, off := range at {
		_, err := v.WriteAt([]byte("something"), off)
		must(t, err)
	}
}

// told is all that a stream said.
type told struct {
	ranges   []string // offset+length
	pages    []int    // their lengths
	style    csipb.BlockMetadataType
	capacity int64
	end      int64 // behind the last range
}

// page is what both responses have.
type page interface {
	GetBlockMetadata() []*csipb.BlockMetadata
	GetBlockMetadataType() csipb.BlockMetadataType
	GetVolumeCapacityBytes() int64
}

// read reads a stream to its end or error, and checks what every stream owes.
func read[P page](t *testing.T, recv func() (P, error), from int64, most int32) (told, error) {
	t.Helper()
	var all told
	var length int64
	for {
		p, err := recv()
		if errors.Is(err, io.EOF) {
			return all, nil
		}
		if err != nil {
			return all, err
		}
		if len(all.pages) > 0 && (p.GetBlockMetadataType() != all.style || p.GetVolumeCapacityBytes() != all.capacity) {
			t.Errorf("style or capacity changed: %v, %d", p.GetBlockMetadataType(), p.GetVolumeCapacityBytes())
		}
		all.style, all.capacity = p.GetBlockMetadataType(), p.GetVolumeCapacityBytes()
		all.pages = append(all.pages, len(p.GetBlockMetadata()))
		if most > 0 && len(p.GetBlockMetadata()) > int(most) {
			t.Errorf("%d results, at most %d were asked for", len(p.GetBlockMetadata()), most)
		}
		for _, b := range p.GetBlockMetadata() {
			switch {
			case b.GetSizeBytes() <= 0 || b.GetByteOffset() < all.end || b.GetByteOffset()+b.GetSizeBytes() > all.capacity:
				t.Errorf("%v after %d in %d bytes", b, all.end, all.capacity)
			case all.end == 0 && b.GetByteOffset()+b.GetSizeBytes() <= from:
				t.Errorf("%v ends before the starting offset %d", b, from)
			case all.style == csipb.BlockMetadataType_FIXED_LENGTH && length != 0 && b.GetSizeBytes() != length:
				t.Errorf("%v, and others of %d bytes", b, length)
			}
			length, all.end = b.GetSizeBytes(), b.GetByteOffset()+b.GetSizeBytes()
			all.ranges = append(all.ranges, fmt.Sprintf("%d+%d", b.GetByteOffset(), b.GetSizeBytes()))
		}
	}
}

func (w *world) allocated(t *testing.T, r *csipb.GetMetadataAllocatedRequest) (told, error) {
	t.Helper()
	s, err := w.GetMetadataAllocated(t.Context(), r)
	must(t, err)
	return read(t, s.Recv, r.GetStartingOffset(), r.GetMaxResults())
}

func (w *world) delta(t *testing.T, r *csipb.GetMetadataDeltaRequest) (told, error) {
	t.Helper()
	s, err := w.GetMetadataDelta(t.Context(), r)
	must(t, err)
	return read(t, s.Recv, r.GetStartingOffset(), r.GetMaxResults())
}

const k64 = 64 << 10

// What a volume holds and what changed, in both styles, in pages, and from the middle.
func TestMetadata(t *testing.T) {
	for _, c := range []struct {
		block            int64
		size             int64
		allocated, delta string
		style            csipb.BlockMetadataType
	}{
		{0, 1 << 20, "[0+65536 196608+131072 983040+65536]", "[0+65536 262144+65536 524288+65536]", csipb.BlockMetadataType_VARIABLE_LENGTH},
		{k64, 1 << 20, "[0+65536 196608+65536 262144+65536 983040+65536]", "[0+65536 262144+65536 524288+65536]", csipb.BlockMetadataType_FIXED_LENGTH},
		{256 << 10, 1 << 20, "[0+262144 262144+262144 786432+262144]", "[0+262144 262144+262144 524288+262144]", csipb.BlockMetadataType_FIXED_LENGTH},
		// Blocks of 64 KiB do not fit: the largest that do are smaller, or none.
		{k64, 1<<20 + 8192, "", "", csipb.BlockMetadataType_FIXED_LENGTH},
		{k64, 1<<20 + 512, "[0+65536 196608+131072 983040+65536]", "[0+65536 262144+65536 524288+65536]", csipb.BlockMetadataType_VARIABLE_LENGTH},
	} {
		t.Run(fmt.Sprintf("%d in blocks of %d", c.size, c.block), func(t *testing.T) {
			w := newWorld(t, func(w *world) { w.config.MetadataBlock = c.block })
			v := w.volume(t, "v", c.size)
			write(t, v, 0, 3*k64, 4*k64, 15*k64)
			base := w.snapshot(t, v, "base")
			write(t, v, 8*k64)
			must(t, v.Zero(0, k64)) // became zero: changed, and not allocated
			_, err := v.WriteAt([]byte("other"), 4*k64)
			must(t, err)
			target := w.snapshot(t, v, "target")

			all, err := w.allocated(t, &csipb.GetMetadataAllocatedRequest{SnapshotId: base})
			must(t, err)
			changed, err := w.delta(t, &csipb.GetMetadataDeltaRequest{BaseSnapshotId: base, TargetSnapshotId: target})
			must(t, err)
			for _, got := range []told{all, changed} {
				if got.style != c.style || got.capacity != c.size {
					t.Errorf("%v, %d bytes", got.style, got.capacity)
				}
			}
			if got := fmt.Sprint(all.ranges); c.allocated != "" && got != c.allocated {
				t.Errorf("allocated %s, want %s", got, c.allocated)
			}
			if got := fmt.Sprint(changed.ranges); c.delta != "" && got != c.delta {
				t.Errorf("changed %s, want %s", got, c.delta)
			}
			if c.allocated == "" && (len(all.ranges) != 4*8 || all.ranges[0] != "0+8192") {
				t.Errorf("allocated %v, want four times eight blocks of 8192", all.ranges)
			}
			if got, err := w.allocated(t, &csipb.GetMetadataAllocatedRequest{SnapshotId: target}); err != nil || c.block <= k64 && slices.Contains(got.ranges, all.ranges[0]) {
				t.Errorf("what became zero is allocated: %v, %v", got.ranges, err)
			}
			for _, most := range []int32{1, 2, 1 << 30} {
				got, err := w.delta(t, &csipb.GetMetadataDeltaRequest{BaseSnapshotId: base, TargetSnapshotId: target, MaxResults: most})
				if err != nil || !slices.Equal(got.ranges, changed.ranges) || most == 1 && len(got.pages) != len(got.ranges) {
					t.Errorf("in pages of %d: %v %v, %v", most, got.pages, got.ranges, err)
				}
			}
			for i := range all.ranges { // resumed behind the range before
				var off, length int64
				fmt.Sscanf(all.ranges[i], "%d+%d", &off, &length)
				got, err := w.allocated(t, &csipb.GetMetadataAllocatedRequest{SnapshotId: base, StartingOffset: off + length})
				if err != nil || !slices.Equal(got.ranges, all.ranges[i+1:]) {
					t.Errorf("behind %s: %v, %v", all.ranges[i], got.ranges, err)
				}
			}
			if got, err := w.allocated(t, &csipb.GetMetadataAllocatedRequest{SnapshotId: base, StartingOffset: 3*k64 + 5}); err != nil || len(got.ranges) == 0 {
				t.Errorf("from the middle of a range: %v, %v", got.ranges, err)
			}
			if got, err := w.delta(t, &csipb.GetMetadataDeltaRequest{BaseSnapshotId: base, TargetSnapshotId: base}); err != nil || len(got.ranges) != 0 || !slices.Equal(got.pages, []int{0}) || got.capacity != c.size {
				t.Errorf("no change: %+v, %v", got, err)
			}
		})
	}
}

// Every error that the specification has, and the one that keeps secrets.
func TestMetadataErrors(t *testing.T) {
	w := newWorld(t, nil)
	v, other := w.volume(t, "v", 1<<20), w.volume(t, "other", 1<<20)
	base, target, foreign := w.snapshot(t, v, "base"), w.snapshot(t, v, "target"), w.snapshot(t, other, "foreign")
	cutting, err := w.config.Backends["mem"].Adapter.CreateSnapshot(t.Context(), adapters.VolumeID{Backend: "mem", ID: v.ID()}, "cutting")
	must(t, err)
	for _, c := range []struct {
		what string
		r    *csipb.GetMetadataAllocatedRequest
		want codes.Code
	}{
		{"no id", &csipb.GetMetadataAllocatedRequest{}, codes.InvalidArgument},
		{"max_results", &csipb.GetMetadataAllocatedRequest{SnapshotId: base, MaxResults: -1}, codes.InvalidArgument},
		{"no handle", &csipb.GetMetadataAllocatedRequest{SnapshotId: "x"}, codes.NotFound},
		{"absent", &csipb.GetMetadataAllocatedRequest{SnapshotId: "mem:local/v@absent"}, codes.NotFound},
		{"cutting", &csipb.GetMetadataAllocatedRequest{SnapshotId: cutting.ID.String()}, codes.NotFound},
		{"a volume", &csipb.GetMetadataAllocatedRequest{SnapshotId: "mem:local/v"}, codes.NotFound},
		{"negative", &csipb.GetMetadataAllocatedRequest{SnapshotId: base, StartingOffset: -1}, codes.OutOfRange},
		{"beyond", &csipb.GetMetadataAllocatedRequest{SnapshotId: base, StartingOffset: 1<<20 + 1}, codes.OutOfRange},
		{"the end", &csipb.GetMetadataAllocatedRequest{SnapshotId: base, StartingOffset: 1 << 20}, codes.OK},
		{"another node", &csipb.GetMetadataAllocatedRequest{SnapshotId: "elsewhere:local/v@base"}, codes.Unavailable},
	} {
		if _, err := w.allocated(t, c.r); status.Code(err) != c.want {
			t.Errorf("%s: %v, want %v", c.what, err, c.want)
		}
	}
	words := map[string]bool{}
	for _, c := range []struct {
		base, target string
		from         int64
		most         int32
		want         codes.Code
	}{
		{"", target, 0, 0, codes.InvalidArgument}, {base, "", 0, 0, codes.InvalidArgument},
		{base, target, 0, -1, codes.InvalidArgument}, {base, target, -1, 0, codes.OutOfRange}, {base, target, 1<<20 + 1, 0, codes.OutOfRange},
		{base, foreign, 0, 0, codes.NotFound}, {foreign, target, 0, 0, codes.NotFound}, {"mem:local/v@absent", target, 0, 0, codes.NotFound},
		{base, "mem:local/none@absent", 0, 0, codes.NotFound}, {"x", target, 0, 0, codes.NotFound}, {cutting.ID.String(), target, 0, 0, codes.NotFound},
		{base, target, 0, 0, codes.OK},
	} {
		_, err := w.delta(t, &csipb.GetMetadataDeltaRequest{BaseSnapshotId: c.base, TargetSnapshotId: c.target, StartingOffset: c.from, MaxResults: c.most})
		if status.Code(err) != c.want {
			t.Errorf("%+v: %v", c, err)
		}
		if c.want == codes.NotFound {
			words[status.Convert(err).Message()] = true
		}
	}
	if len(words) != 1 {
		t.Errorf("whoever asks learns from %d different answers: %v", len(words), words)
	}
}

// Snapshots of two namespaces are not compared, and the answer is the one for snapshots that are not there.
type apart struct{ csi.Standalone }

func (apart) Related(context.Context, string, string) error {
	return fault.Errorf(fault.NotFound, "they are of the namespaces one and two")
}

func TestMetadataOfTwoNamespaces(t *testing.T) {
	w := newWorld(t, func(w *world) { w.config.Lookup = apart{csi.Standalone{Backends: w.config.Backends}} })
	v := w.volume(t, "v", 1<<20)
	base, target := w.snapshot(t, v, "base"), w.snapshot(t, v, "target")
	_, apart := w.delta(t, &csipb.GetMetadataDeltaRequest{BaseSnapshotId: base, TargetSnapshotId: target})
	_, absent := w.delta(t, &csipb.GetMetadataDeltaRequest{BaseSnapshotId: base, TargetSnapshotId: "mem:local/v@absent"})
	if status.Code(apart) != codes.NotFound || apart.Error() != absent.Error() {
		t.Errorf("%v\n%v", apart, absent)
	}
}

// A snapshot that is not ready is tried again later.
func TestMetadataOfPendingSnapshot(t *testing.T) {
	w := newWorld(t, func(w *world) { w.store.Pending = time.Hour })
	id := w.snapshot(t, w.volume(t, "v", 1<<20), "s")
	if _, err := w.allocated(t, &csipb.GetMetadataAllocatedRequest{SnapshotId: id}); status.Code(err) != codes.Unavailable {
		t.Error(err)
	}
}

// A stream that takes too long ends with an error that is not the end of the data; whoever goes on behind what came gets
// all of it.
func TestMetadataStreamLimit(t *testing.T) {
	var items atomic.Int64
	w := newWorld(t, func(w *world) {
		stalling := adapters.Layer{
			Around: func(ctx context.Context, c adapters.Call, do adapters.Do) error { return do(ctx, c) },
			Item: func(ctx context.Context, c adapters.Call) error {
				if c.Method != "Extents" || items.Add(1)%4 != 0 {
					return nil
				}
				<-ctx.Done()
				return ctx.Err()
			},
		}
		b := w.config.Backends["mem"]
		w.config.Backends["mem"] = csi.Backend{Kind: b.Kind, Adapter: adapters.Decorate(b.Adapter, stalling)}
		w.config.StreamLimit = 200 * time.Millisecond
	})
	v := w.volume(t, "v", 4<<20)
	for i := range int64(8) {
		write(t, v, 2*i*k64)
	}
	id := w.snapshot(t, v, "s")
	var got []string
	from, cut := int64(0), 0
	for {
		all, err := w.allocated(t, &csipb.GetMetadataAllocatedRequest{SnapshotId: id, StartingOffset: from, MaxResults: 1})
		got = append(got, all.ranges...)
		from = max(from, all.end)
		if err == nil {
			break
		}
		if status.Code(err) != codes.DeadlineExceeded {
			t.Fatal(err)
		}
		cut++
	}
	if len(got) != 8 || cut == 0 || got[7] != fmt.Sprintf("%d+%d", 14*k64, k64) {
		t.Errorf("%d streams were cut short, and together they told %v", cut, got)
	}
}
