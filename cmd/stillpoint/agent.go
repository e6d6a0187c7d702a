package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/klog/v2"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/adapters/registry"
	"stillpoint.io/stillpoint/agent/csi"
	"stillpoint.io/stillpoint/agent/cut"
	"stillpoint.io/stillpoint/agent/freezer"
	"stillpoint.io/stillpoint/agent/kube"
	"stillpoint.io/stillpoint/fault"
)

// agentFlags are what the agent is told beside the configuration.
type agentFlags struct {
	endpoint, driver, node string
	kubernetes             string // a kubeconfig's path, or in-cluster
	freezer                string // socket of a freezer that runs already
	probes                 string // address
	grace                  time.Duration
	metadataBlock          string
	logs                   string
}

func (a *app) agentCommand() *cobra.Command {
	var f agentFlags
	c := &cobra.Command{
		Use:   "agent --endpoint unix:///PATH",
		Short: "Serve CSI on a node: snapshots, groups, changed blocks and volumes",
		Long: `Serve the Container Storage Interface on a unix socket, for the configured backends: snapshots and group snapshots are cuts,
changed blocks are served as SnapshotMetadata, and volumes are made, staged and published for the backends that have a place
for them (reflink with its parameter volumes, lvm-thin).

Logs go to stderr. SIGTERM ends it when the calls under way have ended, or are cancelled after --grace; a second one at once.
A filesystem is never left frozen: the freezer is a process of its own.`,
		Args: arguments(0, 0, "no arguments"),
		RunE: func(c *cobra.Command, _ []string) error { return a.serve(c.Context(), f) },
	}
	c.Flags().StringVar(&f.endpoint, "endpoint", "", "the unix `socket` to serve CSI on, in a folder that only root may enter")
	c.Flags().StringVar(&f.driver, "driver-name", csi.DriverName, "the name of the CSI driver")
	c.Flags().StringVar(&f.node, "node", "", "the `name` of this node as Kubernetes has it; default the host's")
	c.Flags().StringVar(&f.kubernetes, "kubernetes", "", "the `kubeconfig` of the cluster whose volumes are to be snapshotted, or in-cluster in a pod; default: only volumes of this driver, outside Kubernetes")
	c.Flags().StringVar(&f.freezer, "freezer", "", "the `socket` of a running freezer; without it, one is started for each cut")
	c.Flags().StringVar(&f.probes, "probes", "", "the `address` to serve /healthz and /readyz on, such as 127.0.0.1:9808; default none")
	c.Flags().DurationVar(&f.grace, "grace", 20*time.Second, "how long calls may go on after SIGTERM")
	c.Flags().StringVar(&f.metadataBlock, "metadata-block", "0", "tell changed blocks in blocks of this `size`, a power of two of at least 4KiB, such as 1MiB; 0: as extents of any length")
	c.Flags().StringVar(&f.logs, "log", "text", "the `form` of logs: text or json")
	return c
}

// serve runs the agent until the context is over.
func (a *app) serve(ctx context.Context, f agentFlags) error {
	log, err := f.logger(a)
	if err != nil {
		return err
	}
	block, err := adapters.ParseBytes(f.metadataBlock)
	if err != nil {
		return fault.Errorf(fault.Invalid, "--metadata-block: %w", err)
	}
	if f.node == "" {
		if f.node, err = os.Hostname(); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(runFolder(), 0o700); err != nil {
		return fault.Errorf(fault.Invalid, "the folder for run-time state: %w; the agent needs root", err)
	}
	backends, err := a.backends(ctx)
	if err != nil {
		return err
	}
	machine := f.machine()
	config := csi.Config{
		Name: f.driver, Version: version, Node: f.node, Backends: backends, Cut: machine, MetadataBlock: block, Log: log,
		Ready: func(ctx context.Context) error { return ready(ctx, machine) },
	}
	if f.kubernetes != "" {
		api, err := f.cluster()
		if err != nil {
			return err
		}
		events := api.NewRecorder("stillpoint-agent", f.node)
		defer events.Close()
		config.Lookup, config.Tell = csi.Kubernetes{API: api, Backends: backends}, events.Tell
	}
	d, err := csi.New(config)
	if err != nil {
		return fault.Errorf(fault.Invalid, "%w", err)
	}
	listener, err := listen(f.endpoint)
	if err != nil {
		return err
	}
	var probes net.Listener
	if f.probes != "" {
		if probes, err = net.Listen("tcp", f.probes); err != nil {
			return errors.Join(fault.Errorf(fault.Invalid, "--probes: %w", err), listener.Close())
		}
	}
	log.Info("serving", "endpoint", f.endpoint, "driver", f.driver, "node", f.node, "version", version, "backends", list(a.config.Backends))
	g, over := errgroup.WithContext(ctx)
	g.Go(func() error { return d.Serve(listener) })
	if probes != nil {
		g.Go(func() error {
			return serveProbes(over, probes, func(ctx context.Context) error { return ready(ctx, machine) })
		})
	}
	g.Go(func() error {
		<-over.Done()
		log.Info("stopping", "grace", f.grace)
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), f.grace)
		defer cancel()
		d.Stop(grace)
		return nil
	})
	err = g.Wait()
	log.Info("stopped")
	return err
}

