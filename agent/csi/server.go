// Package csi is the CSI driver: one driver for the volumes of every backend. It serves Identity, Controller,
// GroupController, SnapshotMetadata and Node of the CSI specification v1.12 (the source of every rule named here).
//
// # Handles
//
// Snapshots have the handles of package adapters, BACKEND:ID@NAME or the short form, at most 128 bytes. Volumes that the
// driver made have BACKEND:ID. A group's handle is group/ and the instant of its cut, which every member's notes have
// too: whether a snapshot is of a group can be checked without a record of groups.
//
// # What a snapshot is
//
// CreateSnapshot is a cut of one volume, CreateVolumeGroupSnapshot a cut of several (package cut): filesystems are frozen
// where they are mounted on this node, the snapshot is verified before anybody is told of it, and repeating the call is
// repeating the cut by its name. A snapshot that is still cutting does not exist for any call.
//
// # Whose volume
//
// What only the orchestrator knows is behind Lookup. Volumes are created, grown, attached and deleted only of backends that
// are a Provisioner, and only those that bear the mark that they were made by us.
//
// # Calls that are cut short
//
// Every call may be repeated. Calls on one volume take turns. What a Node call or a change of a volume has begun is finished
// even if its caller leaves, so that no filesystem is half made; the next call finds the result, and until then Aborted.
package csi

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"sync"
	"time"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"stillpoint.io/stillpoint/agent/cut"
	"stillpoint.io/stillpoint/agent/kube"
	"stillpoint.io/stillpoint/agent/kube/class"
)

// DriverName is the name of the CSI driver.
const DriverName = class.Driver

// Config is what a driver needs. Backends, Cut and Node are required.
type Config struct {
	Name    string // default DriverName
	Version string
	Node    string // this node's name, as the orchestrator has it

	Backends Backends
	Lookup   Lookup // default Standalone
	// Tell tells people what happens to a VolumeSnapshot; default nobody. It does not wait.
	Tell func(class.Origin, kube.Event)
	// Cut is the machine that cuts are made on.
	Cut cut.Node
	// Ready says why the driver cannot work now; nil if it can.
	Ready func(context.Context) error

	// StreamLimit ends a stream of metadata, with DeadlineExceeded; whoever reads it goes on by its starting_offset.
	// Default 10 minutes.
	StreamLimit time.Duration
	// MetadataBlock is the size of the blocks that metadata come in, bytes, a power of two of at least 4096: FIXED_LENGTH.
	// 0, the default, is VARIABLE_LENGTH: extents as the backend has them.
	MetadataBlock int64

	Log *slog.Logger // default slog.Default()
}

// Driver serves CSI.
type Driver struct {
	Config
	server *grpc.Server
	turns  *turns
	mounts mounter
}

// New makes a driver that is not serving yet.
func New(c Config) (*Driver, error) {
	if c.Name == "" {
		c.Name = DriverName
	}
	if c.Lookup == nil {
		c.Lookup = Standalone{c.Backends}
	}
	if c.StreamLimit == 0 {
		c.StreamLimit = 10 * time.Minute
	}
	if c.Log == nil {
		c.Log = slog.Default()
	}
	if c.Tell == nil {
		c.Tell = func(class.Origin, kube.Event) {}
	}
	if c.Ready == nil {
		c.Ready = func(context.Context) error { return nil }
	}
	if c.Node == "" {
		return nil, errors.New("a driver needs the node's name")
	}
	if b := c.MetadataBlock; b != 0 && (b < blockMin || b&(b-1) != 0) {
		return nil, errors.New("the size of metadata's blocks is a power of two of at least 4096")
	}
	d := &Driver{Config: c, turns: newTurns(), mounts: newMounter()}
	d.server = grpc.NewServer(
		grpc.ChainUnaryInterceptor(d.unary),
		grpc.ChainStreamInterceptor(d.stream),
	)
	csipb.RegisterIdentityServer(d.server, &identity{Driver: d})
	csipb.RegisterControllerServer(d.server, &controller{Driver: d})
	csipb.RegisterGroupControllerServer(d.server, &group{Driver: d})
	csipb.RegisterSnapshotMetadataServer(d.server, &metadata{Driver: d})
	csipb.RegisterNodeServer(d.server, &node{Driver: d})
	return d, nil
}

// Serve serves until Stop, or until the listener fails. It returns nil after Stop.
func (d *Driver) Serve(l net.Listener) error {
	if err := d.server.Serve(l); !errors.Is(err, grpc.ErrServerStopped) {
		return err
	}
	return nil
}

// Stop takes no more calls, lets those under way end until the context is over, then cancels them, and waits for whatever is
// not cut short.
func (d *Driver) Stop(ctx context.Context) {
	ended := make(chan struct{})
	go func() { d.server.GracefulStop(); close(ended) }() // ends with the last call, which Stop below ends
	select {
	case <-ended:
	case <-ctx.Done():
		d.turns.quit()
		d.server.Stop()
		<-ended
	}
	context.AfterFunc(ctx, d.turns.quit)
	d.turns.working.Wait()
}

// unary logs a call, and gives its error a code.
func (d *Driver) unary(ctx context.Context, request any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
	begin := time.Now()
	response, err := handle(ctx, request)
	err = toStatus(err)
	d.log(ctx, info.FullMethod, request, begin, err)
	return response, err
}

