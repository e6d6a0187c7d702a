package kube

import (
	"cmp"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"

	"stillpoint.io/stillpoint/fault"
)

// Kubelet is the folder of a node's kubelet, usually /var/lib/kubelet. What it keeps there of CSI volumes says where they
// are, without asking the API server: it writes a file vol_data.json beside each place of a volume before it has the driver
// publish the volume there, and removes it afterwards (k8s.io/kubernetes/pkg/volume/csi: csi_mounter.go SetUpAt,
// csi_attacher.go MountDevice, csi_plugin.go NewBlockVolumeMapper).
type Kubelet string

// Published is a place where the kubelet has a volume, or is about to, or had it. Whether it is really there is for the
// mount table to say.
type Published struct {
	Path   string // the mount point, or the device
	Volume string // the PersistentVolume's name; empty of a place that pods share
	Pod    string // the UID of the pod whose place it is; empty of a place that pods share
	Block  bool   // a device, not a mount
}

// Published finds all places of a volume of a CSI driver, sorted by path. None is no error; a kubelet's folder that is not
// there is NotFound.
func (k Kubelet) Published(driver, handle string) ([]Published, error) {
	if _, err := os.Stat(string(k)); err != nil {
		return nil, fault.Errorf(fault.NotFound, "the kubelet's folder: %w: it is another one on this node, or not mounted into the agent", err)
	}
	root := os.DirFS(string(k))
	var found []Published
	for _, pattern := range []string{podData, stagedData, blockData} {
		files, err := fs.Glob(root, pattern)
		if err != nil {
			return nil, err
		}
		for _, file := range files {
			d, err := readVolumeData(root, file)
			if err != nil {
				return nil, err
			}
			if d.Driver != driver || d.Handle != handle {
				continue
			}
			places, err := placesOf(root, pattern, file, d)
			if err != nil {
				return nil, err
			}
			found = append(found, places...)
		}
	}
	for i := range found {
		found[i].Path = filepath.Join(string(k), found[i].Path)
	}
	slices.SortFunc(found, func(a, b Published) int { return cmp.Compare(a.Path, b.Path) })
	return found, nil
}

// Where the files are: of a pod's mount, of the mount that the pods of a node share, and of a device.
const (
	podData    = "pods/*/volumes/kubernetes.io~csi/*/vol_data.json"
	stagedData = "plugins/kubernetes.io/csi/*/*/vol_data.json"
	blockData  = "plugins/kubernetes.io/csi/volumeDevices/*/data/vol_data.json"
)

// volumeData is what such a file says; there is more in it.
type volumeData struct {
	Driver string `json:"driverName"`
	Handle string `json:"volumeHandle"`
	Volume string `json:"specVolID"`
}

// readVolumeData reads a file. One that is gone meanwhile, or is not written to its end yet, is of no volume: there is
// nothing published there any more, or yet.
func readVolumeData(root fs.FS, file string) (d volumeData, err error) {
	content, err := fs.ReadFile(root, file)
	if errors.Is(err, fs.ErrNotExist) {
		return volumeData{}, nil
	}
	if err != nil {
		return volumeData{}, fault.Errorf(fault.Unavailable, "reading what the kubelet keeps of a volume: %w", err)
	}
	if json.Unmarshal(content, &d) != nil {
		return volumeData{}, nil
	}
	return d, nil
}

// placesOf are the places that a file is about, below the kubelet's folder.
func placesOf(root fs.FS, pattern, file string, d volumeData) ([]Published, error) {
	dir := path.Dir(file)
	switch pattern {
	case podData:
		pod := path.Base(path.Dir(path.Dir(path.Dir(dir))))
		return []Published{{Path: path.Join(dir, "mount"), Volume: d.Volume, Pod: pod}}, nil
	case stagedData:
		return []Published{{Path: path.Join(dir, "globalmount")}}, nil
	}
	// A device has a place for each pod, which is named after it: csi_block.go, getPublishPath.
	volume := path.Dir(dir)
	publish := path.Join(path.Dir(volume), "publish", path.Base(volume))
	pods, err := fs.ReadDir(root, publish)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fault.Errorf(fault.Unavailable, "reading where the kubelet has a device: %w", err)
	}
	var all []Published
	for _, pod := range pods {
		all = append(all, Published{Path: path.Join(publish, pod.Name()), Volume: d.Volume, Pod: pod.Name(), Block: true})
	}
	return all, nil
}
