package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"fairlead.io/fairlead/bench/report"
	"fairlead.io/fairlead/bench/result"
	"fairlead.io/fairlead/bench/table"
)

func reportCommand() *cobra.Command {
	var page, pictures string
	cmd := &cobra.Command{
		Use:   "report FILE...",
		Short: "Write an HTML page or charts of benchmark results",
		Long: `Write an HTML page or charts from files written by "fairlead-bench --json" and
"fairlead-bench compare --json". The page is self-contained. The command merges several
files into one report; no measurement may be in more than one file. Without --html and
--svg, the command prints a table.`,
		Example: `  fairlead-bench report result.json --html=report.html
  fairlead-bench report native.json vm.json --html=report.html --svg=docs/images`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, files []string) error {
			merged, err := readReports(files)
			if err != nil {
				return err
			}
			if page == "" && pictures == "" {
				return table.Write(cmd.OutOrStdout(), merged)
			}
			return errors.Join(writePage(merged, page), writePictures(merged, pictures))
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&page, "html", "", "`file` for the HTML page")
	flags.StringVar(&pictures, "svg", "", "`directory` for the charts as SVG and PNG")
	_ = cmd.MarkFlagFilename("html", "html")
	_ = cmd.MarkFlagDirname("svg")
	return cmd
}

func readReports(files []string) (*result.Report, error) {
	var all []*result.Report
	for _, name := range files {
		file, err := os.Open(name)
		if err != nil {
			return nil, fmt.Errorf("read results: %w", err)
		}
		r, err := result.Read(file)
		if err = errors.Join(err, file.Close()); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		all = append(all, r)
	}
	return report.Merge(all...)
}

// writeFile creates a file and calls write with it. It does nothing if name is empty.
func writeFile(name string, write func(io.Writer) error) error {
	if name == "" {
		return nil
	}
	file, err := os.Create(name)
	if err != nil {
		return err
	}
	if err := errors.Join(write(file), file.Close()); err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	return nil
}

func writePage(r *result.Report, name string) error {
	err := writeFile(name, func(w io.Writer) error { return report.WriteHTML(w, r) })
	if err != nil {
		return fmt.Errorf("--html: %w", err)
	}
	return nil
}

func writePictures(r *result.Report, dir string) error {
	if dir == "" {
		return nil
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("--svg: %w", err)
	}
	list, err := report.Pictures(r)
	if err != nil {
		return err
	}
	for _, p := range list {
		for suffix, data := range map[string][]byte{".svg": p.SVG, ".png": p.PNG} {
			err := writeFile(filepath.Join(dir, p.Name+suffix), func(w io.Writer) error {
				_, err := w.Write(data)
				return err
			})
			if err != nil {
				return fmt.Errorf("--svg: %w", err)
			}
		}
	}
	return nil
}
