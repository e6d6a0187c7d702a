package kubernetes

import (
	"context"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"
)

// Node is a machine of the cluster: a kubelet, with mounts of its own and an address of its own in the cluster's network.
type Node struct {
	Name    string
	Address string // an IP; the kubelet listens at its port 10250
	Root    string // the kubelet's folder, /var/lib/kubelet elsewhere: the same path inside, but what is mounted there is seen inside only
	Kubelet *Process

	cluster *Cluster
	place   *place
}

// newNode starts one.
func (c *Cluster) newNode(i int) (*Node, error) {
	name := "node-" + string(rune('a'+i))
	dir := filepath.Join(c.dir, name)
	n := &Node{Name: name, Address: fmt.Sprintf("10.0.1.%d", i+1), Root: filepath.Join(dir, "kubelet"), cluster: c}
	over := filepath.Join(dir, "var-lib") // what the node writes below /var/lib
	for _, folder := range []string{dir, n.Root, over, filepath.Join(over, "upper"), filepath.Join(over, "work")} {
		if err := os.Mkdir(folder, 0o755); err != nil {
			return nil, err
		}
	}
	if err := c.place.enter(func() error { return loopbackAddress(i+1, net.ParseIP(n.Address)) }); err != nil {
		return nil, err
	}
	var err error
	n.place, err = c.place.newMounts(func() error {
		if err := forgetVolumes(dir, c.programs); err != nil {
			return err
		}
		// The kubelet makes links to the logs of containers in /var/log, and a socket in /var/lib/kubelet for plugins of
		// devices, wherever its own folder is.
		return errors.Join(unix.Mount("tmpfs", "/var/log", "tmpfs", 0, "size=16m"),
			unix.Mount("overlay", "/var/lib", "overlay", 0, fmt.Sprintf("lowerdir=/var/lib,upperdir=%s/upper,workdir=%[1]s/work", over)))
	})
	if err != nil {
		return nil, err
	}
	return n, n.up(dir)
}

// forgetVolumes unmounts, in the node's mounts, what this machine has mounted of loop and device-mapper devices, but for
// what the paths to keep are on: other tests' volumes. They could not be taken down as long as a copy of the mount is here.
func forgetVolumes(keep ...string) error {
	table, err := os.Open("/proc/thread-self/mountinfo")
	if err != nil {
		return err
	}
	defer table.Close()
	mounts, err := mountinfo.GetMountsFromReader(table, nil)
	if err != nil {
		return err
	}
	for _, m := range slices.Backward(mounts) { // what is mounted on another is behind it
		needed := slices.ContainsFunc(keep, func(path string) bool { return strings.HasPrefix(path, strings.TrimSuffix(m.Mountpoint, "/")+"/") })
		volume := slices.ContainsFunc([]string{"/dev/loop", "/dev/dm-", "/dev/mapper/"}, func(prefix string) bool { return strings.HasPrefix(m.Source, prefix) })
		if volume && !needed {
			if err := unix.Unmount(m.Mountpoint, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) { // gone with what it was on
				return fmt.Errorf("unmounting %s on a node: %w", m.Mountpoint, err)
			}
		}
	}
	return nil
}

// up starts the programs of a node.
func (n *Node) up(dir string) error {
	c, certificate := n.cluster, "node-"+n.Name
	if err := c.authority.issue(certificate, pkix.Name{CommonName: "system:node:" + n.Name, Organization: []string{"system:nodes"}}, n.Address, n.Name); err != nil {
		return err
	}
	user, err := c.newClient(identity{certificate: certificate})
	if err != nil {
		return err
	}
	kubeconfig, err := c.Kubeconfig(user)
	if err != nil {
		return err
	}
	socket := filepath.Join(dir, "cri.sock")
	config, err := yaml.Marshal(map[string]any{
		"apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
		"address": n.Address, "healthzPort": 0, "readOnlyPort": 0, "containerRuntimeEndpoint": "unix://" + socket,
		"tlsCertFile": c.authority.path(certificate + ".crt"), "tlsPrivateKeyFile": c.authority.path(certificate + ".key"),
		"authentication": map[string]any{"anonymous": map[string]any{"enabled": false}, "webhook": map[string]any{"enabled": true},
			"x509": map[string]any{"clientCAFile": c.authority.path("ca.crt")}},
		"authorization": map[string]any{"mode": "Webhook"},
		// Nothing of this machine is the kubelet's: no cgroups, no packet filter, no folder outside its own.
		"failCgroupV1": false, "cgroupDriver": "cgroupfs", "cgroupsPerQOS": false, "enforceNodeAllocatable": []string{}, "failSwapOn": false,
		"localStorageCapacityIsolation": false, "makeIPTablesUtilChains": false,
		"volumePluginDir": filepath.Join(n.Root, "volumeplugins"), "podLogsDir": filepath.Join(dir, "pods"),
		// A full disk of the machine that tests run on evicts no pod.
		"evictionHard":  map[string]string{"memory.available": "1Ki", "nodefs.available": "0%", "nodefs.inodesFree": "0%", "imagefs.available": "0%", "imagefs.inodesFree": "0%"},
		"syncFrequency": "1s", "nodeStatusUpdateFrequency": "1s",
	})
	if err != nil {
		return err
	}
	path := filepath.Join(dir, "kubelet.yaml")
	if err := os.WriteFile(path, config, 0o600); err != nil {
		return err
	}
	if _, err := n.Start("fakecri", nil, c.Program("fakecri"), socket); err != nil {
		return err
	}
	n.Kubelet, err = c.start(n.place, n.Name+"-kubelet", true, nil, c.Program("kubelet"), "--config="+path, "--kubeconfig="+kubeconfig, "--root-dir="+n.Root,
		"--cert-dir="+filepath.Join(n.Root, "pki"), "--hostname-override="+n.Name, "--node-ip="+n.Address, "--v=3")
	return err
}

// Ready waits until the node says that it is ready for pods.
func (n *Node) Ready(ctx context.Context) error {
	return Await(ctx, "waiting for "+n.Name, func(ctx context.Context) error {
		node, err := n.cluster.Admin.Core.CoreV1().Nodes().Get(ctx, n.Name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		for _, condition := range node.Status.Conditions {
			if condition.Type == corev1.NodeReady && condition.Status == corev1.ConditionTrue {
				return nil
			}
		}
		return errors.New("it is not ready")
	}, n.Kubelet, n.cluster.Server)
}

// Start starts a program on the node: in the cluster's network, and where the kubelet's mounts are. It ends with the
// cluster, or before.
func (n *Node) Start(name string, env []string, command ...string) (*Process, error) {
	return n.cluster.start(n.place, n.Name+"-"+name, false, env, command...)
}

// Inside runs a function on a thread that is on the node, to look at or change what is mounted there. The function must do
// all of it on its own goroutine, and its files by absolute paths.
func (n *Node) Inside(f func() error) error { return n.place.enter(f) }
