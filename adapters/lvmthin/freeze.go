package lvmthin

import (
	"context"

	"stillpoint.io/stillpoint/adapters"
)

type freezeFound struct{}

func (a *Adapter) quiesce() string { return "x" }

func (a *Adapter) freezeMode(ctx context.Context, g *group, l *logical) (adapters.FreezeMode, error) {
	return adapters.FreezeSelf, nil
}
