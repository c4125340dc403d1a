package addons

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"helm.sh/helm/v4/pkg/chart/common"
	"helm.sh/helm/v4/pkg/chart/common/util"
	"helm.sh/helm/v4/pkg/chart/loader"
	"helm.sh/helm/v4/pkg/engine"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/yaml"

	"fairlead.io/fairlead/test/cluster/internal/images"
	"fairlead.io/fairlead/test/cluster/internal/topology"
)

// fairlead returns the objects of Fairlead's chart, with only the values that every installation
// needs, the mode, and the values of the cluster.
func fairlead(cluster *topology.Cluster) ([]*unstructured.Unstructured, error) {
	chart, err := loader.Load(cluster.Chart)
	if err != nil {
		return nil, err
	}
	values, err := chartValues(cluster)
	if err != nil {
		return nil, err
	}
	options := common.ReleaseOptions{Name: "fairlead", Namespace: "kube-system", IsInstall: true, Revision: 1}
	all, err := util.ToRenderValues(chart, values, options, nil)
	if err != nil {
		return nil, err
	}
	files, err := engine.Render(chart, all)
	if err != nil {
		return nil, err
	}
	var objects []*unstructured.Unstructured
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if !strings.HasSuffix(name, ".yaml") {
			continue
		}
		more, err := decode("\n" + files[name])
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		objects = append(objects, more...)
	}
	return objects, nil
}

func chartValues(cluster *topology.Cluster) (map[string]any, error) {
	repository, tag, _ := strings.Cut(images.Fairlead, ":")
	values := map[string]any{
		"image":     map[string]any{"repository": repository, "tag": tag},
		"apiServer": "https://" + topology.APIServer().String(),
		"config":    map[string]any{"clusterCIDR": topology.Join(topology.PodCIDRs())},
	}
	if cluster.Mode != topology.DefaultMode(topology.Fairlead) {
		values["mode"] = cluster.Mode
	}
	var changes map[string]any
	if err := yaml.Unmarshal([]byte(cluster.Values), &changes); err != nil {
		return nil, fmt.Errorf("values: %w", err)
	}
	merge(values, changes)
	return values, nil
}

// merge sets the values of changes in values.
func merge(values, changes map[string]any) {
	for key, change := range changes {
		value, isMap := values[key].(map[string]any)
		if c, ok := change.(map[string]any); ok && isMap {
			merge(value, c)
			continue
		}
		values[key] = change
	}
}
