package kubernetes

import (
	"context"
	"crypto/x509/pkix"
	"fmt"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// retry is how long the snapshot controller and its sidecar wait before they try again the first time, a second elsewhere.
const retry = "200ms"

// Driver is a CSI driver that is to have the standard sidecars beside it.
type Driver struct {
	Name        string  // as GetPluginInfo says it
	Socket      string  // an absolute path of its Unix socket; it must exist
	Provisioner bool    // csi-provisioner as well: the driver makes volumes
	Metadata    bool    // csi-snapshot-metadata as well: the driver has changed blocks
	As          *Client // who they are at the API server; Admin if nil
}

// Sidecars are those of a driver: csi-snapshotter, and the others if wanted. They end when the driver's socket closes, and
// are started again then, as in a pod. The CSI sockets are paths, which are not a matter of network namespaces: a driver
// may be a server in the test itself.
type Sidecars struct {
	Snapshotter, Provisioner, Metadata *Process
	MetadataAddress                    string // inside the cluster's network, with TLS by the cluster's authority

	cluster *Cluster
}

// AddSidecars starts the sidecars of a driver.
func (c *Cluster) AddSidecars(ctx context.Context, d Driver) (*Sidecars, error) {
	if d.As == nil {
		d.As = c.Admin
	}
	kubeconfig, err := c.Kubeconfig(d.As)
	if err != nil {
		return nil, err
	}
	s := &Sidecars{cluster: c}
	add := func(program string, args ...string) (*Process, error) {
		return c.start(c.place, program+"-"+d.Name, true, nil, append([]string{c.Program(program)}, args...)...)
	}
	// Without the metadata a driver cannot know whose volume it is to snapshot.
	if s.Snapshotter, err = add("csi-snapshotter", "--kubeconfig="+kubeconfig, "--csi-address="+d.Socket, "--extra-create-metadata",
		"--feature-gates=CSIVolumeGroupSnapshot=true", "--retry-interval-start="+retry, "--v=5"); err != nil {
		return nil, err
	}
	if d.Provisioner {
		if s.Provisioner, err = add("csi-provisioner", "--kubeconfig="+kubeconfig, "--csi-address="+d.Socket, "--extra-create-metadata",
			"--retry-interval-start="+retry, "--v=4"); err != nil {
			return nil, err
		}
	}
	if d.Metadata {
		c.mu.Lock()
		port := 50051 + 2*c.sidecars
		c.sidecars++
		c.mu.Unlock()
		s.MetadataAddress = fmt.Sprintf("127.0.0.1:%d", port)
		certificate := "metadata-" + d.Name
		if err := c.authority.issue(certificate, pkix.Name{CommonName: certificate}, "127.0.0.1"); err != nil {
			return nil, err
		}
		if err := c.publishMetadata(ctx, d.Name, s.MetadataAddress); err != nil {
			return nil, err
		}
		if s.Metadata, err = add("csi-snapshot-metadata", "-kubeconfig="+kubeconfig, "-csi-address="+d.Socket, fmt.Sprintf("-port=%d", port),
			"-tls-cert="+c.authority.path(certificate+".crt"), "-tls-key="+c.authority.path(certificate+".key"),
			fmt.Sprintf("-http-endpoint=127.0.0.1:%d", port+1), "-v=4"); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// Ready waits until the sidecar for changed blocks serves, if there is one. The others take up what there is to do.
func (s *Sidecars) Ready(ctx context.Context) error {
	if s.Metadata == nil {
		return nil
	}
	return Await(ctx, "waiting for csi-snapshot-metadata", func(ctx context.Context) error {
		conn, err := s.cluster.Dial(ctx, "tcp", s.MetadataAddress)
		if err == nil {
			err = conn.Close()
		}
		return err
	}, s.Metadata)
}

// Processes are the sidecars that run.
func (s *Sidecars) Processes() []*Process {
	var all []*Process
	for _, p := range []*Process{s.Snapshotter, s.Provisioner, s.Metadata} {
		if p != nil {
			all = append(all, p)
		}
	}
	return all
}

var metadataServices = schema.GroupVersionResource{Group: "cbt.storage.k8s.io", Version: "v1beta1", Resource: "snapshotmetadataservices"}

// publishMetadata says to clients where a driver's changed blocks are. The audience of their tokens is the driver's name.
func (c *Cluster) publishMetadata(ctx context.Context, driver, address string) error {
	o := &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": metadataServices.GroupVersion().String(), "kind": "SnapshotMetadataService", "metadata": map[string]any{"name": driver},
		"spec": map[string]any{"address": address, "audience": driver, "caCert": c.authority.pem},
	}}
	_, err := c.Admin.Dynamic.Resource(metadataServices).Create(ctx, o, metav1.CreateOptions{})
	return err
}
