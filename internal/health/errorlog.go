package health

import (
	"log"
	"log/slog"
	"strings"
	"sync"
	"time"

	"fairlead.io/fairlead/internal/logrepeat"
)

// maxMessages bounds the number of net/http messages that are limited separately.
const maxMessages = 16

// errorLog forwards the log messages of net/http to a [slog.Logger]. Clients cause most of
// them, so package logrepeat limits how often each message is logged.
type errorLog struct {
	log *slog.Logger

	mu       sync.Mutex
	messages map[string]*logrepeat.Limiter
}

func newErrorLog(logger *slog.Logger) *log.Logger {
	return log.New(&errorLog{log: logger, messages: map[string]*logrepeat.Limiter{}}, "", 0)
}

// Write logs one message.
func (e *errorLog) Write(p []byte) (int, error) {
	text := strings.TrimSpace(string(p))
	occurrences, ok := e.limiter(text).Allow(time.Now())
	if !ok {
		return len(p), nil
	}
	if strings.HasPrefix(text, "http: panic serving") {
		e.log.Error("HTTP handler panicked: this is a bug", "error", text, "occurrences", occurrences)
	} else {
		e.log.Warn("HTTP server error", "error", text, "occurrences", occurrences)
	}
	return len(p), nil
}

// limiter returns the limiter of a message. The first three words identify the message;
// client addresses come later.
func (e *errorLog) limiter(text string) *logrepeat.Limiter {
	const words = 3
	message := ""
	for word := range strings.FieldsSeq(text) {
		message += word + " "
		if strings.Count(message, " ") == words {
			break
		}
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.messages[message] == nil && len(e.messages) >= maxMessages {
		message = ""
	}
	if e.messages[message] == nil {
		e.messages[message] = &logrepeat.Limiter{}
	}
	return e.messages[message]
}
