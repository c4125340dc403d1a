package top

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"

	tea "charm.land/bubbletea/v2"
)

// ScreenOptions configure [Monitor.RunScreen].
type ScreenOptions struct {
	Input  io.Reader
	Output io.Writer
	Order  Order
	Filter string
	// Active counts connections that have not ended from the start.
	Active bool
}

// RunScreen shows the samples in a terminal until the user quits or ctx is done.
func (m *Monitor) RunScreen(ctx context.Context, o ScreenOptions) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	m.CountActive(o.Active)
	p := tea.NewProgram(newScreen(o, m.CountActive), tea.WithContext(ctx), tea.WithInput(o.Input), tea.WithOutput(o.Output), tea.WithoutSignalHandler())
	result := make(chan error, 1)
	go func() {
		err := m.Run(ctx, func(s Sample) bool {
			p.Send(s)
			return true
		})
		p.Quit()
		result <- err
	}()
	_, err := p.Run()
	cancel()
	failure := <-result
	switch {
	case failure != nil && !errors.Is(failure, context.Canceled):
		return failure
	case err != nil && !errors.Is(err, tea.ErrProgramKilled):
		return fmt.Errorf("show the connections: %w", err)
	}
	return nil
}

// screen is the model of the terminal's content.
type screen struct {
	sample        Sample
	order         Order
	filter        string
	filtering     bool // the user types the filter
	paused        bool
	active        bool
	setActive     func(bool)
	expanded      map[string]bool // by rowKey
	selected      int             // index of a Service
	offset        int             // first visible line
	width, height int
}

var _ tea.Model = (*screen)(nil)

func newScreen(o ScreenOptions, setActive func(bool)) *screen {
	return &screen{order: o.Order, filter: o.Filter, active: o.Active, setActive: setActive, expanded: map[string]bool{}, width: 80, height: 24}
}

// rowKey identifies a Service across samples.
func rowKey(s *Service) string { return s.FullName() + " " + s.Protocol }

// Init implements [tea.Model].
func (*screen) Init() tea.Cmd { return nil }

// Update implements [tea.Model].
func (s *screen) Update(msg tea.Msg) (tea.Model, tea.Cmd) {
	switch msg := msg.(type) {
	case tea.WindowSizeMsg:
		s.width, s.height = msg.Width, msg.Height
	case Sample:
		if !s.paused {
			s.setSample(msg)
		}
	case tea.KeyPressMsg:
		if s.filtering {
			s.editFilter(msg)
			return s, nil
		}
		return s, s.press(msg.String())
	}
	return s, nil
}

// setSample shows a sample. The selection stays at its Service.
func (s *screen) setSample(sample Sample) {
	key := ""
	if visible := s.visible(); s.selected < len(visible.Services) {
		key = rowKey(&visible.Services[s.selected])
	}
	s.sample = sample
	s.selectKey(key)
}

// selectKey selects a Service if it is visible, and otherwise a line that exists.
func (s *screen) selectKey(key string) {
	visible := s.visible()
	if i := slices.IndexFunc(visible.Services, func(service Service) bool { return rowKey(&service) == key }); i >= 0 && s.selected > 0 {
		s.selected = i
	}
	s.selected = max(0, min(s.selected, len(visible.Services)-1))
}

// visible returns the filtered and sorted sample.
func (s *screen) visible() Sample {
	sample := s.sample
	sample.Services = slices.Clone(sample.Services)
	sample.Filter(s.filter)
	sample.Sort(s.order)
	return sample
}

func (s *screen) editFilter(msg tea.KeyPressMsg) {
	switch msg.String() {
	case "enter":
		s.filtering = false
	case "esc", "ctrl+c":
		s.filtering, s.filter = false, ""
	case "backspace":
		if n := len(s.filter); n > 0 {
			s.filter = s.filter[:n-1]
		}
	default:
		s.filter += msg.Text
	}
	s.selected, s.offset = 0, 0
}

