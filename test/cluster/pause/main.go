// Program pause is the first process of a PID namespace. It reaps orphans, and starts a program
// if it has arguments:
//
//	pause [PROGRAM [ARGUMENT...]]
//
// It ends with the program, and on SIGTERM or SIGINT. The kernel then kills all other processes of
// the namespace. Without arguments, it is also the sandbox process of pods. It has no dependencies,
// so that its memory use is small.
package main

import (
	"fmt"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGCHLD, syscall.SIGTERM, syscall.SIGINT)
	child := 0
	if args := os.Args[1:]; len(args) > 0 {
		var err error
		child, err = syscall.ForkExec(args[0], args, &syscall.ProcAttr{Env: os.Environ(), Files: []uintptr{0, 1, 2}})
		if err != nil {
			fmt.Fprintf(os.Stderr, "pause: start %s: %v\n", args[0], err)
			os.Exit(1)
		}
	}
	for s := range signals {
		if s != syscall.SIGCHLD {
			os.Exit(0)
		}
		if status, ended := reap(child); ended {
			os.Exit(status)
		}
	}
}

// reap waits for all processes that have ended. It reports whether child is one of them, and the
// exit status that a shell would report.
func reap(child int) (status int, ended bool) {
	const signaled = 128
	for {
		var s syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &s, syscall.WNOHANG, nil)
		if err == syscall.EINTR {
			continue
		}
		if err != nil || pid <= 0 {
			return status, ended
		}
		if pid != child || child == 0 {
			continue
		}
		ended, status = true, s.ExitStatus()
		if s.Signaled() {
			status = signaled + int(s.Signal())
		}
	}
}
