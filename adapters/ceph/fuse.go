package ceph

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/moby/sys/mountinfo"
)

// fuseType is what mountinfo calls a mount of rbd-fuse.
const fuseType = "fuse.rbd-fuse"

// fuseFolder is where rbd-fuse shows the images of a pool as files. Nothing that the kernel knows of such a mount says
// which pool or cluster that is, so the backend's parameter fuse does.
type fuseFolder struct{ pool, path string }

// parseFuse reads the parameter: POOL=FOLDER, and more after commas.
func parseFuse(s string) (all []fuseFolder, err error) {
	if s == "" {
		return nil, nil
	}
	for part := range strings.SplitSeq(s, ",") {
		pool, path, ok := strings.Cut(strings.TrimSpace(part), "=")
		if !ok || pool == "" || !filepath.IsAbs(path) {
			return nil, fmt.Errorf("%q is not POOL=FOLDER with an absolute path", part)
		}
		all = append(all, fuseFolder{pool, filepath.Clean(path)})
	}
	return all, nil
}

// fuseMappings finds the loop devices that stand on files of the folders, as long as rbd-fuse is mounted there. It asks
// neither rbd-fuse nor the loop devices, which would ask it in turn: where a cluster is away they never answer.
func fuseMappings(sysBlock string, folders []fuseFolder) ([]mapping, error) {
	if len(folders) == 0 {
		return nil, nil
	}
	mounted, err := mountinfo.GetMounts(nil)
	if err != nil {
		return nil, err
	}
	topmost := map[string]string{} // the type of what is mounted at a folder, the last one on top
	for _, m := range mounted {
		topmost[m.Mountpoint] = m.FSType
	}
	images := map[string]imageName{} // by the folder's path
	for _, f := range folders {
		if topmost[f.path] == fuseType {
			images[f.path] = imageName{pool: f.pool}
		}
	}
	return loopsOn(sysBlock, images)
}

// loopsOn finds the loop devices on files of the folders: /sys/block/loop*/loop/backing_file (drivers/block/loop.c).
func loopsOn(sysBlock string, folders map[string]imageName) (all []mapping, err error) {
	if len(folders) == 0 {
		return nil, nil
	}
	loops, err := filepath.Glob(filepath.Join(sysBlock, "loop*"))
	if err != nil {
		return nil, err
	}
	for _, folder := range loops {
		file, err := readLine(filepath.Join(folder, "loop", "backing_file"))
		name, ok := folders[filepath.Dir(file)]
		if err != nil || !ok {
			continue // not attached, or to something else
		}
		device, err := number(folder)
		if err != nil {
			return nil, err
		}
		if device == 0 {
			continue
		}
		name.image = filepath.Base(file)
		all = append(all, mapping{name: name, live: true, device: device, path: "/dev/" + filepath.Base(folder)})
	}
	return all, nil
}

// readLine reads a file of one line, which may end in spaces.
func readLine(path string) (string, error) {
	b, err := os.ReadFile(path)
	return strings.TrimSuffix(string(b), "\n"), err
}
