package repository

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"stillpoint.io/stillpoint/fault"
)

// folder checks a folder, in one of that name in it.
func (c *checker) folder(ctx context.Context, name string) (err error) {
	scratch := filepath.Join(c.at.Path, name)
	made := "" // the topmost folder that the check had to make
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		defer cancel()
		c.try(ctx, "cleanup", func(context.Context) (finding, error) {
			err := os.RemoveAll(scratch)
			for dir := c.at.Path; made != "" && err == nil && len(dir) >= len(made); dir = filepath.Dir(dir) {
				err = os.Remove(dir)
			}
			return found("nothing of the check is left"), err
		})
		err = c.first
	}()
	if !c.try(ctx, "reach", func(context.Context) (f finding, err error) {
		made, err = firstMissing(c.at.Path)
		if err == nil {
			err = os.MkdirAll(scratch, 0o700)
		}
		if err != nil {
			return finding{}, err
		}
		if made != "" {
			return found("the folder %s can be made", c.at.Path), nil
		}
		return found("the folder %s", c.at.Path), nil
	}) {
		return c.first
	}
	st, err := openFolder(ctx, &folderOptions{Path: scratch}, true)
	if err != nil {
		return c.at.fault("opening", err)
	}
	if !c.contract(ctx, st) {
		return c.first
	}
	c.try(ctx, "leftovers", func(context.Context) (finding, error) { return sweepCheckFolders(c.at.Path, name) })
	c.try(ctx, "clock", func(context.Context) (finding, error) {
		before := time.Now()
		path := filepath.Join(scratch, "clock")
		if err := os.WriteFile(path, []byte("tick"), 0o600); err != nil {
			return finding{}, err
		}
		info, err := os.Stat(path)
		if err != nil {
			return finding{}, err
		}
		return skew(apart(info.ModTime(), before, time.Now()))
	})
	c.try(ctx, "permissions", func(context.Context) (finding, error) { return permissions(c.at.Path) })
	c.try(ctx, "space", func(context.Context) (finding, error) { return space(scratch) })
	c.try(ctx, "direct", func(context.Context) (finding, error) { return direct(scratch) })
	if c.o.ObjectLock {
		c.try(ctx, "object-lock", func(context.Context) (finding, error) {
			return finding{}, fault.Errorf(fault.Unsupported, "a folder has no object lock; a bucket can have it")
		})
	}
	c.throughput(ctx, st)
	return c.first
}

// firstMissing is the topmost folder on the way to path that is not there, "" if path is.
func firstMissing(path string) (string, error) {
	missing := ""
	for dir := path; ; dir = filepath.Dir(dir) {
		info, err := os.Stat(dir)
		switch {
		case err == nil && !info.IsDir():
			return "", fmt.Errorf("%s: %w", dir, unix.ENOTDIR)
		case err == nil:
			return missing, nil
		case !errors.Is(err, fs.ErrNotExist):
			return "", err
		}
		missing = dir
	}
}

// sweepCheckFolders removes what checks left beside this one, which were killed.
func sweepCheckFolders(path, own string) (finding, error) {
	entries, err := os.ReadDir(path)
	if err != nil {
		return finding{}, err
	}
	last := map[string]time.Time{}
	for _, e := range entries {
		if !checkFolders.MatchString(e.Name()) {
			continue
		}
		err := filepath.WalkDir(filepath.Join(path, e.Name()), func(_ string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			info, err := d.Info()
			if err == nil && info.ModTime().After(last[e.Name()]) {
				last[e.Name()] = info.ModTime()
			}
			return err
		})
		if errors.Is(err, fs.ErrNotExist) { // its check is at work, or ends just now
			delete(last, e.Name())
		} else if err != nil {
			return finding{}, err
		}
	}
	old := leftovers(last, own)
	for _, name := range old {
		if err := os.RemoveAll(filepath.Join(path, name)); err != nil {
			return finding{}, err
		}
	}
	return swept(old), nil
}

func permissions(path string) (finding, error) {
	info, err := os.Stat(path)
	if err != nil {
		return finding{}, err
	}
	if mode := info.Mode().Perm(); mode&0o022 != 0 {
		return warned("others on this machine can write into the folder (%v) and so delete backups: chmod go-w %s", mode, path), nil
	}
	return found("only its owner can write"), nil
}

func space(path string) (finding, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return finding{}, err
	}
	free, total := int64(st.Bavail)*st.Bsize, int64(st.Blocks)*st.Bsize
	text := fmt.Sprintf("%.1f of %.1f GiB are free", float64(free)/(1<<30), float64(total)/(1<<30))
	if free < 1<<30 || free < total/20 {
		return warned("%s: make room, or choose a larger disk", text), nil
	}
	return found("%s", text), nil
}

func direct(dir string) (finding, error) {
	file, err := os.Create(filepath.Join(dir, "direct"))
	if err != nil {
		return finding{}, err
	}
	defer file.Close()
	on, err := setDirect(file, true)
	if err == nil && !on {
		return warned("this filesystem has no direct I/O (O_DIRECT): what is read back after a backup may come from memory instead of the disk"), nil
	}
	return found("reads and writes go past memory to the disk (O_DIRECT)"), err
}
