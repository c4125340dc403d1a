package top

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
)

// Order is the order of Services and of their endpoints.
type Order string

// Orders. Equal numbers are sorted by name.
const (
	ByRate  Order = "rate"  // connections per second, highest first
	ByTotal Order = "total" // connections since the start, highest first
	ByName  Order = "name"
)

// Orders returns all orders.
func Orders() []Order { return []Order{ByRate, ByTotal, ByName} }

// Sort sorts Services and their endpoints.
func (s *Sample) Sort(o Order) {
	compare := func(a, b Numbers) int {
		switch o {
		case ByRate:
			return cmp.Or(cmp.Compare(b.PerSecond, a.PerSecond), cmp.Compare(b.Total, a.Total))
		case ByTotal:
			return cmp.Compare(b.Total, a.Total)
		default:
			return 0
		}
	}
	slices.SortStableFunc(s.Services, func(a, b Service) int {
		return cmp.Or(compare(a.Numbers, b.Numbers), strings.Compare(a.FullName(), b.FullName()))
	})
	for _, service := range s.Services {
		slices.SortStableFunc(service.Endpoints, func(a, b Endpoint) int {
			return cmp.Or(compare(a.Numbers, b.Numbers), strings.Compare(a.Address, b.Address))
		})
	}
}

// Filter removes the Services whose full name does not contain a text.
func (s *Sample) Filter(text string) {
	s.Services = slices.DeleteFunc(s.Services, func(service Service) bool { return !strings.Contains(service.FullName(), text) })
}

// WriteJSON writes the sample as one line.
func (s *Sample) WriteJSON(w io.Writer) error {
	if err := json.NewEncoder(w).Encode(s); err != nil {
		return fmt.Errorf("write the sample: %w", err)
	}
	return nil
}

// WriteTable writes the sample as a table, with a line for each endpoint if endpoints is true.
func (s *Sample) WriteTable(w io.Writer, endpoints bool) error {
	table := tabwriter.NewWriter(w, 6, 4, 3, ' ', 0)
	for _, line := range s.lines(func(*Service) bool { return endpoints }) {
		if _, err := fmt.Fprintln(table, strings.Join(line.cells, "\t")); err != nil {
			return fmt.Errorf("write the sample: %w", err)
		}
	}
	if err := table.Flush(); err != nil {
		return fmt.Errorf("write the sample: %w", err)
	}
	if s.Lost > 0 {
		if _, err := fmt.Fprintln(w, s.lostText()); err != nil {
			return fmt.Errorf("write the sample: %w", err)
		}
	}
	return nil
}

func (s *Sample) lostText() string {
	return fmt.Sprintf("%d connections came too fast to be counted by Service: the numbers are lower bounds", s.Lost)
}

// line is a line of the table. service is nil for the heading and for an endpoint.
type line struct {
	cells   []string
	service *Service
}

// lines returns the heading, and a line for each Service, followed by lines of its endpoints if
// expanded returns true.
func (s *Sample) lines(expanded func(*Service) bool) []line {
	active := slices.ContainsFunc(s.Services, func(service Service) bool { return service.Active != nil })
	heading := []string{"SERVICE", "PROTOCOL", "ENDPOINT", "CONN/S", "CONNECTIONS"}
	if active {
		heading = append(heading, "ACTIVE")
	}
	lines := []line{{cells: heading}}
	bound := ""
	if s.Lost > 0 {
		bound = "≥"
	}
	numbers := func(n Numbers) []string {
		cells := []string{bound + strconv.FormatFloat(n.PerSecond, 'f', 1, 64), strconv.FormatUint(n.Total, 10)}
		if n.Active != nil {
			cells = append(cells, strconv.Itoa(*n.Active))
		}
		return cells
	}
	for i := range s.Services {
		service := &s.Services[i]
		name := []string{service.FullName(), service.Protocol}
		lines = append(lines, line{append(append(slices.Clone(name), fmt.Sprintf("(%d)", len(service.Endpoints))), numbers(service.Numbers)...), service})
		if !expanded(service) {
			continue
		}
		for _, e := range service.Endpoints {
			lines = append(lines, line{cells: append(append(slices.Clone(name), e.Address), numbers(e.Numbers)...)})
		}
	}
	return lines
}
