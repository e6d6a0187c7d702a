package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"

	"stillpoint.io/stillpoint/integration/s3"
)

// s3 compares a remote in a bucket with one in a folder: the same image, cut, backed up, changed, backed up, restored.
// The stores are on this machine and disk, so what they need of the processor is in the times.
func (b *bench) s3(ctx context.Context) error {
	image := filepath.Join(b.pool.Mount, "disk.img")
	if err := makeImage(image); err != nil {
		return err
	}
	b.say("\n## Remotes in a bucket\n")
	b.say("The image of the part above, into a folder and into buckets of S3 stores on this machine, one after the other.\n")
	b.say("| remote | full, s | ÷ folder | incremental, s | ÷ folder | restore, s | ÷ folder | processors in the full, s: Stillpoint, everything |")
	b.say("|---|---|---|---|---|---|---|---|")
	folder, err := b.throughRemote(ctx, image, "folder", "  path: "+filepath.Join(b.lab.Dir, "remote"))
	if err != nil {
		return err
	}
	row := func(name string, m measured) {
		cell := func(u, than usage) string {
			return fmt.Sprintf("%.2f | %.2f", u.wall.Seconds(), u.wall.Seconds()/than.wall.Seconds())
		}
		b.say("| %s | %s | %s | %s | %.1f, %.1f |", name, cell(m.full, folder.full), cell(m.incremental, folder.incremental), cell(m.restore, folder.restore),
			m.full.cpu.Seconds(), m.full.busy.Seconds())
	}
	row("folder", folder)
	for _, kind := range s3.Kinds {
		m, err := b.throughStore(ctx, image, kind)
		if err != nil {
			return fmt.Errorf("%s: %w", kind, err)
		}
		row(string(kind), m)
	}
	return nil
}

func (b *bench) throughStore(ctx context.Context, image string, kind s3.Kind) (m measured, err error) {
	store, err := s3.Start(kind)
	if err != nil {
		return m, err
	}
	defer func() {
		if e := store.Close(); err == nil {
			err = e
		}
	}()
	client, err := minio.New(strings.TrimPrefix(store.Endpoint, "http://"), &minio.Options{
		Creds: credentials.NewStaticV4(store.AccessKey, store.SecretKey, ""), Region: store.Region, Transport: http.DefaultTransport,
	})
	if err != nil {
		return m, err
	}
	const bucket = "bench"
	if err := client.MakeBucket(ctx, bucket, minio.MakeBucketOptions{Region: store.Region}); err != nil {
		return m, err
	}
	keys := map[string]string{"access": store.AccessKey, "secret": store.SecretKey}
	for name, value := range keys {
		keys[name] = filepath.Join(b.lab.Dir, name)
		if err := os.WriteFile(keys[name], []byte(value), 0o600); err != nil {
			return m, err
		}
	}
	return b.throughRemote(ctx, image, string(kind), fmt.Sprintf("  s3-bucket: %s\n    s3-endpoint: %s\n    s3-signing-region: %s\n    access-key-file: %s\n    secret-key-file: %s",
		bucket, store.Endpoint, store.Region, keys["access"], keys["secret"]))
}

// throughRemote measures a remote that is described in YAML.
func (b *bench) throughRemote(ctx context.Context, image, name, remote string) (m measured, err error) {
	config := filepath.Join(b.lab.Dir, name+".yaml")
	text := fmt.Sprintf("remotes:\n  here:\n  %s\n    passphrase-file: %s\n", remote, filepath.Join(b.lab.Dir, "passphrase"))
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		return m, err
	}
	run := func(cold bool, args ...string) (usage, error) {
		return b.stillpoint(ctx, cold, append([]string{"--config", config}, args...)...)
	}
	if _, err := run(false, "remote", "init", "here"); err != nil {
		return m, err
	}
	target, first := filepath.Join(b.pool.Mount, "restored.img"), filepath.Join(b.pool.Mount, "first.img")
	defer os.Remove(target)
	if err := exec.CommandContext(ctx, "cp", "--reflink=always", image, first).Run(); err != nil {
		return m, err
	}
	defer os.Rename(first, image) // the next remote starts from the same bytes
	var r report
	for i, u := range []*usage{&m.full, &m.incremental} {
		if i == 1 {
			if _, err := change(image); err != nil {
				return m, err
			}
		}
		cut, err := run(false, "cut", "--json", "--name", fmt.Sprintf("%s-%d", name, i), "reflink:"+image)
		if err != nil {
			return m, err
		}
		var made struct{ Snapshots []string }
		if err := json.Unmarshal(cut.text, &made); err != nil {
			return m, err
		}
		if *u, err = run(true, "backup", "--json", "--remote", "here", made.Snapshots[0]); err != nil {
			return m, err
		}
		if err := json.Unmarshal(u.text, &r); err != nil {
			return m, err
		}
		time.Sleep(time.Second) // let the store finish what it acknowledged
	}
	if m.restore, err = run(true, "restore", r.Backup, "reflink:"+target); err != nil {
		return m, err
	}
	if err := exec.CommandContext(ctx, "cmp", image, target).Run(); err != nil {
		return m, fmt.Errorf("the restored image differs: %w", err)
	}
	return m, nil
}