// stream is unary for a stream.
func (d *Driver) stream(server any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handle grpc.StreamHandler) error {
	begin := time.Now()
	seen := &seeing{ServerStream: stream}
	err := toStatus(handle(server, seen))
	d.log(stream.Context(), info.FullMethod, seen.request, begin, err)
	return err
}

// seeing remembers the request of a stream.
type seeing struct {
	grpc.ServerStream
	request any
}

func (s *seeing) RecvMsg(m any) error {
	s.request = m
	return s.ServerStream.RecvMsg(m)
}

// log writes one line for a call, with the names of what it is about, and none of its secrets.
func (d *Driver) log(ctx context.Context, method string, request any, begin time.Time, err error) {
	attributes := append([]slog.Attr{slog.String("method", method), slog.Duration("took", time.Since(begin))}, subject(request)...)
	level := slog.LevelInfo
	switch status.Code(err) {
	case codes.OK:
		if quiet[method] {
			level = slog.LevelDebug
		}
	case codes.Internal, codes.DataLoss:
		level = slog.LevelError
	default:
		level = slog.LevelWarn
	}
	if err != nil {
		attributes = append(attributes, slog.String("code", status.Code(err).String()), slog.String("error", status.Convert(err).Message()))
	}
	d.Log.LogAttrs(ctx, level, "csi", attributes...)
}

// quiet are the methods that are called all the time.
var quiet = map[string]bool{
	csipb.Identity_Probe_FullMethodName:                                 true,
	csipb.Identity_GetPluginInfo_FullMethodName:                         true,
	csipb.Identity_GetPluginCapabilities_FullMethodName:                 true,
	csipb.Controller_ControllerGetCapabilities_FullMethodName:           true,
	csipb.GroupController_GroupControllerGetCapabilities_FullMethodName: true,
	csipb.Node_NodeGetCapabilities_FullMethodName:                       true,
	csipb.Node_NodeGetVolumeStats_FullMethodName:                        true,
}

// subject says what a request is about.
func subject(request any) (all []slog.Attr) {
	say := func(key, value string) {
		if value != "" {
			all = append(all, slog.String(key, value))
		}
	}
	if r, ok := request.(interface{ GetName() string }); ok {
		say("name", r.GetName())
	}
	if r, ok := request.(interface{ GetVolumeId() string }); ok {
		say("volume", r.GetVolumeId())
	}
	if r, ok := request.(interface{ GetSourceVolumeId() string }); ok {
		say("volume", r.GetSourceVolumeId())
	}
	if r, ok := request.(interface{ GetSnapshotId() string }); ok {
		say("snapshot", r.GetSnapshotId())
	}
	if r, ok := request.(interface{ GetGroupSnapshotId() string }); ok {
		say("group", r.GetGroupSnapshotId())
	}
	if r, ok := request.(interface{ GetBaseSnapshotId() string }); ok {
		say("base", r.GetBaseSnapshotId())
	}
	if r, ok := request.(interface{ GetTargetSnapshotId() string }); ok {
		say("snapshot", r.GetTargetSnapshotId())
	}
	if r, ok := request.(interface{ GetParameters() map[string]string }); ok {
		say("snapshot_name", r.GetParameters()[class.NameKey])
		say("namespace", r.GetParameters()[class.NamespaceKey])
	}
	return all
}

// turns lets calls on one volume follow each other. Work that was begun in a turn goes on when its caller leaves.
type turns struct {
	mu      sync.Mutex
	taken   map[string]chan struct{} // by what; full while somebody is at it
	waiting map[string]int
	working sync.WaitGroup
	over    context.Context // of all work
	quit    context.CancelFunc
}

func newTurns() *turns {
	over, quit := context.WithCancel(context.Background())
	return &turns{taken: map[string]chan struct{}{}, waiting: map[string]int{}, over: over, quit: quit}
}

// workLimit bounds work whose caller has left: making a filesystem on a large volume takes a while.
const workLimit = 10 * time.Minute

// take does the work when nobody else is at the same thing, and returns its error. Aborted if the context ends first: the
// work, once begun, goes on.
func (t *turns) take(ctx context.Context, what string, work func(ctx context.Context) error) error {
	turn := t.queue(what)
	select {
	case turn <- struct{}{}:
	case <-ctx.Done():
		t.leave(what)
		return status.Errorf(codes.Aborted, "another call on %s is not over yet; try again", what)
	}
	done := make(chan error, 1)
	t.working.Go(func() {
		detached, cancel := context.WithTimeout(context.WithoutCancel(ctx), workLimit)
		defer cancel()
		defer context.AfterFunc(t.over, cancel)()
		err := work(detached)
		<-turn
		t.leave(what)
		done <- err
	})
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return status.Errorf(codes.Aborted, "the call on %s was given up by its caller and is being finished; try again", what)
	}
}

// queue is the turn of a thing, and leave gives it up.
func (t *turns) queue(what string) chan struct{} {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.taken[what] == nil {
		t.taken[what] = make(chan struct{}, 1)
	}
	t.waiting[what]++
	return t.taken[what]
}

func (t *turns) leave(what string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.waiting[what]--; t.waiting[what] == 0 {
		delete(t.waiting, what)
		delete(t.taken, what)
	}
}
