package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/cut"
	"stillpoint.io/stillpoint/agent/freezer"
	"stillpoint.io/stillpoint/agent/mounts"
	"stillpoint.io/stillpoint/fault"
)

// runDir holds the lock of the node's cuts and the freezer's records. envRun moves it, for tests and for hosts that
// keep it elsewhere; all stillpoints of a machine must agree on it.
const (
	runDir = "/run/stillpoint"
	envRun = "STILLPOINT_RUN"
)

// never are the places whose filesystems are never frozen: what we, the kubelet and the container runtimes need to
// move on. Those that do not exist harm nobody.
var never = []string{"/var/log", "/var/lib/kubelet", "/var/lib/containerd", "/var/lib/docker", "/var/lib/containers", "/run/containerd"}

// cutFlags are the flags of every command that cuts.
type cutFlags struct {
	all           bool
	maxFreeze     time.Duration
	allowCrash    bool
	allowSeparate bool
}

func (f *cutFlags) register(c *cobra.Command) {
	c.Flags().BoolVar(&f.all, "all", false, "every volume of the configured backends that is mounted on this node")
	c.Flags().DurationVar(&f.maxFreeze, "max-freeze", 10*time.Second, "the absolute deadline of the freeze, at most 60s")
	c.Flags().BoolVar(&f.allowCrash, "allow-crash-consistent", false, "accept volumes that cannot be frozen, and record it on their snapshots")
	c.Flags().BoolVar(&f.allowSeparate, "allow-separate-instants", false, "accept volumes that can only be snapshotted at an instant of their own, and record it on their snapshots")
}

func (a *app) cutCommand() *cobra.Command {
	var flags cutFlags
	var name string
	var dryRun bool
	c := &cobra.Command{
		Use:   "cut --name NAME (VOLUME... | --all)",
		Short: "Snapshot volumes at one instant, with their filesystems frozen",
		Long: `Snapshot volumes at one instant: freeze their filesystems, snapshot all of them, thaw, and prove that no freeze was
lost. Prints the snapshots' handles and how long each filesystem was frozen. Repeating a cut by name is safe: one that
was made is returned as it is, one that died half-way is removed and made anew.`,
		Args: arguments(0, -1, "volumes"),
		RunE: func(c *cobra.Command, args []string) error {
			volumes, err := a.volumes(c.Context(), args, flags.all)
			if err != nil {
				return err
			}
			if dryRun {
				plan, err := cut.DryRun(c.Context(), flags.request(name, volumes), node())
				if err != nil {
					return err
				}
				if a.json {
					return a.printJSON(plan)
				}
				fmt.Fprint(a.stdout, plan)
				return nil
			}
			res, err := a.cut(c.Context(), flags.request(name, volumes))
			if err != nil {
				return err
			}
			if a.json {
				return a.printJSON(res)
			}
			a.printCut(res)
			return nil
		},
	}
	flags.register(c)
	c.Flags().StringVar(&name, "name", "", "the cut's `name`, and that of its snapshots")
	c.Flags().BoolVar(&dryRun, "dry-run", false, "print the plan and change nothing")
	return a.jsonFlag(c)
}

func (f cutFlags) request(name string, volumes []cut.Volume) cut.Request {
	return cut.Request{Name: name, Volumes: volumes, MaxFreeze: f.maxFreeze, AllowCrashConsistent: f.allowCrash, AllowSeparateInstants: f.allowSeparate}
}

func (a *app) cut(ctx context.Context, r cut.Request) (cut.Result, error) {
	if err := os.MkdirAll(runFolder(), 0o700); err != nil {
		return cut.Result{}, fault.Errorf(fault.Invalid, "the folder for run-time state: %w; a cut needs root", err)
	}
	return cut.Make(ctx, r, node())
}

