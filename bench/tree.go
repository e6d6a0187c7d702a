package main

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
)

// The tree: so many directories of so many files of 4 KiB, and so many of them changed in between.
const (
	treeDirs    = 1000
	treeFiles   = 100
	treeChanged = 100
)

// tree compares backups of a tree of files: a subvolume of btrfs, of which the peers read the live files.
func (b *bench) tree(ctx context.Context) error {
	pool, err := b.lab.Pool(ctx, "trees", "btrfs", 8*gib)
	if err != nil {
		return err
	}
	tree := filepath.Join(pool.Mount, "tree")
	if out, err := exec.CommandContext(ctx, "btrfs", "subvolume", "create", tree).CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	for d := range treeDirs {
		dir := filepath.Join(tree, fmt.Sprint("dir", d))
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
		for f := range treeFiles {
			if err := os.WriteFile(filepath.Join(dir, fmt.Sprint("file", f)), random(4*kib), 0o644); err != nil {
				return err
			}
		}
	}
	tools, err := b.tools(ctx, tree)
	if err != nil {
		return err
	}
	b.say("\n## Backup of a tree of files\n")
	b.say("%d files of 4 KiB in %d directories, on btrfs; then %d of them changed, each in a directory of its own; page cache dropped before each command; every program with its default settings: %s.\n", treeDirs*treeFiles, treeDirs, treeChanged, versions(tools))
	b.say("| | full, s | incremental, s | CPU of the incremental, s | peak memory, MiB |")
	b.say("|---|---|---|---|---|")

	if _, err := b.stillpoint(ctx, false, "remote", "init"); err != nil {
		return err
	}
	var all [2]map[string]usage
	for i := range all {
		all[i] = map[string]usage{}
		if i == 1 {
			for _, d := range rand.Perm(treeDirs)[:treeChanged] {
				if err := os.WriteFile(filepath.Join(tree, fmt.Sprint("dir", d), fmt.Sprint("file", rand.IntN(treeFiles))), random(4*kib), 0o644); err != nil {
					return err
				}
			}
		}
		u, err := b.stillpoint(ctx, false, "cut", "--json", "--name", fmt.Sprint("state", i), "reflink:"+tree)
		if err != nil {
			return err
		}
		var cut struct{ Snapshots []string }
		if err := json.Unmarshal(u.text, &cut); err != nil {
			return err
		}
		if all[i]["Stillpoint"], err = b.stillpoint(ctx, true, "backup", "--json", cut.Snapshots[0]); err != nil {
			return err
		}
		for _, t := range tools {
			if i == 0 && len(t.init) > 0 {
				if _, err := b.time(ctx, false, t.env, t.init[0], t.init[1:]...); err != nil {
					return err
				}
			}
			if all[i][t.name], err = b.time(ctx, true, t.env, t.backup[0], number(t.backup[1:], i)...); err != nil {
				return err
			}
		}
	}
	fastest := ""
	for _, t := range tools {
		if fastest == "" || all[1][t.name].wall < all[1][fastest].wall {
			fastest = t.name
		}
	}
	for _, name := range append([]string{"Stillpoint"}, names(tools)...) {
		b.say("| %s | %.2f | %.2f | %.1f | %d |", name, all[0][name].wall.Seconds(), all[1][name].wall.Seconds(), all[1][name].cpu.Seconds(), max(all[0][name].peak, all[1][name].peak)/mib)
	}
	b.say("\nThe fastest peer's incremental (%s) ÷ Stillpoint's: %.1f.", fastest, all[1][fastest].wall.Seconds()/all[1]["Stillpoint"].wall.Seconds())
	var r struct {
		Tree json.RawMessage `json:"tree"`
	}
	if err := json.Unmarshal(all[1]["Stillpoint"].text, &r); err != nil {
		return err
	}
	b.say("What the incremental did: `%s`.", r.Tree)
	return nil
}

func names(tools []tool) (all []string) {
	for _, t := range tools {
		all = append(all, t.name)
	}
	return all
}
