package bench

import (
	"context"
	"fmt"

	"fairlead.io/fairlead/bench/cluster"
	"fairlead.io/fairlead/bench/result"
	"fairlead.io/fairlead/bench/statistics"
	"fairlead.io/fairlead/bench/testbed"
)

// fairness makes many connections to one of the Services and counts the connections at each
// endpoint.
func fairness(ctx context.Context, o Options, m *measurements) error {
	services := newServices(o.Services, o.Endpoints)
	service := services[len(services)/2]
	for e := range service.Endpoints {
		service.Endpoints[e] = cluster.WatchedAddr(e)
	}
	return withLoadedTestbed(ctx, o, services, func(_ *pipelineUnderTest, p *testbed.Probe) error {
		connections := max(o.Samples, 100) * o.Endpoints
		o.Progress(fmt.Sprintf("fairness: %d connections to %d endpoints", connections, o.Endpoints))
		where, err := p.CountArrivals(ctx, service.Addr(), connections)
		if err != nil {
			return err
		}
		counts, samples := make([]int, 0, o.Endpoints), make([]float64, 0, o.Endpoints)
		arrived := 0
		for _, addr := range service.Endpoints {
			counts, samples = append(counts, where[addr]), append(samples, float64(where[addr]))
			arrived += where[addr]
		}
		if arrived != connections {
			return fmt.Errorf("of %d connections, %d arrived at an endpoint", connections, arrived)
		}
		values := []result.Value{{Name: "connections", Unit: "1", Value: float64(connections)}}
		if o.Endpoints > 1 {
			fit, err := statistics.FitUniform(counts)
			if err != nil {
				return err
			}
			values = append(values,
				result.Value{Name: "chi-squared", Unit: "1", Value: fit.ChiSquared},
				result.Value{Name: "degrees-of-freedom", Unit: "1", Value: float64(fit.DegreesOfFreedom)},
				result.Value{Name: "p-value", Unit: "1", Value: fit.P})
		}
		m.addSamples(result.Fairness, result.Scenario{Services: o.Services, Endpoints: o.Endpoints}, "1", samples, values...)
		return nil
	})
}
