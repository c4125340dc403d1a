package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"fairlead.io/fairlead/internal/config"
	"fairlead.io/fairlead/internal/nodesettings"
	"fairlead.io/fairlead/internal/preflight"
	"fairlead.io/fairlead/source/apiserver"
)

// errCheckFailed is returned if a finding has the status failed.
var errCheckFailed = errors.New("a check has failed")

func checkCommand() *cobra.Command {
	var flags config.Flags
	var output string
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Check whether this node can run Fairlead, or is served by it",
		Long: `Check whether this node can run Fairlead and, while Fairlead runs, whether it
serves the node. The command asks the kernel and the API server. It changes no
settings; it programs an example in a network namespace of its own, for which
the kernel may load modules. Run it as root in the node's network namespace.

It accepts the flags of "fairlead run", so that it can check the same
configuration. The exit code is 1 if a check has failed. Warnings do not change
the exit code.`,
		Example: `  fairlead check --config=/var/lib/kube-proxy/config.conf
  fairlead check --kubeconfig=/etc/fairlead/kubeconfig.conf --mode=ipvs -o json
  kubectl -n kube-system exec POD -- /fairlead check --config=/var/lib/kube-proxy/config.conf`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if output != outputTable && output != outputJSON {
				return fmt.Errorf("--output: unknown format %q: use table or json", output)
			}
			c, _, err := config.Load(flags)
			if err != nil {
				return err
			}
			report := preflight.Run(cmd.Context(), checkOptions(c))
			write := report.WriteTable
			if output == outputJSON {
				write = report.WriteJSON
			}
			if err := write(cmd.OutOrStdout()); err != nil {
				return err
			}
			if report.Failed() {
				return errCheckFailed
			}
			return nil
		},
	}
	flags = config.AddFlags(cmd)
	hideUnusedFlags(cmd, "healthz-bind-address", "metrics-bind-address")
	cmd.Flags().StringVarP(&output, "output", "o", outputTable, "format of the findings: table or json")
	_ = cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{outputTable, outputJSON}, cobra.ShellCompDirectiveNoFileComp)) // the flag exists
	return cmd
}

const (
	outputTable = "table"
	outputJSON  = "json"
)

// hideUnusedFlags hides the flags of fairlead run except for the most important ones and the names in
// also. They are accepted, so that the arguments of a DaemonSet can be used.
func hideUnusedFlags(cmd *cobra.Command, also ...string) {
	cmd.Flags().VisitAll(func(f *pflag.Flag) {
		switch f.Name {
		case "mode", "proxy-mode", "config", "kubeconfig", "master", "hostname-override", "manifests", "cluster-cidr", "detect-local-mode":
		default:
			f.Hidden = f.Hidden || !strings.HasPrefix(f.Name, "conntrack-") && !slices.Contains(also, f.Name)
		}
	})
}

func checkOptions(c config.Config) preflight.Options {
	o := preflight.Options{
		Mode: c.Mode, Values: c.Values, HealthzAddress: c.HealthzAddress, MetricsAddress: c.MetricsAddress, Conntrack: c.Conntrack,
		FlowOffload: c.FlowOffload.Enabled,
		PodNetwork:  nodesettings.PodNetwork{CIDRs: c.Tracker.DetectLocal.ClusterCIDRs, Bridge: c.Tracker.DetectLocal.Interface},
	}
	if c.Manifests == "" {
		o.API = func(ctx context.Context, r *preflight.Report) { checkAPIServer(ctx, r, c) }
	}
	return o
}

// checkAPIServer checks that the API server answers, grants the permissions and has the Node.
func checkAPIServer(ctx context.Context, r *preflight.Report, c config.Config) {
	const check = "api-server"
	client, err := clientConfig(c.API)
	if err != nil {
		r.Add(check, preflight.Failed, "set --kubeconfig or --config", "%v", err)
		return
	}
	probe, err := apiserver.NewProbe(client)
	if err != nil {
		r.Add(check, preflight.Failed, "correct the kubeconfig", "%s: %v", sourceName(c), err)
		return
	}
	apiVersion, took, err := probe.Version(ctx)
	if err != nil {
		r.Add(check, preflight.Failed, "set the server in the kubeconfig to an address that works without Services, and check the credentials",
			"%s does not answer: %v", probe.Server(), err)
		return
	}
	r.Add(check, preflight.OK, "", "%s has version %s and answered in %s", probe.Server(), apiVersion, took.Round(time.Millisecond))
	checkAccess(ctx, r, probe)
	found, err := probe.HasNode(ctx, c.Tracker.NodeName)
	switch {
	case err != nil:
		r.Add("node", preflight.Warning, "", "cannot read Node %s: %v", c.Tracker.NodeName, err)
	case !found:
		r.Add("node", preflight.Failed, "set --hostname-override to the name in `kubectl get nodes`",
			"the cluster has no Node %s: local endpoints and topology hints are unknown", c.Tracker.NodeName)
	default:
		r.Add("node", preflight.OK, "", "the cluster has Node %s", c.Tracker.NodeName)
	}
}

func checkAccess(ctx context.Context, r *preflight.Report, probe *apiserver.Probe) {
	const check, fix = "rbac", "kubectl apply -f deploy/rbac.yaml, or correct its subject"
	all, err := probe.Access(ctx)
	if err != nil {
		r.Add(check, preflight.Failed, "check the credentials in the kubeconfig", "%v", err)
		return
	}
	denied := map[bool][]string{}
	for _, a := range all {
		if !a.Allowed {
			denied[a.Required] = append(denied[a.Required], a.String())
		}
	}
	if list := denied[true]; len(list) > 0 {
		r.Add(check, preflight.Failed, fix, "no permission to %s: Services cannot be programmed", strings.Join(list, ", "))
	}
	if list := denied[false]; len(list) > 0 {
		r.Add(check, preflight.Warning, fix, "no permission to %s: Fairlead works without it, but with less", strings.Join(list, ", "))
	}
	if len(denied) == 0 {
		r.Add(check, preflight.OK, "", "all %d permissions are granted", len(all))
	}
}