func (s *screen) press(key string) tea.Cmd {
	visible := s.visible()
	switch key {
	case "q", "ctrl+c":
		return tea.Quit
	case "up", "k":
		s.selected = max(0, s.selected-1)
	case "down", "j":
		s.selected = max(0, min(len(visible.Services)-1, s.selected+1))
	case "home", "g":
		s.selected = 0
	case "end", "G":
		s.selected = max(0, len(visible.Services)-1)
	case "enter", "space":
		if s.selected < len(visible.Services) {
			row := rowKey(&visible.Services[s.selected])
			s.expanded[row] = !s.expanded[row]
		}
	case "e":
		expand := slices.ContainsFunc(visible.Services, func(service Service) bool { return !s.expanded[rowKey(&service)] })
		for i := range visible.Services {
			s.expanded[rowKey(&visible.Services[i])] = expand
		}
	case "s":
		orders := Orders()
		s.order = orders[(slices.Index(orders, s.order)+1)%len(orders)]
	case "/":
		s.filtering = true
	case "a":
		s.active = !s.active
		s.setActive(s.active)
	case "p":
		s.paused = !s.paused
	}
	return nil
}

// View implements [tea.Model].
func (s *screen) View() tea.View {
	sample := s.visible()
	lines, selectedLine := s.tableLines(&sample)
	title := fmt.Sprintf("connections per second: %.1f, Services: %d, sorted by %s", totalRate(&sample), len(sample.Services), s.order)
	if s.paused {
		title += ", paused"
	}
	if s.filter != "" || s.filtering {
		title += ", filter: " + s.filter
	}
	if sample.Lost > 0 {
		title = sample.lostText()
	}
	help := "q quit  s sort  / filter  enter endpoints  e all endpoints  a active  p pause"
	if s.filtering {
		help = "enter apply  esc clear"
	}
	const frame = 3 // title, heading and help
	rows := max(1, s.height-frame)
	heading, body := lines[0], lines[1:]
	if selectedLine < s.offset {
		s.offset = selectedLine
	}
	if selectedLine >= s.offset+rows {
		s.offset = selectedLine - rows + 1
	}
	s.offset = max(0, min(s.offset, len(body)-rows))
	body = body[s.offset:min(len(body), s.offset+rows)]
	content := []string{title, heading}
	for i, text := range body {
		if i+s.offset == selectedLine {
			text = "\x1b[7m" + s.fit(text) + "\x1b[0m"
		}
		content = append(content, text)
	}
	if len(body) == 0 {
		content = append(content, "no connections to Services so far")
	}
	for len(content) < rows+frame-1 {
		content = append(content, "")
	}
	content = append(content, help)
	for i, text := range content {
		if !strings.HasPrefix(text, "\x1b") {
			content[i] = s.fit(text)
		}
	}
	view := tea.NewView(strings.Join(content, "\n"))
	view.AltScreen = true
	return view
}

// fit cuts a text at the width of the terminal.
func (s *screen) fit(text string) string {
	runes := []rune(text)
	return string(runes[:min(len(runes), s.width)])
}

// tableLines returns the aligned lines, and the index of the selected one after the heading.
func (s *screen) tableLines(sample *Sample) (lines []string, selected int) {
	var text strings.Builder
	table := tabwriter.NewWriter(&text, 6, 4, 2, ' ', 0)
	services := 0
	for i, l := range sample.lines(func(service *Service) bool { return s.expanded[rowKey(service)] }) {
		if l.service != nil {
			if services == s.selected {
				selected = i - 1
			}
			services++
		} else if i > 0 {
			l.cells[0], l.cells[1] = "", ""
		}
		_, _ = fmt.Fprintln(table, strings.Join(l.cells, "\t")) // a Builder returns no errors
	}
	_ = table.Flush()
	return strings.Split(strings.TrimSuffix(text.String(), "\n"), "\n"), selected
}

func totalRate(sample *Sample) float64 {
	sum := 0.0
	for i := range sample.Services {
		sum += sample.Services[i].PerSecond
	}
	return sum
}
