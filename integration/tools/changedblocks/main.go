// Command changedblocks asks for the changed blocks of a VolumeSnapshot as a backup program does: with the client library
// of the SnapshotMetadata sidecar, a service account's token and TLS. It prints them as JSON, or checks them against two
// devices: the one is made the other by copying the blocks, and then compared.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"time"

	"github.com/kubernetes-csi/external-snapshot-metadata/pkg/iterator"
	"k8s.io/client-go/tools/clientcmd"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "changedblocks:", err)
		os.Exit(1)
	}
}

func run() error {
	kubeconfig := flag.String("kubeconfig", "", "who asks the API server")
	namespace := flag.String("namespace", "default", "of the snapshots and of the service account")
	snapshot := flag.String("snapshot", "", "the VolumeSnapshot")
	previous := flag.String("previous", "", "the VolumeSnapshot before it; all allocated blocks without one")
	previousHandle := flag.String("previous-handle", "", "the same by its CSI handle")
	account := flag.String("service-account", "default", "whose token the sidecar is shown")
	offset := flag.Int64("starting-offset", 0, "bytes")
	most := flag.Int("max-results", 0, "of one message; the driver's choice if 0")
	source := flag.String("verify-source", "", "a device with the snapshot's content")
	target := flag.String("verify-target", "", "a device with the previous one's content, or zeros: it is written to")
	limit := flag.Duration("timeout", 30*time.Second, "of all of it")
	flag.Parse()

	config, err := clientcmd.BuildConfigFromFlags("", *kubeconfig)
	if err != nil {
		return err
	}
	clients, err := iterator.BuildClients(config)
	if err != nil {
		return err
	}
	args := iterator.Args{Clients: clients, Emitter: &iterator.JSONEmitter{Writer: os.Stdout}, Namespace: *namespace, SnapshotName: *snapshot,
		PrevSnapshotName: *previous, PrevSnapshotID: *previousHandle, StartingOffset: *offset, MaxResults: int32(*most), SANamespace: *namespace, SAName: *account}
	if *source != "" {
		from, err := os.Open(*source)
		if err != nil {
			return err
		}
		defer from.Close()
		to, err := os.OpenFile(*target, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		defer to.Close()
		args.Emitter = &iterator.VerifierEmitter{SourceDevice: from, TargetDevice: to}
	}
	ctx, cancel := context.WithTimeout(context.Background(), *limit)
	defer cancel()
	return iterator.GetSnapshotMetadata(ctx, args)
}