// cluster is the API of the cluster that the flags name.
func (f agentFlags) cluster() (*kube.API, error) {
	read := rest.InClusterConfig
	if f.kubernetes != inCluster {
		read = func() (*rest.Config, error) { return clientcmd.BuildConfigFromFlags("", f.kubernetes) }
	}
	config, err := read()
	if err != nil {
		return nil, fault.Errorf(fault.Invalid, "--kubernetes %s: %w", f.kubernetes, err)
	}
	config.UserAgent = "stillpoint-agent/" + version
	return kube.New(config)
}

// inCluster stands for the service account of the pod that the agent is in.
const inCluster = "in-cluster"

// logger writes where the flags say, for our own code and for that of Kubernetes.
func (f agentFlags) logger(a *app) (*slog.Logger, error) {
	var handler slog.Handler
	switch f.logs {
	case "text":
		handler = slog.NewTextHandler(a.stderr, nil)
	case "json":
		handler = slog.NewJSONHandler(a.stderr, nil)
	default:
		return nil, fault.Errorf(fault.Invalid, "--log %q is neither text nor json", f.logs)
	}
	log := slog.New(handler)
	klog.SetSlogLogger(log)
	return log, nil
}

// backends opens all that are configured.
func (a *app) backends(ctx context.Context) (csi.Backends, error) {
	all := csi.Backends{}
	for name, b := range a.config.Backends {
		opened, err := a.backend(ctx, name)
		if err != nil {
			return nil, err
		}
		kind, err := registry.Find(b.Adapter)
		if err != nil {
			return nil, err
		}
		all[name] = csi.Backend{Kind: kind, Adapter: opened}
	}
	return all, nil
}

// machine is this node, with the freezer that is there or one for each cut.
func (f agentFlags) machine() cut.Node {
	n := node()
	if f.freezer != "" {
		n.Freezer = func(ctx context.Context) (*freezer.Client, error) { return freezer.Connect(ctx, f.freezer) }
	}
	return n
}

// ready asks the freezer about itself: without it, no cut can be made.
func ready(ctx context.Context, n cut.Node) error {
	client, err := n.Freezer(ctx)
	if err != nil {
		return err
	}
	_, err = client.Status(ctx)
	return errors.Join(err, client.Close())
}

// listen makes the socket, in place of one that a dead process left.
func listen(endpoint string) (net.Listener, error) {
	path, ok := strings.CutPrefix(endpoint, "unix://")
	if !ok && !strings.Contains(endpoint, ":") {
		path = endpoint
	}
	if !filepath.IsAbs(path) {
		return nil, fault.Errorf(fault.Invalid, "--endpoint %q: give the absolute path of a unix socket, such as unix:///run/stillpoint/csi.sock", endpoint)
	}
	if conn, err := net.Dial("unix", path); err == nil {
		conn.Close()
		return nil, fault.Errorf(fault.Busy, "somebody serves %s already", path)
	} else if errors.Is(err, unix.ECONNREFUSED) {
		os.Remove(path)
	}
	old := unix.Umask(0o077) // nobody but root may ever connect
	l, err := net.Listen("unix", path)
	unix.Umask(old)
	if err != nil {
		return nil, fault.Errorf(fault.Invalid, "--endpoint: %w", err)
	}
	return l, nil
}

// serveProbes serves the probes until the context is over: /healthz says that the process answers, /readyz that it can work.
func serveProbes(ctx context.Context, l net.Listener, ready func(context.Context) error) error {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		within, cancel := context.WithTimeout(r.Context(), 10*time.Second)
		defer cancel()
		if err := ready(within); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	server := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	context.AfterFunc(ctx, func() { server.Close() })
	if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}
