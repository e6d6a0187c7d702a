package kube

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"testing"

	"stillpoint.io/stillpoint/fault"
)

func TestPublished(t *testing.T) {
	root := t.TempDir()
	put := func(content string, path ...string) string {
		t.Helper()
		p := filepath.Join(append([]string{root}, path...)...)
		if err := errors.Join(os.MkdirAll(filepath.Dir(p), 0o755), os.WriteFile(p, []byte(content), 0o600)); err != nil {
			t.Fatal(err)
		}
		return p
	}
	const data = `{"driverName":"x.example","volumeHandle":"h-1","specVolID":"pv-1","nodeName":"a"}`
	mounts := filepath.Dir(put(data, "pods/u1/volumes/kubernetes.io~csi/pv-1/vol_data.json"))
	put(`{"driverName":"x.example","volumeHandle":"h-2","specVolID":"pv-2"}`, "pods/u1/volumes/kubernetes.io~csi/pv-2/vol_data.json")
	put(`{"driverName":"y.example","volumeHandle":"h-1","specVolID":"pv-3"}`, "pods/u1/volumes/kubernetes.io~csi/pv-3/vol_data.json")
	put(`{"driverName":"x.exa`, "pods/u2/volumes/kubernetes.io~csi/pv-1/vol_data.json") // being written
	staged := filepath.Dir(put(`{"driverName":"x.example","volumeHandle":"h-1"}`, "plugins/kubernetes.io/csi/x.example/0f1e/vol_data.json"))
	put(data, "plugins/kubernetes.io/csi/volumeDevices/pv-1/data/vol_data.json")
	device := put("", "plugins/kubernetes.io/csi/volumeDevices/publish/pv-1/u3")

	got, err := Kubelet(root).Published("x.example", "h-1")
	want := []Published{
		{Path: device, Volume: "pv-1", Pod: "u3", Block: true},
		{Path: filepath.Join(staged, "globalmount")},
		{Path: filepath.Join(mounts, "mount"), Volume: "pv-1", Pod: "u1"},
	}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, %v", got, err)
	}
	if got, err := Kubelet(root).Published("x.example", "h-9"); got != nil || err != nil {
		t.Errorf("a volume that is not there: %+v, %v", got, err)
	}
	if _, err := Kubelet(filepath.Join(root, "none")).Published("x.example", "h-1"); !errors.Is(err, fault.NotFound) {
		t.Errorf("no kubelet: %v", err)
	}
}
