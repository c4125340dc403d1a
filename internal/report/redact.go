package report

import "regexp"

// Redact replaces credentials in a text: private keys and certificates, JSON web tokens, bearer
// tokens, and the user of a URL. Reports contain no credentials in the first place; Redact also
// covers values that an operator put in the wrong place.
func Redact(text []byte) []byte {
	for _, r := range redactions() {
		text = r.pattern.ReplaceAll(text, []byte(r.replacement))
	}
	return text
}

type redaction struct {
	pattern     *regexp.Regexp
	replacement string
}

func redactions() []redaction {
	const removed = "REDACTED"
	return []redaction{
		{regexp.MustCompile(`(?s)-----BEGIN [A-Z0-9 ]+-----.*?(-----END [A-Z0-9 ]+-----|\z)`), removed},
		{regexp.MustCompile(`\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]*)?`), removed},
		{regexp.MustCompile(`(?i)\b(bearer|basic) +[A-Za-z0-9._~+/=-]{8,}`), "$1 " + removed},
		{regexp.MustCompile(`(?i)\b([a-z][a-z0-9+.-]*://)[^/\s"'@?#]+@`), "${1}" + removed + "@"},
		{regexp.MustCompile(`(?i)("?(?:token|password|client-key-data|client-certificate-data|secret)"?\s*[:=]\s*"?)[^\s",}]+`), "${1}" + removed},
	}
}
