// Package report collects the state of a node into one archive, for bug reports. The
// archive contains no credentials: it has no contents of kubeconfig files, and [Redact] removes
// credentials from all files.
package report

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"
)

// Limits of a report.
const (
	// partTimeout bounds the time of one part. A part that takes longer is left out.
	partTimeout = 15 * time.Second
	// maxFileBytes bounds the size of a file before compression. The rest of the file is left out.
	maxFileBytes = 32 << 20
)

// Part is a file of the report.
type Part struct {
	// Name is the name of the file.
	Name string
	// Collect returns the content. It may return a part of it together with an error.
	Collect func(ctx context.Context) ([]byte, error)
}

// Summary describes the result of [Write].
type Summary struct {
	Time  time.Time     `json:"time"`
	Files []FileSummary `json:"files"`
}

// FileSummary describes a file of the report.
type FileSummary struct {
	Name  string `json:"name"`
	Bytes int    `json:"bytes"`
	// Error says why the file, or a part of it, is missing.
	Error           string  `json:"error,omitempty"`
	DurationSeconds float64 `json:"durationSeconds"`
}

// Missing returns an error that names the files that are not complete, nil if all are.
func (s Summary) Missing() error {
	var errs []error
	for _, f := range s.Files {
		if f.Error != "" {
			errs = append(errs, fmt.Errorf("%s: %s", f.Name, f.Error))
		}
	}
	return errors.Join(errs...)
}

// Write collects all parts, one after the other, and writes them to w as a compressed tar archive.
// All names begin with the folder. The last file, report.json, is the Summary. The error says that
// the archive could not be written; see [Summary.Missing] for parts that failed.
func Write(ctx context.Context, w io.Writer, folder string, parts []Part) (Summary, error) {
	summary := Summary{Time: time.Now().UTC()}
	zipped := gzip.NewWriter(w)
	archive := tar.NewWriter(zipped)
	add := func(name string, content []byte) error {
		err := archive.WriteHeader(&tar.Header{
			Name: folder + "/" + name, Mode: 0o600, Size: int64(len(content)), ModTime: summary.Time, Format: tar.FormatPAX,
		})
		if err != nil {
			return fmt.Errorf("write %s: %w", name, err)
		}
		if _, err := archive.Write(content); err != nil {
			return fmt.Errorf("write %s: %w", name, err)
		}
		return nil
	}
	for _, p := range parts {
		start := time.Now()
		content, err := collect(ctx, p)
		if len(content) > maxFileBytes {
			content = content[:maxFileBytes]
			err = errors.Join(err, fmt.Errorf("only the first %d MiB are in the report", maxFileBytes>>20))
		}
		content = Redact(content)
		file := FileSummary{Name: p.Name, Bytes: len(content), DurationSeconds: time.Since(start).Seconds()}
		if err != nil {
			file.Error = string(Redact([]byte(err.Error())))
		}
		summary.Files = append(summary.Files, file)
		if len(content) > 0 {
			if err := add(p.Name, content); err != nil {
				return summary, err
			}
		}
	}
	text, err := marshal(summary)
	if err != nil {
		return summary, err
	}
	if err := add("report.json", text); err != nil {
		return summary, err
	}
	if err := errors.Join(archive.Close(), zipped.Close()); err != nil {
		return summary, fmt.Errorf("write the archive: %w", err)
	}
	return summary, nil
}

// collect runs a part. It does not wait for a part that ignores the end of its context.
func collect(ctx context.Context, p Part) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, partTimeout)
	defer cancel()
	type result struct {
		content []byte
		err     error
	}
	results := make(chan result, 1)
	go func() {
		content, err := p.Collect(ctx)
		results <- result{content, err}
	}()
	select {
	case r := <-results:
		return r.content, r.err
	case <-ctx.Done():
		return nil, fmt.Errorf("no result within %s: %w", partTimeout, ctx.Err())
	}
}

// marshal returns indented JSON with a line end, without the escapes for HTML.
func marshal(value any) ([]byte, error) {
	var buffer bytes.Buffer
	encoder := json.NewEncoder(&buffer)
	encoder.SetEscapeHTML(false)
	encoder.SetIndent("", "  ")
	err := encoder.Encode(value)
	return buffer.Bytes(), err
}

// marshalLines returns one line of JSON for each value.
func marshalLines[T any](buffer *bytes.Buffer, values []T) error {
	encoder := json.NewEncoder(buffer)
	encoder.SetEscapeHTML(false)
	for _, v := range values {
		if err := encoder.Encode(v); err != nil {
			return err
		}
	}
	return nil
}
