package ceph

import (
	"errors"
	"strings"
	"testing"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

const (
	clusterUUID = "7635de36-ab1f-4a70-98a2-a1bd80ba77c4"
	imageUUID   = "6e696bba-064f-11ec-a251-0242ac110002"
	fsidHandle  = "0001-0024-" + clusterUUID + "-0000000000000006-" + imageUUID
	rookHandle  = "0001-0009-rook-ceph-0000000000000002-" + imageUUID
)

func TestParseCSIHandle(t *testing.T) {
	for handle, want := range map[string]csiHandle{
		fsidHandle: {clusterUUID, 6, imageUUID},
		rookHandle: {"rook-ceph", 2, imageUUID},
		"0001-0001-x-000000000000001f-" + imageUUID: {"x", 31, imageUUID},
	} {
		if h, ok := parseCSIHandle(handle); !ok || h != want {
			t.Errorf("%s: %+v, %v", handle, h, ok)
		}
	}
	for _, wrong := range []string{
		"", "rbd/image", "0002" + fsidHandle[4:], "0001-0023" + fsidHandle[9:], "0001-ffff" + fsidHandle[9:], fsidHandle + "0", fsidHandle[:len(fsidHandle)-1],
		strings.ToUpper(fsidHandle), "0001-0000--0000000000000006-" + imageUUID, "0001-0009-rook-ceph-00000000000000g2-" + imageUUID,
		"0001-0009-rook-ceph-ffffffffffffffff-" + imageUUID, "0001-0009-rook-ceph-0000000000000002_" + imageUUID, strings.Replace(rookHandle, "0009", "09", 1),
	} {
		if h, ok := parseCSIHandle(wrong); ok {
			t.Errorf("%q was read as %+v", wrong, h)
		}
	}
}

func FuzzParseCSIHandle(f *testing.F) {
	f.Add(fsidHandle)
	f.Add(rookHandle)
	f.Fuzz(func(t *testing.T, s string) {
		if h, ok := parseCSIHandle(s); ok && (h.pool < 0 || len(h.uuid) != 36 || !strings.Contains(s, h.cluster)) {
			t.Errorf("%q was read as %+v", s, h)
		}
	})
}

// rbdPV is a PersistentVolume of ceph-csi as Rook deploys it.
func rbdPV(handle string, attributes map[string]string) adapters.PersistentVolume {
	return adapters.PersistentVolume{Driver: "rook-ceph.rbd.csi.ceph.com", Handle: handle, Attributes: attributes}
}

func TestResolveRBD(t *testing.T) {
	attributes := func(pairs ...string) map[string]string {
		m := map[string]string{"clusterID": "rook-ceph", "imageFeatures": "layering"}
		for i := 0; i < len(pairs); i += 2 {
			m[pairs[i]] = pairs[i+1]
		}
		return m
	}
	for name, c := range map[string]struct {
		pv   adapters.PersistentVolume
		want string
	}{
		"dynamic":             {rbdPV(rookHandle, attributes("pool", "replicapool", "imageName", "csi-vol-"+imageUUID, "journalPool", "replicapool", "radosNamespace", "")), "replicapool/csi-vol-" + imageUUID},
		"in a topology":       {rbdPV(rookHandle, attributes("pool", "zone-a", "imageName", "csi-vol-"+imageUUID, "journalPool", "replicapool")), "zone-a/csi-vol-" + imageUUID},
		"in a namespace":      {rbdPV(rookHandle, attributes("pool", "p", "imageName", "csi-vol-"+imageUUID, "radosNamespace", "tenant")), "p/tenant/csi-vol-" + imageUUID},
		"with a prefix":       {rbdPV(rookHandle, attributes("pool", "p", "imageName", "prod-"+imageUUID)), "p/prod-" + imageUUID},
		"before imageName":    {rbdPV(rookHandle, attributes("pool", "p")), "p/csi-vol-" + imageUUID},
		"without attributes":  {rbdPV(rookHandle, nil), rookHandle},
		"static":              {rbdPV("vm-disk", attributes("pool", "p", "staticVolume", "true")), "p/vm-disk"},
		"static in namespace": {rbdPV("vm-disk", attributes("pool", "p", "staticVolume", "true", "radosNamespace", "n")), "p/n/vm-disk"},
	} {
		if id, err := RBD().VolumeOf(c.pv); err != nil || id != c.want {
			t.Errorf("%s: %q, %v", name, id, err)
		}
	}
	for name, pv := range map[string]adapters.PersistentVolume{
		"an odd handle":            rbdPV("vol-0123", nil),
		"static without a pool":    rbdPV("vm-disk", attributes("staticVolume", "true")),
		"a pool with a slash":      rbdPV(rookHandle, attributes("pool", "a/b", "imageName", "c")),
		"an image with a slash":    rbdPV("a/b", attributes("pool", "p", "staticVolume", "true")),
		"an image that is a draft": rbdPV(targetPrefix+"x", attributes("pool", "p", "staticVolume", "true")),
	} {
		if id, err := RBD().VolumeOf(pv); !errors.Is(err, fault.Invalid) {
			t.Errorf("%s: %q, %v", name, id, err)
		}
	}
}
