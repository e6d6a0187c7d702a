package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"stillpoint.io/stillpoint/agent/repository"
	"stillpoint.io/stillpoint/integration/lab"
	"stillpoint.io/stillpoint/integration/s3"
)

// stores are the S3 stores that tests use, started when the first one asks.
var stores s3.Stores

func TestMain(m *testing.M) {
	code := m.Run()
	if err := stores.Close(); err != nil {
		fmt.Fprintln(os.Stderr, "stopping the stores:", err)
		code = 1
	}
	os.Exit(code)
}

// files writes files with these contents and returns a folder with them.
func files(t *testing.T, contents map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range contents {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// What is wrong with a bucket in the configuration is said before anybody goes there.
func TestBucketConfig(t *testing.T) {
	for _, name := range []string{envRemote, envBucket, envAccessKey, envSecretKey, envSessionToken} {
		t.Setenv(name, "")
	}
	dir := files(t, map[string]string{"access": "ACCESS\n", "secret": "SECRET\n", "empty": "\n", "pass": "x", "ca": "no certificate"})
	const good = "s3-bucket: bucket, s3-endpoint: s3.example.com, passphrase-file: DIR/pass"
	keys := good + ", access-key-file: DIR/access, secret-key-file: DIR/secret"
	for _, c := range []struct {
		code  int
		words []string
		text  string
	}{
		{2, []string{"both a path and an s3-bucket"}, keys + ", path: /x"},
		{2, []string{"is a folder", "only a bucket has"}, "path: /x, s3-prefix: y, passphrase-file: DIR/pass"},
		{2, []string{"unknown field", "s3-buckets"}, "s3-buckets: bucket"},
		{2, []string{"no path", "no s3-bucket"}, "s3-endpoint: s3.example.com"},
		{2, []string{"no s3-endpoint", "s3.amazonaws.com"}, "s3-bucket: bucket"},
		{2, []string{"no credentials", "access-key-file", envAccessKey}, good},
		{2, []string{"secret-key-file is missing"}, good + ", access-key-file: DIR/access"},
		{2, []string{"access-key-file is missing"}, good + ", session-token-file: DIR/access"},
		{3, []string{"access-key-file", "no such file"}, good + ", access-key-file: DIR/none, secret-key-file: DIR/secret"},
		{2, []string{"secret-key-file", "is empty"}, good + ", access-key-file: DIR/access, secret-key-file: DIR/empty"},
		{2, []string{"s3-ca-file", "none"}, keys + ", s3-ca-file: DIR/none"},
		{2, []string{"no certificate in PEM"}, keys + ", s3-ca-file: DIR/ca"},
		{2, []string{"cache-size without cache"}, keys + ", cache-size: 1GiB"},
		{2, []string{"cache-size", "1 lot"}, keys + ", cache: /x, cache-size: 1 lot"},
		{2, []string{"when that is an address"}, strings.Replace(keys, "s3.example.com", "http://127.0.0.1:1", 1) + ", s3-use-path-style: false"},
	} {
		config := filepath.Join(dir, "config")
		if err := os.WriteFile(config, []byte("remotes: {default: {"+strings.ReplaceAll(c.text, "DIR", dir)+"}}\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		refuses(t, c.code, c.words, "--config", config, "backups")
	}

	t.Setenv(envBucket, "bucket")
	t.Setenv(envRemote, "/x")
	t.Setenv(envPassphraseFile, filepath.Join(dir, "pass"))
	refuses(t, 2, []string{"both a path and an s3-bucket"}, "backups")
	t.Setenv(envRemote, "")
	t.Setenv(envPathStyle, "perhaps")
	refuses(t, 2, []string{envPathStyle, "true or false"}, "backups")
	t.Setenv(envPathStyle, "true")
	refuses(t, 2, []string{"no s3-endpoint"}, "backups")
	config := filepath.Join(dir, "config")
	if err := os.WriteFile(config, []byte("remotes: {default: {path: /x}}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	refuses(t, 2, []string{"both in", envBucket}, "--config", config, "backups")
}

// A bucket from the configuration file and one from the environment: checked, made, backed up to, restored from. No secret
// shows anywhere.
func TestBucketRemote(t *testing.T) {
	l := lab.Test(t)
	programs(t)
	pool, err := l.Pool(t.Context(), "pool", "xfs", 400<<20)
	if err != nil {
		t.Fatal(err)
	}
	volume := filepath.Join(pool.Mount, "volume.img")
	content := bytes.Repeat([]byte("something worth keeping "), 100_000)
	if err := os.WriteFile(volume, content, 0o600); err != nil {
		t.Fatal(err)
	}
	var all strings.Builder
	run := func(t *testing.T, code int, args ...string) string {
		t.Helper()
		got, stdout, stderr := call(args...)
		all.WriteString(stdout + stderr)
		if got != code {
			t.Fatalf("stillpoint %s: exit code %d, want %d: %s%s", strings.Join(args, " "), got, code, stdout, stderr)
		}
		return stdout
	}
	for i, kind := range []s3.Kind{s3.VersityTLS, s3.Versity, s3.Ceph} {
		t.Run(string(kind), func(t *testing.T) {
			s := stores.Get(t, kind)
			dir := files(t, map[string]string{"access": s.AccessKey, "secret": s.SecretKey + "\n", "pass": "a passphrase nobody may see", "ca": string(s.CA), "wrong": "a wrong secret"})
			bucket, cache := s.Bucket(t), filepath.Join(dir, "cache")
			t.Setenv(envRun, filepath.Join(l.Dir, "run"))
			write := func(secret string) string {
				ca := ""
				if len(s.CA) > 0 {
					ca = "    s3-ca-file: " + dir + "/ca\n"
				}
				config := filepath.Join(dir, "config-"+secret)
				text := fmt.Sprintf(`remotes:
  offsite:
    s3-bucket: %s
    s3-endpoint: %s
    s3-prefix: of/this/test
    s3-use-path-style: true
    access-key-file: %s/access
    secret-key-file: %s/%s
    passphrase-file: %s/pass
    cache: %s
    cache-size: 10MiB
%s`, bucket, s.Endpoint, dir, dir, secret, dir, cache, ca)
				if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
				return config
			}
			args := []string{"--config", write("secret")}
			with := func(more ...string) []string { return append(append([]string{}, args...), more...) }
			name := "offsite"
			if i > 0 { // from the environment
				args, name = nil, "default"
				for key, value := range map[string]string{
					envRemote: "", envBucket: bucket, envPassphraseFile: dir + "/pass", envPathStyle: "", envAccessKey: s.AccessKey, envSecretKey: s.SecretKey,
					"STILLPOINT_S3_ENDPOINT": s.Endpoint, "STILLPOINT_S3_PREFIX": "of/this/test", "STILLPOINT_S3_SIGNING_REGION": s.Region, "STILLPOINT_S3_CACHE": cache,
				} {
					t.Setenv(key, value)
				}
			}

			run(t, 2, "--config", write("wrong"), "remote", "check", "offsite")
			text := run(t, 0, with("remote", "check", name, "--size", "8")...)
			for _, want := range []string{"checking s3://" + bucket + "/of/this/test/", "ok       write", "ok       cleanup", "MiB/s"} {
				if !strings.Contains(text, want) {
					t.Errorf("no %q in %s", want, text)
				}
			}
			steps := decode[repository.Step](t, run(t, 5, with("remote", "check", name, "--size", "8", "--object-lock", "--json")...))
			if len(steps) < 10 || steps[0].Name != "reach" || steps[len(steps)-1].Name != "cleanup" {
				t.Errorf("%+v", steps)
			}
			run(t, 3, with("remote", "status", name)...)
			run(t, 2, with("remote", "init", name, "--retain", "soon")...)
			run(t, 5, with("remote", "init", name, "--retain", "30d", "--retain-mode", "compliance")...)
			run(t, 0, with("remote", "init", name)...)
			run(t, 4, with("remote", "init", name)...)
			reports := decode[map[string]any](t, run(t, 0, with("backup", "--remote", name, "--allow-crash-consistent", "--json", "reflink:"+volume)...))
			handle, _ := reports[len(reports)-1]["backup"].(string)
			run(t, 0, with("verify", handle)...)
			target := filepath.Join(pool.Mount, fmt.Sprintf("restored-%d.img", i))
			run(t, 0, with("restore", handle, "reflink:"+target)...)
			got, err := os.ReadFile(target)
			if err != nil || !bytes.HasPrefix(got, content) {
				t.Errorf("%d bytes restored: %v", len(got), err)
			}
			status := decode[repository.Status](t, run(t, 0, with("remote", "status", name, "--json")...))
			if len(status) != 1 || status[0].Backups != 1 {
				t.Errorf("%+v", status)
			}
			run(t, 0, with("forget", "--force", handle)...)
			for _, object := range s.Objects(t, bucket, "") {
				if !strings.HasPrefix(object, "of/this/test/") {
					t.Errorf("outside of the prefix: %s", object)
				}
			}
			if entries, err := os.ReadDir(cache); err != nil || len(entries) != 1 {
				t.Errorf("the cache: %v, %v", entries, err)
			}

			secrets := []string{s.SecretKey, "nobody may see", "a wrong secret"}
			for _, secret := range secrets {
				if strings.Contains(all.String(), secret) {
					t.Errorf("a secret shows: %s", all.String())
				}
			}
			if err := filepath.WalkDir(cache, func(path string, d os.DirEntry, err error) error {
				if err != nil || d.IsDir() {
					return err
				}
				text, err := os.ReadFile(path)
				for _, secret := range append(secrets, "worth keeping") {
					if bytes.Contains(text, []byte(secret)) {
						t.Errorf("%s holds what it should not", path)
					}
				}
				return err
			}); err != nil {
				t.Error(err)
			}
		})
	}
}

// The check's exit code and words, for a store that is not there.
func TestCheckUnreachable(t *testing.T) {
	t.Setenv(envRemote, "")
	t.Setenv(envBucket, "bucket")
	t.Setenv(envAccessKey, "ACCESS")
	t.Setenv(envSecretKey, "SECRET")
	t.Setenv("STILLPOINT_S3_ENDPOINT", "http://127.0.0.1:1")
	done := make(chan [2]string, 1)
	go func() {
		_, stdout, stderr := call("remote", "check", "--json")
		done <- [2]string{stdout, stderr}
	}()
	select {
	case got := <-done:
		var step repository.Step
		if err := json.Unmarshal([]byte(got[0]), &step); err != nil || step.Result != repository.Failed || !strings.Contains(got[1], "cannot be reached") {
			t.Errorf("%+v, %v: %s", step, err, got[1])
		}
	case <-time.After(time.Minute):
		t.Error("still trying after a minute")
	}
}
