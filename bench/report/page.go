package report

import (
	"fmt"
	"strings"

	g "maragu.dev/gomponents"
	h "maragu.dev/gomponents/html"

	"fairlead.io/fairlead/bench/result"
	"fairlead.io/fairlead/bench/table"
)

// The page is built from functions instead of a template, so that the compiler checks it.

// node returns the page.
func (p *page) node() g.Node {
	colors := cssVariables(":root", false) + "@media screen and (prefers-color-scheme:dark){" + cssVariables(":root", true) + "}"
	return h.Doctype(h.HTML(
		h.Lang("en"),
		h.Head(
			h.Meta(h.Charset("utf-8")),
			h.Meta(h.Name("viewport"), h.Content("width=device-width, initial-scale=1")),
			h.Meta(h.Name("color-scheme"), h.Content("light dark")),
			h.TitleEl(g.Text(p.title)),
			h.StyleEl(g.Raw(colors+"\n"+pageCSS)),
		),
		h.Body(h.Main(
			h.H1(g.Text(p.title)),
			h.P(h.Class("lead"), g.Text(p.subtitle())),
			g.Map(p.environments, environment.node),
			p.methodNode(),
		)),
	))
}

func (p *page) subtitle() string {
	machines := make([]string, 0, len(p.environments))
	for _, e := range p.environments {
		machine := fmt.Sprintf("%d × %s, Linux %s", e.Machine.CPUs, e.Machine.CPU, e.Kernel)
		if e.Emulated {
			machine += " (emulated)"
		}
		machines = append(machines, machine)
	}
	return fmt.Sprintf("Fairlead %s, measured on %s, %s.", p.report.Version, p.report.Time.Format("2 January 2006"), strings.Join(machines, "; "))
}

func (p *page) methodNode() g.Node {
	return h.Section(
		h.Class("long"),
		h.H2(g.Text("Method")),
		h.P(g.Text("To repeat the measurements, run as root: "), code(p.report.Command)),
		h.Dl(g.Map(p.report.Systems, func(s result.System) g.Node {
			return g.Group{h.Dt(g.Text(styleOf(s.Name).label)), h.Dd(g.Text(s.Version), g.If(len(s.Command) > 0, g.Group{h.Br(), code(s.Command)}))}
		})),
		g.If(len(p.report.Notes) > 0, h.Ul(g.Map(p.report.Notes, func(n string) g.Node { return h.Li(g.Text(n)) }))),
	)
}

func code(command []string) g.Node { return h.Code(g.Text(strings.Join(command, " "))) }

func (e environment) node() g.Node {
	return g.Group{
		g.If(e.several, h.H2(h.Class("place"), g.Text("Environment "+e.Name))),
		g.If(e.Emulated, h.P(
			h.Class("emulated"), h.Strong(g.Text("The processor was emulated.")),
			g.Text(" Times do not apply to real machines. Ratios are unreliable, because emulation slows down programs and the kernel differently. "+
				"Do not compare these results with other environments."),
		)),
		e.keyFiguresNode(),
		g.Map(e.sections, pageSection.node),
		e.ratiosNode(),
		e.measurementsNode(),
		g.If(len(e.leftOut) > 0, h.Section(
			h.H2(g.Text("Not measured")),
			h.Ul(g.Map(e.leftOut, func(l result.LeftOut) g.Node {
				subject := styleOf(l.System).label
				if l.Measure != "" {
					subject = strings.TrimPrefix(subject+", "+string(l.Measure), ", ")
				}
				return h.Li(g.Text(strings.TrimPrefix(subject+": "+l.Reason, ": ")))
			})),
		)),
		h.Section(
			h.H2(g.Text("Environment")),
			h.Dl(
				h.Dt(g.Text("Machine")),
				h.Dd(g.Text(fmt.Sprintf("%d × %s, %s, %s of memory", e.Machine.CPUs, e.Machine.CPU, e.Machine.Architecture,
					table.Number(float64(e.Machine.MemoryBytes), "B")))),
				h.Dt(g.Text("System")), h.Dd(g.Text(strings.TrimSuffix("Linux "+e.Kernel+", "+e.OS, ", "))),
				g.If(e.APIServer != "", g.Group{
					h.Dt(g.Text("API server")), h.Dd(g.Text("kube-apiserver " + e.APIServer + ", one for each system; update times include its processing time")),
				}),
				h.Dt(g.Text("Load average at the start")), h.Dd(g.Text(fmt.Sprintf("%.2f", e.Load))),
			),
		),
	}
}

