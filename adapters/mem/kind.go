package mem

import (
	"context"
	"strings"

	"stillpoint.io/stillpoint/adapters"
	"stillpoint.io/stillpoint/fault"
)

// Kind is the row of the registry's table. Each opened backend has a store of its own, which ends with the process.
func Kind() adapters.Kind {
	return adapters.Kind{
		Name:    "mem",
		Summary: "volumes in this process's memory, for trying and testing",
		Keys: []adapters.Key{
			{Name: "volumes", Usage: "volumes to begin with, by name and separated by commas; default: none"},
			{Name: "size", Usage: "their size in bytes, e.g. 64MiB; default 1GiB"},
			{Name: "pending", Usage: "how long a new snapshot is not ready, e.g. 5s; default 0s"},
		},
		Open: open,
	}
}

func open(_ context.Context, c adapters.Config) (adapters.Adapter, error) {
	p, err := Kind().Params(c)
	if err != nil {
		return nil, err
	}
	store := &Store{Pending: p.Duration("pending", 0)}
	size, volumes := p.Bytes("size", 1<<30), p.String("volumes", "")
	if err := p.Err(); err != nil {
		return nil, err
	}
	for name := range strings.SplitSeq(volumes, ",") {
		if name = strings.TrimSpace(name); name == "" {
			continue
		}
		if _, err := store.Create(name, size); err != nil {
			return nil, fault.Errorf(fault.Invalid, "backend %s: %w", c.Name, err)
		}
	}
	return store.Adapter(c.Name), nil
}
