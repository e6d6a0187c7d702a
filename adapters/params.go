package adapters

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"stillpoint.io/stillpoint/fault"
)

// Params reads a Config by a Kind's keys. The getters return their default where a key is not given, and what is
// wrong with a value is said by Err, all of it at once:
//
//	p, err := Kind().Params(c)
//	…
//	timeout, size := p.Duration("timeout", time.Minute), p.Bytes("cache", 64<<20)
//	if err := p.Err(); err != nil { … }
type Params struct {
	kind   Kind
	config Config
	errs   []error
}

// Params checks that the config gives no key that the kind does not have, and every one that it requires.
func (k Kind) Params(c Config) (*Params, error) {
	p := &Params{kind: k, config: c}
	var names []string
	for _, key := range k.Keys {
		names = append(names, key.Name)
	}
	for _, name := range slices.Sorted(maps.Keys(c.Parameters)) {
		switch key, known := k.key(name); {
		case !known:
			p.fail("the adapter %s has no parameter %q%s", k.Name, name, didYouMean(name, names))
		case key.Secret:
			p.fail("%q is a secret: give it among the secrets, not among the parameters", name)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(c.Secrets)) {
		switch key, known := k.key(name); {
		case !known:
			p.fail("the adapter %s has no secret %q%s", k.Name, name, didYouMean(name, names))
		case !key.Secret:
			p.fail("%q is not a secret: give it among the parameters", name)
		}
	}
	for _, key := range k.Keys {
		if key.Required && !p.given(key) {
			what := "parameter"
			if key.Secret {
				what = "secret"
			}
			p.fail("the %s %q is required: %s", what, key.Name, key.Usage)
		}
	}
	return p, p.Err()
}

// Err is everything that was wrong so far: Invalid, or nil.
func (p *Params) Err() error {
	if len(p.errs) == 0 {
		return nil
	}
	return fault.Errorf(fault.Invalid, "backend %s: %w", p.config.Name, errors.Join(p.errs...))
}

// String returns a parameter as it stands.
func (p *Params) String(key, otherwise string) string {
	return get(p, key, otherwise, "", func(s string) (string, error) { return s, nil })
}

// Bool reads "true" or "false".
func (p *Params) Bool(key string, otherwise bool) bool {
	return get(p, key, otherwise, "true or false", func(s string) (bool, error) {
		if s != "true" && s != "false" {
			return false, strconv.ErrSyntax
		}
		return s == "true", nil
	})
}

// Int reads a decimal integer.
func (p *Params) Int(key string, otherwise int) int {
	return get(p, key, otherwise, "a whole number", strconv.Atoi)
}

// Duration reads a time of zero or more with a unit.
func (p *Params) Duration(key string, otherwise time.Duration) time.Duration {
	return get(p, key, otherwise, "a time with a unit, like 500ms, 30s or 5m", func(s string) (time.Duration, error) {
		d, err := time.ParseDuration(s)
		if err == nil && d < 0 {
			err = strconv.ErrRange
		}
		return d, err
	})
}

// Bytes reads a size in bytes: a whole number, with B, KiB, MiB, GiB or TiB behind it or nothing.
func (p *Params) Bytes(key string, otherwise int64) int64 {
	return get(p, key, otherwise, "a size in bytes, like 4096, 64MiB or 1TiB", ParseBytes)
}

// Secret returns a secret, and whether it is given.
func (p *Params) Secret(key string) (Secret, bool) {
	p.declared(key, true)
	s, ok := p.config.Secrets[key]
	return s, ok
}

func get[T any](p *Params, key string, otherwise T, want string, parse func(string) (T, error)) T {
	p.declared(key, false)
	s, ok := p.config.Parameters[key]
	if !ok {
		return otherwise
	}
	v, err := parse(strings.TrimSpace(s))
	if err != nil {
		p.fail("%s: %q is not %s", key, s, want)
		return otherwise
	}
	return v
}

func (p *Params) fail(format string, args ...any) {
	p.errs = append(p.errs, fmt.Errorf(format, args...))
}

func (p *Params) given(key Key) bool {
	if key.Secret {
		_, ok := p.config.Secrets[key.Name]
		return ok
	}
	return p.config.Parameters[key.Name] != ""
}

// declared catches an adapter that reads a key which its table does not show.
func (p *Params) declared(name string, secret bool) {
	if key, ok := p.kind.key(name); !ok || key.Secret != secret {
		p.fail("a fault of the adapter %s: it reads the key %q, which its Keys do not declare so", p.kind.Name, name)
	}
}

func (k Kind) key(name string) (Key, bool) {
	i := slices.IndexFunc(k.Keys, func(key Key) bool { return key.Name == name })
	if i < 0 {
		return Key{}, false
	}
	return k.Keys[i], true
}

// units of sizes, largest first.
var units = []struct {
	name string
	size int64
}{{"TiB", 1 << 40}, {"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10}, {"B", 1}}

// ParseBytes reads a size in bytes: a whole number, with B, KiB, MiB, GiB or TiB behind it or nothing.
func ParseBytes(s string) (int64, error) {
	number, size := s, int64(1)
	for _, u := range units {
		if n, ok := strings.CutSuffix(s, u.name); ok {
			number, size = strings.TrimSpace(n), u.size
			break
		}
	}
	n, err := strconv.ParseUint(number, 10, 63)
	if err != nil || int64(n) > math.MaxInt64/size {
		return 0, fmt.Errorf("%q is not a size in bytes, like 4096, 64MiB or 1TiB", s)
	}
	return int64(n) * size, nil
}

// formatBytes writes a size so that ParseBytes reads it.
func formatBytes(n int64) string {
	for _, u := range units[:len(units)-1] {
		if n > 0 && n%u.size == 0 {
			return fmt.Sprintf("%d%s", n/u.size, u.name)
		}
	}
	return strconv.FormatInt(n, 10)
}
