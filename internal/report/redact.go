package report

import (
	"bytes"
	"regexp"
	"slices"
)

// Redact replaces credentials in a text: private keys and certificates, JSON web tokens, bearer
// tokens, and the user of a URL. Reports contain no credentials in the first place; Redact also
// covers values that an operator put in the wrong place.
func Redact(text []byte) []byte {
	if bytes.Contains(text, []byte("-----BEGIN ")) {
		text = regexp.MustCompile(`(?s)-----BEGIN [A-Z0-9 ]+-----.*?(-----END [A-Z0-9 ]+-----|\z)`).ReplaceAll(text, []byte(removed))
	}
	for _, r := range redactions() {
		text = r.apply(text)
	}
	return text
}

// removed replaces a credential.
const removed = "REDACTED"

// redaction replaces a pattern within lines.
type redaction struct {
	// hints are texts of which each match contains one. Looking for them is much faster than
	// looking for the pattern.
	hints       []string
	pattern     *regexp.Regexp
	replacement string
}

func redactions() []redaction {
	return []redaction{
		{[]string{"eyJ"}, regexp.MustCompile(`\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]*)?`), removed},
		{[]string{"earer ", "asic "}, regexp.MustCompile(`\b([Bb]earer|[Bb]asic) +[A-Za-z0-9._~+/=-]{8,}`), "$1 " + removed},
		{[]string{"://"}, regexp.MustCompile(`(://)[^/\s"'@?#]+@`), "${1}" + removed + "@"},
		{
			[]string{"oken", "assword", "-key-data", "-certificate-data", "ecret"},
			regexp.MustCompile(`\b("?(?:[Tt]oken|[Pp]assword|client-key-data|client-certificate-data|[Ss]ecret)"?\s*[:=]\s*"?)[^\s",}]+`), "${1}" + removed,
		},
	}
}

func (r redaction) isIn(text []byte) bool {
	return slices.ContainsFunc(r.hints, func(hint string) bool { return bytes.Contains(text, []byte(hint)) })
}

func (r redaction) apply(text []byte) []byte {
	if !r.isIn(text) {
		return text
	}
	result := make([]byte, 0, len(text))
	for line := range bytes.Lines(text) {
		if r.isIn(line) {
			line = r.pattern.ReplaceAll(line, []byte(r.replacement))
		}
		result = append(result, line...)
	}
	return result
}
