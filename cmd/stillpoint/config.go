package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"sigs.k8s.io/yaml"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/adapters/registry"
	"stillpoint.io/stillpoint/fault"
)

// config is the configuration file. Without one, the backend "reflink" exists by itself and the remote "default" is
// given by the environment.
type config struct {
	Backends map[string]backendConfig `json:"backends"`
	Remotes  map[string]remoteConfig  `json:"remotes"`
}

// backendConfig is one backend: an adapter, its parameters, and for each secret the file that holds it.
type backendConfig struct {
	Adapter     string            `json:"adapter"`
	Parameters  map[string]string `json:"parameters"`
	SecretFiles map[string]string `json:"secret-files"`
	Canary      string            `json:"canary"` // id of the volume on which `backup` tries the backend's changed blocks first
}

// loadConfig reads the file, or makes the configuration that holds without one. Unknown keys are errors.
func loadConfig(path string) (config, error) {
	var c config
	if path != "" {
		text, err := os.ReadFile(path)
		if err != nil {
			return c, fault.Errorf(fault.Invalid, "configuration: %w; name a readable YAML file with --config", err)
		}
		if err := yaml.UnmarshalStrict(text, &c); err != nil {
			return c, fault.Errorf(fault.Invalid, "configuration %s: %w; the keys at the top are backends: and remotes:", path, err)
		}
	}
	if len(c.Backends) == 0 {
		c.Backends = map[string]backendConfig{"reflink": {Adapter: "reflink"}}
	}
	r, from, err := remoteFromEnvironment()
	if err != nil {
		return c, err
	}
	if from != "" {
		if _, ok := c.Remotes[defaultRemote]; ok {
			return c, fault.Errorf(fault.Invalid, "the remote %q is both in %s and in the environment (%s): keep one", defaultRemote, path, from)
		}
		if c.Remotes == nil {
			c.Remotes = map[string]remoteConfig{}
		}
		c.Remotes[defaultRemote] = r
	}
	for name, b := range c.Backends {
		if h, err := adapters.ParseHandle(name + ":x"); err != nil || h.Volume.Backend != name {
			return c, fault.Errorf(fault.Invalid, "configuration %s: backend %q: a name is at most 32 of [a-z0-9-]", path, name)
		}
		if name == "backup" {
			return c, fault.Errorf(fault.Invalid, "configuration %s: a backend cannot be named backup: handles of backups begin with that word", path)
		}
		if b.Adapter == "" {
			return c, fault.Errorf(fault.Invalid, "configuration %s: backend %q has no adapter: `stillpoint adapters` lists them", path, name)
		}
	}
	return c, nil
}

// openBackend opens a configured backend, decorated with retries.
func (c config) openBackend(ctx context.Context, name string) (adapters.Adapter, error) {
	b, ok := c.Backends[name]
	if !ok {
		return nil, fault.Errorf(fault.NotFound, "backend %q is not configured; there is %s", name, list(c.Backends))
	}
	kind, err := registry.Find(b.Adapter)
	if err != nil {
		return nil, fmt.Errorf("backend %q: %w", name, err)
	}
	secrets := map[string]adapters.Secret{}
	for key, file := range b.SecretFiles {
		if secrets[key], err = readSecret(file); err != nil {
			return nil, fmt.Errorf("backend %q, secret %q: %w", name, key, err)
		}
	}
	a, err := kind.Open(ctx, adapters.Config{Name: name, Parameters: b.Parameters, Secrets: secrets})
	if err != nil {
		return nil, fmt.Errorf("backend %q: %w", name, err)
	}
	return adapters.Retry(a, adapters.RetryPolicy{}), nil
}

// readSecret reads a secret from a file, without the newline at its end.
func readSecret(path string) (adapters.Secret, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return adapters.Secret{}, fault.Errorf(fault.NotFound, "%w: make the file, readable by its owner only", err)
		}
		return adapters.Secret{}, fault.Errorf(fault.Invalid, "%w", err)
	}
	b = bytes.TrimRight(b, "\r\n")
	if len(b) == 0 {
		return adapters.Secret{}, fault.Errorf(fault.Invalid, "%s is empty", path)
	}
	return adapters.NewSecret(string(b)), nil
}

func list[V any](m map[string]V) string {
	if len(m) == 0 {
		return "none"
	}
	names := make([]string, 0, len(m))
	for n := range m {
		names = append(names, n)
	}
	slices.Sort(names)
	return strings.Join(names, ", ")
}
