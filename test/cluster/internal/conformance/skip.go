package conformance

import (
	_ "embed"
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"
)

//go:embed skipped.txt
var skippedText string

// Exclusion is a reason why some tests do not run.
type Exclusion struct {
	Tests     int
	Condition string
	Pattern   *regexp.Regexp
	Reason    string
}

// conditionNoSCTP is the condition of tests that run only on kernels with SCTP.
const conditionNoSCTP = "no-sctp"

// Exclusions returns the tests that a run of all tests skips. sctp reports whether the kernel has
// SCTP.
func Exclusions(sctp bool) ([]Exclusion, error) {
	all, err := parseExclusions(skippedText)
	if err != nil {
		return nil, fmt.Errorf("skipped.txt: %w", err)
	}
	var apply []Exclusion
	for _, e := range all {
		if e.Condition != conditionNoSCTP || !sctp {
			apply = append(apply, e)
		}
	}
	return apply, nil
}

func parseExclusions(text string) ([]Exclusion, error) {
	var all []Exclusion
	number := 0
	for line := range strings.Lines(text) {
		number++
		if strings.HasPrefix(line, "#") || strings.TrimSpace(line) == "" {
			continue
		}
		e, err := parseExclusion(line)
		if err != nil {
			return nil, fmt.Errorf("line %d: %w", number, err)
		}
		all = append(all, e)
	}
	return all, nil
}

// placeholder stands for an escaped separator while a line is split.
const placeholder = "\x00"

func parseExclusion(line string) (Exclusion, error) {
	const columns = 4
	fields := strings.Split(strings.ReplaceAll(line, `\|`, placeholder), "|")
	if len(fields) != columns {
		return Exclusion{}, fmt.Errorf("%d columns, want number, condition, regular expression and reason", len(fields))
	}
	for i, field := range fields {
		fields[i] = strings.ReplaceAll(strings.TrimSpace(field), placeholder, "|")
	}
	tests, err := strconv.Atoi(fields[0])
	if err != nil {
		return Exclusion{}, err
	}
	pattern, err := regexp.Compile(fields[2])
	if err != nil {
		return Exclusion{}, err
	}
	switch {
	case fields[1] != "" && fields[1] != conditionNoSCTP:
		return Exclusion{}, fmt.Errorf("condition %q, want none or %s", fields[1], conditionNoSCTP)
	case fields[3] == "":
		return Exclusion{}, errors.New("no reason")
	}
	return Exclusion{Tests: tests, Condition: fields[1], Pattern: pattern, Reason: fields[3]}, nil
}

// find returns the first exclusion that matches a test.
func find(exclusions []Exclusion, name string) *Exclusion {
	for i := range exclusions {
		if exclusions[i].Pattern.MatchString(name) {
			return &exclusions[i]
		}
	}
	return nil
}

// CheckExclusions checks the numbers of the exclusions against the names of all tests.
func CheckExclusions(exclusions []Exclusion, names []string) error {
	counts := map[*Exclusion]int{}
	for _, name := range names {
		if e := find(exclusions, name); e != nil {
			counts[e]++
		}
	}
	var errs []error
	for i := range exclusions {
		if e := &exclusions[i]; counts[e] != e.Tests {
			errs = append(errs, fmt.Errorf("skipped.txt: %s: matches %d tests, the list says %d", e.Pattern, counts[e], e.Tests))
		}
	}
	return errors.Join(errs...)
}

// CheckSkipped checks that no test skipped itself unless an exclusion gives the reason.
func CheckSkipped(exclusions []Exclusion, tests []Test) error {
	var errs []error
	for _, t := range tests {
		if t.Result == Skipped && find(exclusions, t.Name) == nil {
			errs = append(errs, fmt.Errorf("%s: the test skipped itself: %s: add it to skipped.txt with the reason, or make it run", t.Name, t.Message))
		}
	}
	return errors.Join(errs...)
}
