package main

import (
	"context"
	"fmt"
	"iter"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/agent/repository"
	"stillpoint.io/stillpoint/fault"
)

func (a *app) lsCommand() *cobra.Command {
	return a.jsonFlag(&cobra.Command{
		Use:   "ls BACKUP [PATH]",
		Short: "List a directory in the backup of a tree of files, or show one file",
		Args:  arguments(1, 2, "a backup, and at most one path in it"),
		RunE: func(c *cobra.Command, args []string) error {
			path := ""
			if len(args) == 2 {
				path = args[1]
			}
			return a.inRemotes(c.Context(), args[:1], repository.OpenOptions{}, func(r *repository.Repository, id string) error {
				return a.list(c.Context(), r, id, treePath(path))
			})
		},
	})
}

// treePath makes the path of a person one of a tree: without slashes around it.
func treePath(s string) string { return strings.Trim(s, "/") }

func (a *app) list(ctx context.Context, r *repository.Repository, id, path string) error {
	b, err := r.Backup(ctx, id)
	if err != nil {
		return err
	}
	if b.Form != adapters.TreeForm {
		return fault.Errorf(fault.Invalid, "%s is of a disk image: there are no files in it to be listed", b.Handle)
	}
	tree, err := r.OpenTree(ctx, b)
	if err != nil {
		return err
	}
	defer tree.Close()
	at, err := tree.Stat(ctx, path)
	if err != nil {
		return err
	}
	entries := tree.Entries(ctx, path)
	if at.Type != adapters.Directory {
		entries = func(yield func(adapters.Entry, error) bool) { yield(at, nil) }
	}
	if a.json {
		return a.listJSON(entries)
	}
	row, flush := a.table("MODE", "OWNER", "SIZE", "MODIFIED", "NAME")
	for e, err := range entries {
		if err != nil {
			return err
		}
		row(modeOf(e), fmt.Sprintf("%d:%d", e.UID, e.GID), e.Size, e.Modified.Local().Format(time.DateTime), shownName(e))
	}
	return flush()
}

// entryLine is an entry as `ls --json` prints it. Names and targets that are not UTF-8 are in the fields for bytes.
type entryLine struct {
	Name       string            `json:"name,omitempty"`
	NameBytes  []byte            `json:"name_bytes,omitempty"`
	Type       string            `json:"type"`
	Mode       string            `json:"mode"` // octal
	UID        uint32            `json:"uid"`
	GID        uint32            `json:"gid"`
	Size       int64             `json:"size"`
	Modified   time.Time         `json:"modified"`
	Target     string            `json:"target,omitempty"`
	Device     adapters.Device   `json:"device,omitempty"`
	Link       uint64            `json:"link,omitempty"`
	Attributes map[string][]byte `json:"attributes,omitempty"`
}

func (a *app) listJSON(entries iter.Seq2[adapters.Entry, error]) error {
	for e, err := range entries {
		if err != nil {
			return err
		}
		line := entryLine{
			Name: e.Name, Type: e.Type.String(), Mode: fmt.Sprintf("%04o", e.Mode), UID: e.UID, GID: e.GID, Size: e.Size,
			Modified: e.Modified, Target: strings.ToValidUTF8(e.Target, "\ufffd"), Device: e.Device, Link: e.Link,
		}
		if strings.ToValidUTF8(e.Name, "") != e.Name {
			line.Name, line.NameBytes = "", []byte(e.Name)
		}
		for _, x := range e.Attributes {
			if line.Attributes == nil {
				line.Attributes = map[string][]byte{}
			}
			line.Attributes[x.Name] = x.Value
		}
		if err := a.printJSON(line); err != nil {
			return err
		}
	}
	return nil
}

// modeOf is the mode as ls shows it.
func modeOf(e adapters.Entry) os.FileMode {
	m := os.FileMode(e.Mode & 0o777)
	for unix, bit := range map[uint32]os.FileMode{0o4000: os.ModeSetuid, 0o2000: os.ModeSetgid, 0o1000: os.ModeSticky} {
		if e.Mode&unix != 0 {
			m |= bit
		}
	}
	return m | map[adapters.FileType]os.FileMode{
		adapters.Directory: os.ModeDir, adapters.Symlink: os.ModeSymlink, adapters.Fifo: os.ModeNamedPipe, adapters.Socket: os.ModeSocket,
		adapters.CharDevice: os.ModeDevice | os.ModeCharDevice, adapters.BlockDevice: os.ModeDevice,
	}[e.Type]
}

// shownName is a name that does nothing to a terminal, with a link's target.
func shownName(e adapters.Entry) string {
	name := quoted(e.Name)
	if e.Type == adapters.Symlink {
		name += " -> " + quoted(e.Target)
	}
	return name
}

func quoted(s string) string {
	if q := fmt.Sprintf("%q", s); q != `"`+s+`"` {
		return q
	}
	return s
}
