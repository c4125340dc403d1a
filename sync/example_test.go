package sync_test

import (
	"context"
	"fmt"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/dataplane/fake"
	"fairlead.io/fairlead/sync"
)

func Example() {
	ctx, cancel := context.WithCancel(context.Background())
	s := sync.New(fake.New(fake.Options{}), sync.Options{
		OnCommit: func(c sync.Commit) {
			fmt.Println(c.Op, c.Reason, len(c.Changes), "of", c.Services)
		},
	})
	ended := make(chan error)
	go func() { ended <- s.Run(ctx) }()

	first, second := service(1, 3), service(2, 3)
	s.Update(map[dataplane.Key]*dataplane.Service{first.Key: first, second.Key: second})
	s.FinishInitialList()
	_ = s.WaitSynced(ctx)
	s.Update(map[dataplane.Key]*dataplane.Service{second.Key: nil})
	_ = s.WaitSynced(ctx)

	cancel()
	fmt.Println("ended:", <-ended)
	// Output:
	// replace start 2 of 2
	// apply change 1 of 1
	// ended: <nil>
}
