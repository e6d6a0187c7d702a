package kubernetes

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/wrapperspb"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Foreign is a CSI driver of somebody else's on a node, for pods to have volumes that are none of ours: it publishes every
// handle as an ext4 of 64 MiB in a file of its own, on a loop device. It keeps them as OpenEBS rawfile-localpv does.
type Foreign struct {
	Process *Process
	Images  string // the folder of the files, which are named HANDLE/disk.img
}

const envForeign = "STILLPOINT_TEST_FOREIGN_DRIVER"

// Init is to be called first in TestMain: a driver on a node is the test program again, and runs in this call.
func Init() {
	arguments, is := os.LookupEnv(envForeign)
	if !is {
		return
	}
	name, rest, _ := strings.Cut(arguments, ":")
	node, dir, _ := strings.Cut(rest, ":")
	fmt.Fprintln(os.Stderr, serveForeign(name, node, dir))
	os.Exit(1)
}

// AddForeign starts a foreign driver on the node and waits until the kubelet knows it. The test program's TestMain must
// call [Init].
func (n *Node) AddForeign(ctx context.Context, driver string) (*Foreign, error) {
	no := false
	_, err := n.cluster.Admin.Core.StorageV1().CSIDrivers().Create(ctx, &storagev1.CSIDriver{ObjectMeta: metav1.ObjectMeta{Name: driver},
		Spec: storagev1.CSIDriverSpec{AttachRequired: &no}}, metav1.CreateOptions{})
	if err != nil && !apierrors.IsAlreadyExists(err) { // it may be on another node too
		return nil, err
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	f := &Foreign{Images: n.ForeignImages(driver)}
	dir := filepath.Join(n.Root, "plugins", driver)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	if f.Process, err = n.Start(driver, []string{envForeign + "=" + driver + ":" + n.Name + ":" + dir}, self); err != nil {
		return nil, err
	}
	return f, n.Register(ctx, driver, filepath.Join(dir, socketName), f.Process)
}

// ForeignImages is where a foreign driver will have its files. A filesystem may be mounted there before it starts.
func (n *Node) ForeignImages(driver string) string {
	return filepath.Join(n.Root, "plugins", driver, "volumes")
}

// socketName is the name of a foreign driver's socket in its folder.
const socketName = "csi.sock"

// MountPoint waits until a pod's volume is mounted on the node, and returns where the kubelet has it.
func (n *Node) MountPoint(ctx context.Context, pod *corev1.Pod, volume string) (string, error) {
	path := filepath.Join(n.Root, "pods", string(pod.UID), "volumes", "kubernetes.io~csi", volume, "mount")
	return path, Await(ctx, "waiting for "+path, func(context.Context) error {
		return n.Inside(func() error {
			mounts, err := os.ReadFile("/proc/thread-self/mountinfo")
			if err == nil && !strings.Contains(string(mounts), " "+path+" ") {
				err = errors.New("it is not mounted")
			}
			return err
		})
	}, n.Kubelet)
}

// foreign is the driver in its own process: what the kubelet asks of one.
type foreign struct {
	csi.UnimplementedIdentityServer
	csi.UnimplementedNodeServer
	name, node, dir string
}

func serveForeign(name, node, dir string) error {
	f := &foreign{name: name, node: node, dir: dir}
	if err := os.MkdirAll(filepath.Join(dir, "volumes"), 0o755); err != nil {
		return err
	}
	socket := filepath.Join(dir, socketName)
	if err := os.Remove(socket); err != nil && !errors.Is(err, os.ErrNotExist) { // of an earlier one that was killed
		return err
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	server := grpc.NewServer()
	csi.RegisterIdentityServer(server, f)
	csi.RegisterNodeServer(server, f)
	return server.Serve(l)
}

func (f *foreign) GetPluginInfo(context.Context, *csi.GetPluginInfoRequest) (*csi.GetPluginInfoResponse, error) {
	return &csi.GetPluginInfoResponse{Name: f.name, VendorVersion: "1"}, nil
}

func (f *foreign) Probe(context.Context, *csi.ProbeRequest) (*csi.ProbeResponse, error) {
	return &csi.ProbeResponse{Ready: wrapperspb.Bool(true)}, nil
}

func (f *foreign) GetPluginCapabilities(context.Context, *csi.GetPluginCapabilitiesRequest) (*csi.GetPluginCapabilitiesResponse, error) {
	return &csi.GetPluginCapabilitiesResponse{}, nil
}

func (f *foreign) NodeGetInfo(context.Context, *csi.NodeGetInfoRequest) (*csi.NodeGetInfoResponse, error) {
	return &csi.NodeGetInfoResponse{NodeId: f.node}, nil
}

func (f *foreign) NodeGetCapabilities(context.Context, *csi.NodeGetCapabilitiesRequest) (*csi.NodeGetCapabilitiesResponse, error) {
	return &csi.NodeGetCapabilitiesResponse{}, nil
}

func (f *foreign) NodePublishVolume(ctx context.Context, r *csi.NodePublishVolumeRequest) (*csi.NodePublishVolumeResponse, error) {
	image := filepath.Join(f.dir, "volumes", r.VolumeId, "disk.img")
	if _, err := os.Stat(image); errors.Is(err, os.ErrNotExist) {
		if err := errors.Join(os.MkdirAll(filepath.Dir(image), 0o755), run(ctx, "truncate", "-s", "64M", image), run(ctx, "mkfs.ext4", "-q", "-F", image)); err != nil {
			return nil, err
		}
	}
	if err := os.MkdirAll(r.TargetPath, 0o755); err != nil {
		return nil, err
	}
	return &csi.NodePublishVolumeResponse{}, run(ctx, "mount", "-o", "loop", image, r.TargetPath)
}

func (f *foreign) NodeUnpublishVolume(ctx context.Context, r *csi.NodeUnpublishVolumeRequest) (*csi.NodeUnpublishVolumeResponse, error) {
	if _, err := os.Stat(r.TargetPath); errors.Is(err, os.ErrNotExist) {
		return &csi.NodeUnpublishVolumeResponse{}, nil
	}
	if err := run(ctx, "umount", r.TargetPath); err != nil {
		return nil, err
	}
	return &csi.NodeUnpublishVolumeResponse{}, os.Remove(r.TargetPath)
}

func run(ctx context.Context, program string, args ...string) error {
	out, err := exec.CommandContext(ctx, program, args...).CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%s %s: %w: %s", program, strings.Join(args, " "), err, out)
		fmt.Fprintln(os.Stderr, err)
	}
	return err
}