func (e environment) keyFiguresNode() g.Node {
	if len(e.keyFigures) == 0 {
		return nil
	}
	return g.Group{
		h.P(g.Text("Fairlead’s nft mode compared with kube-proxy’s nftables mode, with " + e.keyFigureScenario + ":")),
		h.Div(h.Class("claims"), g.Map(e.keyFigures, func(c keyFigure) g.Node {
			class := "claim"
			if c.worse {
				class = "claim worse"
			}
			return h.Div(
				h.Class(class),
				h.Div(h.Class("ratio"), g.Text(c.ratio+" "), h.Small(g.Text(c.comparison))),
				h.P(h.Class("what"), g.Text(c.title)),
				h.P(h.Class("how"), g.Text(c.figures), h.Br(), g.Text(c.interval)),
			)
		})),
		h.P(h.Class("lead"), g.Text("Both were measured alternately in one run. Compare results of the same run only: they depend on the machine.")),
	}
}

func (s pageSection) node() g.Node {
	return h.Section(
		h.ID(s.id), h.H2(g.Text(s.title)), h.P(g.Text(s.text)),
		g.Map(s.figures, func(f pageFigure) g.Node {
			return h.Figure(g.Raw(string(f.wide)), g.Raw(string(f.narrow)), h.FigCaption(g.Text(f.caption)))
		}),
	)
}

func (e environment) ratiosNode() g.Node {
	if len(e.ratios) == 0 {
		return nil
	}
	rows := [][]string{{"Measure", "System", "Compared with", "Services", "Ratio", "Interval"}}
	for _, r := range e.ratios {
		rows = append(rows, []string{
			measureText(r.Measure, r.Scenario) + ", " + r.Statistic, styleOf(r.Numerator).label, styleOf(r.Denominator).label,
			thousands(r.Scenario.Services), formatRatio(r.Ratio), formatRatio(r.Low) + " – " + formatRatio(r.High),
		})
	}
	return h.Section(
		h.Class("long"),
		h.H2(g.Text("Ratios")),
		h.P(g.Text(fmt.Sprintf("Ratio of the system's value to the value of the system it is compared with, and its %.0f %% confidence interval (%s). "+
			"A ratio above 1 means that Fairlead is better, a ratio below 1 that it is worse. If the interval contains 1, the difference is not significant.", 100*e.ratios[0].Confidence, e.ratios[0].Method))),
		newTable(rows, 3),
	)
}

func (e environment) measurementsNode() g.Node {
	rows := [][]string{{"Measure", "System", "Services", "p50", "p90", "p99", "max", "n"}}
	for _, m := range e.measured {
		if d := m.Distribution; d != nil {
			rows = append(rows, []string{
				measureText(m.Measure, m.Scenario), styleOf(m.System).label, thousands(m.Scenario.Services), table.Number(d.P50, m.Unit), table.Number(d.P90, m.Unit),
				table.Number(d.P99, m.Unit), table.Number(d.Max, m.Unit), fmt.Sprint(d.N),
			})
		}
	}
	if len(rows) == 1 {
		return nil
	}
	return h.Section(h.Class("long"), h.Details(h.Summary(g.Text("All measurements")), newTable(rows, 2)))
}

// measureText returns the measure and scenario with the names used in the file of results.
func measureText(m result.Measure, s result.Scenario) string {
	text := string(m)
	if s.Change != "" {
		text += ", " + string(s.Change)
	}
	if s.Destination != "" {
		text += ", " + string(s.Destination)
	}
	if s.Rate > 0 {
		text += fmt.Sprintf(", %g/s", s.Rate)
	}
	return text
}

// newTable returns a table. The first row contains the headings. All columns except the first
// textColumns contain numbers.
func newTable(rows [][]string, textColumns int) g.Node {
	line := func(row []string, cell func(...g.Node) g.Node) g.Node {
		cells := make(g.Group, 0, len(row))
		for i, text := range row {
			cells = append(cells, cell(g.If(i >= textColumns, h.Class("n")), g.Text(text)))
		}
		return h.Tr(cells...)
	}
	return h.Div(h.Class("scroll"), h.Table(
		line(rows[0], h.Th),
		g.Map(rows[1:], func(row []string) g.Node { return line(row, h.Td) }),
	))
}