func (a *app) printCut(res cut.Result) {
	less := map[string]string{}
	for _, h := range res.Crash {
		less[h] = "  (crash-consistent)"
	}
	for _, h := range res.Separate {
		less[h] = "  (at an instant of its own)"
	}
	for _, h := range res.Snapshots {
		a.say("%s%s", h, less[h])
	}
	if res.Adopted {
		a.say("cut %s was made before", res.Name)
	}
	for _, f := range res.Frozen {
		if f.Itself {
			a.say("frozen by its backend, for less than %.1f ms: %s", f.Milliseconds, f.Filesystem)
			continue
		}
		a.say("frozen for %.1f ms: %s", f.Milliseconds, f.Filesystem)
	}
	for _, u := range res.Unverified {
		warn(a.stderr, "not verifiable: %s", u)
	}
}

// volumes opens the backends of the volumes named, or with all finds those that are mounted on this node.
func (a *app) volumes(ctx context.Context, args []string, all bool) ([]cut.Volume, error) {
	switch {
	case all && len(args) > 0:
		return nil, fault.Errorf(fault.Invalid, "name volumes or say --all, not both")
	case !all && len(args) == 0:
		return nil, fault.Errorf(fault.Invalid, "no volumes: name some (e.g. reflink:/pool/disk.img) or say --all")
	case all:
		return a.mounted(ctx)
	}
	var volumes []cut.Volume
	for _, s := range args {
		b, id, err := a.volume(ctx, s)
		if err != nil {
			return nil, err
		}
		volumes = append(volumes, cut.Volume{ID: id, Adapter: b})
	}
	return volumes, nil
}

// mounted finds every volume of the configured backends that carries a mounted filesystem on this node.
func (a *app) mounted(ctx context.Context) ([]cut.Volume, error) {
	table, err := mounts.Host{}.Read(ctx)
	if err != nil {
		return nil, err
	}
	var found []cut.Volume
	for name := range a.config.Backends {
		b, err := a.backend(ctx, name)
		if err != nil {
			return nil, err
		}
		lister, ok := adapters.As[adapters.Lister](b)
		if !ok {
			continue
		}
		for v, err := range lister.Volumes(ctx) {
			if err != nil {
				return nil, fmt.Errorf("backend %q: %w", name, err)
			}
			on, err := table.On(mounts.Device(v.Device))
			if err != nil {
				return nil, err
			}
			if len(on) > 0 {
				found = append(found, cut.Volume{ID: v.ID, Adapter: b})
			}
		}
	}
	if len(found) == 0 {
		return nil, fault.Errorf(fault.NotFound, "no volume of the backends %s is mounted on this node", list(a.config.Backends))
	}
	return found, nil
}

// node is this machine. A missing freezer is an error only of what needs it.
func node() cut.Node {
	program, missing := freezerBinary()
	refuse := append([]string{runFolder()}, never...)
	if exe, err := os.Executable(); err == nil {
		refuse = append(refuse, exe)
	}
	return cut.Node{
		Freezer: func(ctx context.Context) (*freezer.Client, error) {
			if missing != nil {
				return nil, missing
			}
			return freezer.Spawn(ctx, freezer.SpawnOptions{Program: program, Records: records(), Refuse: refuse})
		},
		SyncCommand: []string{program, "sync"},
		Lock:        filepath.Join(runFolder(), "cut.lock"),
		Refuse:      refuse,
	}
}

// records is where freezers write down what they freeze, for whoever sweeps up after them.
func records() string { return filepath.Join(runFolder(), "freezer") }

// locks is where backups of this host exclude each other.
func locks() string { return filepath.Join(runFolder(), "locks") }

func runFolder() string {
	if dir := os.Getenv(envRun); dir != "" {
		return dir
	}
	return runDir
}

// freezerBinary finds the freezer's program, beside this one or in PATH.
func freezerBinary() (string, error) {
	const name = "stillpoint-freezer"
	if exe, err := os.Executable(); err == nil {
		beside := filepath.Join(filepath.Dir(exe), name)
		if _, err := os.Stat(beside); err == nil {
			return beside, nil
		}
	}
	path, err := exec.LookPath(name)
	if err != nil {
		return "", fault.Errorf(fault.NotFound, "%s is neither beside this program nor in PATH: install it there", name)
	}
	return path, nil
}
