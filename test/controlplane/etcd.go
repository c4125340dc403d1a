package controlplane

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
)

// newGateway returns a client of etcd's JSON gateway, for which no library is
// needed. See https://etcd.io/docs/latest/dev-guide/api_grpc_gateway/.
func newGateway(socket string) *http.Client {
	return &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}}
}

func compact(ctx context.Context, socket string) error {
	client := newGateway(socket)
	defer client.CloseIdleConnections()

	var now struct {
		Header struct {
			Revision string `json:"revision"`
		} `json:"header"`
	}
	// Any key will do: the answer's header has the revision.
	if err := post(ctx, client, "range", map[string]any{"key": "AA=="}, &now); err != nil {
		return err
	}
	return post(ctx, client, "compaction", map[string]any{"revision": now.Header.Revision, "physical": true}, nil)
}

// dataDir is where etcd has its data, in the folder that the programs run in.
const dataDir = "etcd"

// Backup copies etcd's data, for [ControlPlane.Restore]. etcd, the API server and
// the controller manager are stopped meanwhile. Another Backup replaces the first.
func (cp *ControlPlane) Backup(ctx context.Context) error {
	return cp.whileEtcdStopped(ctx, "back etcd up", func(data, backup string) error {
		if err := os.RemoveAll(backup); err != nil {
			return err
		}
		return os.CopyFS(backup, os.DirFS(data))
	})
}

// Restore makes etcd's data what it was at the last Backup, resource versions
// included. etcd, the API server and the controller manager are stopped meanwhile.
func (cp *ControlPlane) Restore(ctx context.Context) error {
	return cp.whileEtcdStopped(ctx, "restore etcd", func(data, backup string) error {
		if err := os.RemoveAll(data); err != nil {
			return err
		}
		if err := os.CopyFS(data, os.DirFS(backup)); err != nil {
			return err
		}
		return os.Chmod(data, 0o700) // as etcd wants it
	})
}

// whileEtcdStopped calls change with the folders of the data and of the backup while
// no program runs.
func (cp *ControlPlane) whileEtcdStopped(ctx context.Context, what string, change func(data, backup string) error) error {
	if err := cp.StopAPIServer(); err != nil {
		return err
	}
	cp.mu.Lock()
	data := filepath.Join(cp.dir.path, dataDir)
	err := cp.etcd.stop()
	if err == nil {
		err = change(data, data+".backup")
	}
	if err == nil {
		err = cp.startEtcd()
	}
	cp.mu.Unlock()
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return cp.StartAPIServer(ctx)
}

func post(ctx context.Context, client *http.Client, call string, body, answer any) error {
	data, err := json.Marshal(body)
	if err != nil {
		return err
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://etcd/v3/kv/"+call, bytes.NewReader(data))
	if err != nil {
		return err
	}
	response, err := client.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close() //nolint:errcheck // only read from
	if data, err = io.ReadAll(response.Body); err != nil {
		return err
	}
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s: %s", call, response.Status, data)
	}
	if answer == nil {
		return nil
	}
	return json.Unmarshal(data, answer)
}

// putAll writes values by their keys, some in one transaction.
func putAll(ctx context.Context, socket string, values map[string][]byte) error {
	client := newGateway(socket)
	defer client.CloseIdleConnections()
	// Of 128 that etcd takes, --max-txn-ops.
	const atOnce = 100
	for keys := range slices.Chunk(slices.Sorted(maps.Keys(values)), atOnce) {
		operations := make([]any, 0, len(keys))
		for _, key := range keys {
			operations = append(operations, map[string]any{"requestPut": map[string][]byte{"key": []byte(key), "value": values[key]}})
		}
		if err := post(ctx, client, "txn", map[string]any{"success": operations}, nil); err != nil {
			return err
		}
	}
	return nil
}
