package adapters_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

var kind = adapters.Kind{Name: "ceph-rbd", Keys: []adapters.Key{
	{Name: "monitors", Usage: "addresses, separated by commas", Required: true},
	{Name: "timeout", Usage: "of one call; default 30s"},
	{Name: "cache", Usage: "bytes; default 64MiB"},
	{Name: "threads", Usage: "default 4"},
	{Name: "read-only", Usage: "default false"},
	{Name: "key", Usage: "of the user", Required: true, Secret: true},
}}

func config(pairs ...string) adapters.Config {
	c := adapters.Config{Name: "pool1", Parameters: map[string]string{"monitors": "a,b"}, Secrets: map[string]adapters.Secret{"key": adapters.NewSecret("hunter2")}}
	for i := 0; i < len(pairs); i += 2 {
		c.Parameters[pairs[i]] = pairs[i+1]
	}
	return c
}

func TestParams(t *testing.T) {
	p, err := kind.Params(config("timeout", "1m30s", "cache", "2GiB", "threads", " 8", "read-only", "true"))
	if err != nil {
		t.Fatal(err)
	}
	key, ok := p.Secret("key")
	if p.String("monitors", "") != "a,b" || p.Duration("timeout", 0) != 90*time.Second || p.Bytes("cache", 0) != 2<<30 ||
		p.Int("threads", 0) != 8 || !p.Bool("read-only", false) || !ok || key.Reveal() != "hunter2" || p.Err() != nil {
		t.Errorf("%+v, %v", p, p.Err())
	}
	p, err = kind.Params(config())
	if err != nil || p.Duration("timeout", time.Hour) != time.Hour || p.Bytes("cache", 7) != 7 || p.Int("threads", -1) != -1 || !p.Bool("read-only", true) {
		t.Errorf("defaults: %v", err)
	}
}

func TestParamsErrors(t *testing.T) {
	for name, c := range map[string]struct {
		config adapters.Config
		hints  []string
	}{
		"unknown":            {config("timout", "1s"), []string{"backend pool1", `"timout"`, `did you mean "timeout"`}},
		"quite unknown":      {config("zzz", "1s"), []string{`"zzz"`, "cache, key, monitors"}},
		"secret in the open": {config("key", "hunter2"), []string{"among the secrets"}},
		"required":           {adapters.Config{Name: "pool1"}, []string{`parameter "monitors" is required: addresses`, `secret "key" is required`}},
		"unknown secret":     {adapters.Config{Name: "pool1", Secrets: map[string]adapters.Secret{"kee": {}, "cache": {}}}, []string{`did you mean "key"`, `"cache" is not a secret`}},
	} {
		_, err := kind.Params(c.config)
		if !errors.Is(err, fault.Invalid) {
			t.Errorf("%s: %v", name, err)
			continue
		}
		for _, hint := range c.hints {
			if !strings.Contains(err.Error(), hint) {
				t.Errorf("%s: %q is not in %v", name, hint, err)
			}
		}
		if strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s: the secret shows: %v", name, err)
		}
	}

	p, err := kind.Params(config("timeout", "5", "cache", "64MB", "threads", "4.5", "read-only", "yes"))
	if err != nil {
		t.Fatal(err)
	}
	if p.Duration("timeout", 9) != 9 || p.Bytes("cache", 9) != 9 || p.Int("threads", 9) != 9 || !p.Bool("read-only", true) {
		t.Error("a value that cannot be read is not the default")
	}
	err = p.Err()
	for _, hint := range []string{`timeout: "5" is not a time with a unit`, `cache: "64MB" is not a size`, `threads: "4.5"`, `read-only: "yes" is not true or false`} {
		if !errors.Is(err, fault.Invalid) || !strings.Contains(err.Error(), hint) {
			t.Errorf("%q is not in %v", hint, err)
		}
	}
	p, _ = kind.Params(config("timeout", "-1s", "cache", "99999999999TiB"))
	p.Duration("timeout", 0)
	p.Bytes("cache", 0)
	p.String("key", "")
	if err := p.Err(); err == nil || strings.Count(err.Error(), "\n") != 2 {
		t.Errorf("a negative time, a size too large and an undeclared key: %v", err)
	}
}

func TestNearest(t *testing.T) {
	known := []string{"reflink", "lvm-thin", "ceph-rbd", "mem"}
	for word, want := range map[string]string{"reflnik": "reflink", "Reflink": "reflink", "lvmthin": "lvm-thin", "men": "mem", "zfs": "", "": "", "cephrbd": "ceph-rbd", "m": ""} {
		if got := adapters.Nearest(word, known); got != want {
			t.Errorf("%q is near %q, not %q", word, got, want)
		}
	}
}
