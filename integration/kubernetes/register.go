package kubernetes

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"

	"google.golang.org/grpc"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"
)

// Register makes a CSI driver on the node known to its kubelet, as the sidecar csi-node-driver-registrar does elsewhere (its
// module is not to be had from the module proxy), and waits until it is known. The driver's process, if one is given, must
// not end meanwhile.
func (n *Node) Register(ctx context.Context, driver, socket string, process ...*Process) error {
	folder := filepath.Join(n.Root, "plugins_registry")
	if err := os.MkdirAll(folder, 0o755); err != nil {
		return err
	}
	path := filepath.Join(folder, driver+"-reg.sock")
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return err
	}
	r := &registrar{driver: driver, socket: socket, server: grpc.NewServer(), ended: make(chan error, 1)}
	registration.RegisterRegistrationServer(r.server, r)
	go func() { r.ended <- r.server.Serve(l) }()
	n.cluster.mu.Lock()
	n.cluster.closers = append(n.cluster.closers, r)
	n.cluster.mu.Unlock()
	return Await(ctx, "waiting for the kubelet to know "+driver, func(ctx context.Context) error {
		known, err := n.cluster.Admin.Core.StorageV1().CSINodes().Get(ctx, n.Name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		for _, d := range known.Spec.Drivers {
			if d.Name == driver {
				return nil
			}
		}
		return errors.New("not registered")
	}, append(process, n.Kubelet)...)
}

// registrar answers the kubelet's questions about a driver.
type registrar struct {
	registration.UnimplementedRegistrationServer
	driver, socket string
	server         *grpc.Server
	ended          chan error
}

// Close ends it: the kubelet forgets the driver.
func (r *registrar) Close() error {
	r.server.Stop()
	return <-r.ended
}

func (r *registrar) GetInfo(context.Context, *registration.InfoRequest) (*registration.PluginInfo, error) {
	return &registration.PluginInfo{Type: registration.CSIPlugin, Name: r.driver, Endpoint: r.socket, SupportedVersions: []string{"1.0.0"}}, nil
}

func (r *registrar) NotifyRegistrationStatus(_ context.Context, s *registration.RegistrationStatus) (*registration.RegistrationStatusResponse, error) {
	if !s.PluginRegistered {
		fmt.Fprintf(os.Stderr, "the kubelet does not take %s: %s\n", r.driver, s.Error)
	}
	return &registration.RegistrationStatusResponse{}, nil
}
