package nodesettings

import "context"

// Update reads the settings once, as Run does.
func (w *Watcher) Update(ctx context.Context) { w.refresh(ctx) }
