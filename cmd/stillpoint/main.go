// Command stillpoint cuts, compares, backs up and restores volumes of many backends. The commands only parse, call
// and print; the work is in the packages below agent, adapters and cbt.
//
// Exit codes tell what kind of failure it was, as scripts need it:
//
//	0  success
//	1  an unforeseen failure
//	2  invalid: wrong usage, a malformed handle, a bad configuration
//	3  not found
//	4  busy: somebody else holds the volume, the filesystem or the name
//	5  unsupported: this volume, backend or kernel cannot do that
//	6  corrupt: data is not what it must be
//	7  exhausted: space, a quota or a limit
//	8  unavailable: out of reach for now, try again
//	9  the cut is void: it lost its freeze and was discarded, try again
//	130  interrupted
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"syscall"

	"github.com/spf13/cobra"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/repository"
	"stillpoint.io/stillpoint/fault"
)

func main() {
	tune()
	os.Exit(run(os.Args[1:], os.Stdout, os.Stderr))
}

// tune sets Go's runtime up for what this program does; whoever sets the variables knows better.
//
// Twice as many goroutines may run at once as there are processors: the scheduler notices late that one waits for a direct
// read, and leaves its processor idle until then. And the heap is large buffers without pointers, cheap to look through
// and dear to keep: garbage may be a quarter of what is in use, not as much again.
func tune() {
	if os.Getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(2 * runtime.GOMAXPROCS(0))
	}
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(25)
	}
}

// run is the whole program, with its exit code.
func run(args []string, stdout, stderr io.Writer) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // the second signal ends the program at once
	a := &app{stdout: stdout, stderr: stderr, open: map[string]adapters.Adapter{}, canaries: map[string]string{}}
	root := a.rootCommand()
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	err = errors.Join(err, a.close())
	if err == nil {
		return 0
	}
	fmt.Fprintf(stderr, "stillpoint: %v\n", err)
	if ctx.Err() != nil {
		return 130
	}
	return exitCode(err)
}

func exitCode(err error) int {
	switch fault.KindOf(err) {
	case fault.Invalid:
		return 2
	case fault.NotFound:
		return 3
	case fault.Busy:
		return 4
	case fault.Unsupported:
		return 5
	case fault.Corrupt:
		return 6
	case fault.Exhausted:
		return 7
	case fault.Unavailable:
		return 8
	case fault.Void:
		return 9
	default:
		return 1
	}
}

// app is what the commands share: the configuration and the backends opened so far.
type app struct {
	stdout, stderr io.Writer
	configPath     string
	config         config
	opening        sync.Mutex // of open: volumes may be worked on in parallel
	open           map[string]adapters.Adapter
	json           bool
	canariesMu     sync.Mutex
	canaries       map[string]string // by backend that was tried: why its changed blocks are not to be used, or nothing
}

func (a *app) rootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   "stillpoint",
		Short: "Consistent cuts, changed blocks and incremental backups of volumes on any backend",
		Long: `Stillpoint snapshots volumes of many backends at one instant, tells which blocks changed, and keeps
incremental backups in a kopia repository that restore anywhere.

A volume is written BACKEND:ID, for example reflink:/pool/disk.img; a snapshot BACKEND:ID@NAME; a backup
backup:REMOTE/ID. Without --config there is the backend "reflink" (files on XFS and btrfs), and the remote "default"
is the folder in $STILLPOINT_REMOTE, or the bucket $STILLPOINT_S3_BUCKET at $STILLPOINT_S3_ENDPOINT with the keys in
$AWS_ACCESS_KEY_ID and $AWS_SECRET_ACCESS_KEY; its passphrase is in the file $STILLPOINT_PASSPHRASE_FILE.

Exit codes: 0 success, 1 unforeseen, 2 invalid, 3 not found, 4 busy, 5 unsupported, 6 corrupt, 7 exhausted,
8 unavailable (try again), 9 the cut was void and discarded (try again), 130 interrupted.`,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          cobra.ArbitraryArgs,
		RunE:          subcommand,
		PersistentPreRunE: func(*cobra.Command, []string) (err error) {
			a.config, err = loadConfig(a.configPath)
			return err
		},
	}
	root.PersistentFlags().StringVar(&a.configPath, "config", "", "YAML `file` with backends: and remotes:")
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		return fault.Errorf(fault.Invalid, "%w; see `%s --help`", err, c.CommandPath())
	})
	root.AddCommand(
		a.cutCommand(), a.snapshotsCommand(), a.deleteCommand(), a.diffCommand(),
		a.backupCommand(), a.backupsCommand(), a.lsCommand(), a.restoreCommand(), a.verifyCommand(), a.repairCommand(), a.forgetCommand(),
		a.scrubCommand(), a.canaryCommand(), a.spaceCommand(),
		a.remoteCommand(), a.adaptersCommand(), a.inspectCommand(), a.agentCommand(), freezerCommand(), a.versionCommand(),
	)
	return root
}

