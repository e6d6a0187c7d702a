// Package csi runs csi-sanity, the conformance tests of kubernetes-csi/csi-test, against the driver over real backends.
package csi

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/kubernetes-csi/csi-test/v5/pkg/sanity"
	"github.com/onsi/ginkgo/v2"
	"github.com/onsi/ginkgo/v2/types"
	"github.com/onsi/gomega"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"k8s.io/klog/v2"
)

// Site is a driver that is served, and how volumes of it are asked for.
type Site struct {
	Name      string
	Socket    string            // path of the unix socket
	Folder    string            // that the driver may mount in
	Block     bool              // volumes are used raw instead of with a filesystem
	Size      int64             // bytes of volumes; they are grown to twice that
	Volumes   map[string]string // parameters of the StorageClass
	Snapshots map[string]string // and of the VolumeSnapshotClass
}

// Skipped are the specs that csi-sanity leaves out because of what the driver says of itself: it does not attach volumes by a
// call to the controller, lists no volumes, tells no capacity and modifies no volumes. The last words of each spec's name.
var Skipped = []string{
	"should return capacity (no optional values added)",
	"ListVolumes should return appropriate values (no optional values added)",
	"ListVolumes should fail when an invalid starting_token is passed",
	"ListVolumes check the presence of new volumes and absence of deleted ones in the volume list",
	"should create volume with a volume attribute class",
	"should not create volume with an invalid volume attribute class",
	"ControllerPublishVolume should fail when no volume id is provided",
	"ControllerPublishVolume should fail when no node id is provided",
	"ControllerPublishVolume should fail when no volume capability is provided",
	"ControllerPublishVolume should fail when publishing more volumes than the node max attach limit",
	"ControllerPublishVolume should fail when the volume does not exist",
	"ControllerPublishVolume should fail when the node does not exist",
	"ControllerPublishVolume should fail when the volume is already published but is incompatible",
	"volume lifecycle should work",
	"volume lifecycle should be idempotent",
	"ControllerUnpublishVolume should fail when no volume id is provided",
	"ModifyVolume [Controller Server] should fail if no volume id is given",
	"ModifyVolume [Controller Server] should fail if volume does not exist",
	"ModifyVolume [Controller Server] should fail if specified mutable parameters are not supported by the volume",
	"ModifyVolume [Controller Server] should modify a volume created without a volume attribute class",
	"ModifyVolume [Controller Server] should modify a volume created with a volume attribute class",
	"ModifyVolume [Controller Server] should fail to modify a volume created with a volume attribute class if new mutable parameters are not supported by volume",
}

// Run runs csi-sanity against each site. It can be called once in a process (a limit of ginkgo's). A spec that is left
// out and is not among Skipped fails the test.
func Run(t *testing.T, sites ...Site) {
	for _, s := range sites {
		config := sanity.NewTestConfig()
		config.TargetPath, config.StagingPath = filepath.Join(s.Folder, "published"), filepath.Join(s.Folder, "staged")
		config.TestVolumeSize, config.TestVolumeExpandSize = s.Size, 2*s.Size
		config.TestVolumeParameters, config.TestSnapshotParameters = s.Volumes, s.Snapshots
		if s.Block {
			config.TestVolumeAccessType = "block"
		}
		// csi-sanity's own way to connect waits for a minute, and fails, where the connection is ready at once; so it gets one.
		// With an empty Address it keeps it.
		conn, err := grpc.NewClient("unix://"+s.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		ginkgo.Describe(s.Name, func() { sanity.GinkgoTest(&config).Conn = conn })
	}
	var ran sync.Map
	ginkgo.ReportAfterEach(func(r types.SpecReport) { ran.Store(r.FullText(), r.State) })
	klog.SetOutput(t.Output())
	klog.LogToStderr(false)
	gomega.RegisterFailHandler(ginkgo.Fail)
	suite, reporter := ginkgo.GinkgoConfiguration()
	reporter.Succinct = true
	if !ginkgo.RunSpecs(t, "csi-sanity", suite, reporter) {
		t.Error("csi-sanity failed")
	}
	count := map[types.SpecState]int{}
	ran.Range(func(name, state any) bool {
		count[state.(types.SpecState)]++
		if state == types.SpecStateSkipped && !slices.ContainsFunc(Skipped, func(s string) bool { return strings.HasSuffix(name.(string), s) }) {
			t.Errorf("left out, though the driver can do it: %s", name)
		}
		return true
	})
	t.Log(summary(count))
	if count[types.SpecStatePassed] < 50*len(sites) {
		t.Errorf("csi-sanity ran only %d specs for %d sites", count[types.SpecStatePassed], len(sites))
	}
}

func summary(count map[types.SpecState]int) string {
	var words []string
	for state, n := range count {
		words = append(words, fmt.Sprintf("%d %v", n, state))
	}
	slices.Sort(words)
	return strings.Join(words, ", ")
}
