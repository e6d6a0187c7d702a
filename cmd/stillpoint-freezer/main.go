// Command stillpoint-freezer is the program that alone freezes and thaws filesystems for Stillpoint. It is small on
// purpose: all of it is locked in memory. What it promises is in the documentation of package agent/freezer.
//
//	stillpoint-freezer serve --socket PATH [--records DIR] [--refuse PATH]...
//	stillpoint-freezer sweep [--records DIR] [--wait DURATION]
//	stillpoint-freezer sync MOUNTPOINT
//	stillpoint-freezer version
//
// Exit codes: 0 success; 1 failure, with the reason on standard error; 2 a wrong command line; sweep: 3 when
// something could not be thawed yet.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"runtime/debug"
	"time"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/agent/freezer"
)

const usage = `usage:
  stillpoint-freezer serve --socket PATH [--records DIR] [--refuse PATH]...
  stillpoint-freezer sweep [--records DIR] [--wait DURATION]
  stillpoint-freezer sync MOUNTPOINT
  stillpoint-freezer version
`

func main() {
	if len(os.Args) < 2 {
		fmt.Fprint(os.Stderr, usage)
		os.Exit(2)
	}
	switch args := os.Args[2:]; os.Args[1] {
	case "serve":
		serve(args)
	case "guard": // serve starts it; of no use to anybody else
		if err := freezer.Guard(); err != nil {
			os.Exit(1)
		}
	case "sweep":
		sweep(args)
	case "sync":
		flush(args)
	case "version":
		fmt.Println("stillpoint-freezer", version())
	case "help", "-h", "--help":
		fmt.Print(usage)
	default:
		fmt.Fprintf(os.Stderr, "stillpoint-freezer: unknown command %q\n%s", os.Args[1], usage)
		os.Exit(2)
	}
}

func serve(args []string) {
	o := freezer.Options{Version: version(), Log: complain}
	f := flags("serve")
	f.StringVar(&o.Socket, "socket", "", "listen on the unix socket `PATH`, in a folder of its own (0700)")
	f.IntVar(&o.Inherited, "fd", 0, "serve one connection, already open as descriptor `N`, and end with it")
	f.StringVar(&o.Records, "records", freezer.DefaultRecords, "keep the records of running freezes in `DIR`, on a tmpfs")
	f.Func("refuse", "never freeze the filesystem that holds `PATH` (may be given again)", func(s string) error {
		o.Refuse = append(o.Refuse, s)
		return nil
	})
	parse(f, args)
	if (o.Socket == "") == (o.Inherited == 0) {
		fail(2, errors.New("serve: give --socket PATH"))
	}
	if err := freezer.Isolate(); err != nil {
		fail(1, err)
	}
	// A write to a closed pipe is an error like others, and a terminal that goes away is nothing to us.
	signal.Ignore(unix.SIGPIPE, unix.SIGHUP)
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM, unix.SIGINT)
	defer stop()
	if err := freezer.Serve(ctx, o); err != nil {
		fail(1, err)
	}
}

func sweep(args []string) {
	f := flags("sweep")
	records := f.String("records", freezer.DefaultRecords, "look for the records of dead freezers in `DIR`")
	wait := f.Duration("wait", 10*time.Second, "go on for so long when a killed freezer is still inside the kernel")
	parse(f, args)
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM, unix.SIGINT)
	defer stop()
	for end := time.Now().Add(*wait); ; {
		swept, err := freezer.Sweep(ctx, *records)
		if err != nil {
			fail(1, err)
		}
		pending := false
		for _, s := range swept {
			if pending = pending || s.Pending; !s.Pending {
				fmt.Println(s)
			}
		}
		if !pending {
			return
		}
		if time.Now().After(end) {
			for _, s := range swept {
				if s.Pending {
					complain("%s", s)
				}
			}
			os.Exit(3)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// flush writes the dirty pages of one filesystem out, never of all (sync(2) would wait for every mount of the machine).
// It can hang in the kernel beyond the reach of any signal: whoever runs it must be ready to leave it behind.
func flush(args []string) {
	if len(args) != 1 {
		fail(2, errors.New("sync: give one mount point"))
	}
	fd, err := unix.Open(args[0], unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		fail(1, fmt.Errorf("sync %s: %w", args[0], err))
	}
	if err := unix.Syncfs(fd); err != nil {
		fail(1, fmt.Errorf("sync %s: %w", args[0], err))
	}
}

func flags(name string) *flag.FlagSet {
	return flag.NewFlagSet("stillpoint-freezer "+name, flag.ExitOnError)
}

func parse(f *flag.FlagSet, args []string) {
	_ = f.Parse(args) // exits by itself
	if f.NArg() > 0 {
		fail(2, fmt.Errorf("%s: what is %q for?", f.Name(), f.Arg(0)))
	}
}

func version() string {
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "(devel)"
}

func complain(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "stillpoint-freezer: "+format+"\n", args...)
}

func fail(code int, err error) {
	complain("%v", err)
	os.Exit(code)
}