// subcommand is what a command does that has none of its own: help, or the name that was meant.
func subcommand(c *cobra.Command, args []string) error {
	if len(args) == 0 {
		return c.Help()
	}
	hint := "see `" + c.CommandPath() + " --help`"
	if near := c.SuggestionsFor(args[0]); len(near) > 0 {
		hint = "did you mean " + strings.Join(near, " or ") + "?"
	}
	return fault.Errorf(fault.Invalid, "unknown command %q for %q; %s", args[0], c.CommandPath(), hint)
}

// jsonFlag adds --json to a command.
func (a *app) jsonFlag(c *cobra.Command) *cobra.Command {
	c.Flags().BoolVar(&a.json, "json", false, "print JSON, one object a line")
	return c
}

// arguments checks the number of arguments and says in words what is missing.
func arguments(least, most int, what string) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error {
		if len(args) < least || most >= 0 && len(args) > most {
			return fault.Errorf(fault.Invalid, "%s wants %s; see `%s --help`", c.CommandPath(), what, c.CommandPath())
		}
		return nil
	}
}

// backend gives an opened backend, once per run.
func (a *app) backend(ctx context.Context, name string) (adapters.Adapter, error) {
	a.opening.Lock()
	defer a.opening.Unlock()
	if b, ok := a.open[name]; ok {
		return b, nil
	}
	b, err := a.config.openBackend(ctx, name)
	if err != nil {
		return nil, err
	}
	a.open[name] = b
	return b, nil
}

func (a *app) close() error {
	var errs []error
	for _, b := range a.open {
		errs = append(errs, b.Close())
	}
	return errors.Join(errs...)
}

// volume parses a volume's handle and opens its backend.
func (a *app) volume(ctx context.Context, s string) (adapters.Adapter, adapters.VolumeID, error) {
	h, err := adapters.ParseHandle(s)
	if err != nil {
		return nil, adapters.VolumeID{}, err
	}
	if h.IsSnapshot() {
		return nil, adapters.VolumeID{}, fault.Errorf(fault.Invalid, "%s is a snapshot, a volume is wanted (an @ inside a volume's id is written %%40)", s)
	}
	b, err := a.backend(ctx, h.Volume.Backend)
	return b, h.Volume, err
}

// snapshot parses a snapshot's handle, opens its backend and makes the handle canonical.
func (a *app) snapshot(ctx context.Context, s string) (adapters.Adapter, adapters.SnapshotID, error) {
	h, err := adapters.ParseHandle(s)
	if err != nil {
		return nil, adapters.SnapshotID{}, err
	}
	if !h.IsSnapshot() {
		return nil, adapters.SnapshotID{}, fault.Errorf(fault.Invalid, "%s is a volume, a snapshot is wanted: %s@NAME; `stillpoint snapshots %s` lists them", s, s, s)
	}
	b, err := a.backend(ctx, h.Volume.Backend)
	if err != nil {
		return nil, adapters.SnapshotID{}, err
	}
	id, err := adapters.Resolve(ctx, b, h)
	return b, id, err
}

// repository opens a remote's repository.
func (a *app) repository(ctx context.Context, remote string) (*repository.Repository, error) {
	return a.openRepository(ctx, remote, repository.OpenOptions{})
}

func (a *app) openRepository(ctx context.Context, remote string, o repository.OpenOptions) (*repository.Repository, error) {
	location, passphrase, err := a.config.remote(remote)
	if err != nil {
		return nil, err
	}
	o.Remote, o.Locks = remote, locks()
	r, err := repository.Open(ctx, location, passphrase, o)
	if err != nil {
		return nil, fmt.Errorf("remote %q: %w", remote, err)
	}
	return r, nil
}
