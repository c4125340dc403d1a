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

// newGateway returns a client for etcd's JSON gateway, which needs no client library. See
// https://etcd.io/docs/latest/dev-guide/api_grpc_gateway/.
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
	// The response to a read of any key has the revision in its header.
	if err := post(ctx, client, "range", map[string]any{"key": "AA=="}, &now); err != nil {
		return err
	}
	return post(ctx, client, "compaction", map[string]any{"revision": now.Header.Revision, "physical": true}, nil)
}

// dataDir is etcd's data directory, relative to the working directory of the programs.
const dataDir = "etcd"

// Backup copies etcd's data for [ControlPlane.Restore] and replaces an earlier backup. It
// stops etcd, the API server and the controller manager meanwhile.
func (cp *ControlPlane) Backup(ctx context.Context) error {
	return cp.whileEtcdStopped(ctx, "back up etcd", func(data, backup string) error {
		if err := os.RemoveAll(backup); err != nil {
			return err
		}
		return os.CopyFS(backup, os.DirFS(data))
	})
}

// Restore restores etcd's data of the last Backup, including resource versions. It stops
// etcd, the API server and the controller manager meanwhile.
func (cp *ControlPlane) Restore(ctx context.Context) error {
	return cp.whileEtcdStopped(ctx, "restore etcd", func(data, backup string) error {
		if err := os.RemoveAll(data); err != nil {
			return err
		}
		if err := os.CopyFS(data, os.DirFS(backup)); err != nil {
			return err
		}
		return os.Chmod(data, 0o700) // required by etcd
	})
}

// whileEtcdStopped calls change with the directories of the data and of the backup while no
// program is running. operation names the change in errors.
func (cp *ControlPlane) whileEtcdStopped(ctx context.Context, operation string, change func(data, backup string) error) error {
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
		return fmt.Errorf("%s: %w", operation, err)
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
	defer response.Body.Close() //nolint:errcheck // read-only
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

// putAll writes values by key, several per transaction.
func putAll(ctx context.Context, socket string, values map[string][]byte) error {
	client := newGateway(socket)
	defer client.CloseIdleConnections()
	// etcd allows 128 operations per transaction (--max-txn-ops).
	const batchSize = 100
	for keys := range slices.Chunk(slices.Sorted(maps.Keys(values)), batchSize) {
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
