package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"time"
)

// load is what is asked for: rate*seconds streamed chats, each at its own moment, whatever becomes of the others.
type load struct {
	url       string
	key       string
	body      []byte
	expected  string
	rate      float64
	seconds   float64
	patience  time.Duration
	gapsFrom  float64
	gapsUntil float64
	client    *http.Client
}

// answer is what became of one request, in seconds from the moment that it was due.
type answer struct {
	first   float64
	whole   float64
	gaps    []float64
	problem string
}

// report is printed as one JSON line.
type report struct {
	Sent    int            `json:"sent"`
	Seconds float64        `json:"seconds"`
	First   []float64      `json:"first"`
	Whole   []float64      `json:"whole"`
	Gaps    []float64      `json:"gaps"`
	Errors  map[string]int `json:"errors"`
}

func runLoad(arguments []string) error {
	asked := parsed(arguments)
	interrupted, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	told := asked.run(interrupted)
	if interrupted.Err() != nil {
		return errors.New("interrupted")
	}
	return json.NewEncoder(os.Stdout).Encode(told)
}

func parsed(arguments []string) load {
	var asked load
	flags := flag.NewFlagSet("load", flag.ExitOnError)
	flags.StringVar(&asked.url, "url", "", "base address, up to and including /v1")
	flags.StringVar(&asked.key, "key", "none", "bearer")
	flags.Float64Var(&asked.rate, "rate", 10, "requests a second")
	flags.Float64Var(&asked.seconds, "seconds", 10, "how long requests are begun")
	flags.DurationVar(&asked.patience, "patience", 30*time.Second, "for one request")
	flags.Float64Var(&asked.gapsFrom, "gaps-from", 0, "gaps between events count from this second on")
	flags.Float64Var(&asked.gapsUntil, "gaps-until", 0, "and until this one")
	model := flags.String("model", "bench", "model")
	tokens := flags.Int("tokens", 20, "tokens of each answer")
	extra := flags.String("extra", "{}", "further fields of the body, as a JSON object")
	flags.Parse(arguments)
	asked.body = body(*model, *tokens, *extra)
	asked.expected = text(*tokens)
	transport := &http.Transport{MaxIdleConns: 4096, MaxIdleConnsPerHost: 4096, DisableCompression: true, IdleConnTimeout: time.Minute}
	asked.client = &http.Client{Transport: transport}
	return asked
}

func body(model string, tokens int, extra string) []byte {
	fields := map[string]any{
		"model":          model,
		"max_tokens":     tokens,
		"stream":         true,
		"stream_options": map[string]any{"include_usage": true},
		"messages": []map[string]string{
			{"role": "system", "content": "You are a helpful assistant."},
			{"role": "user", "content": strings.Repeat("Say what you know about the lamp in the hall. ", 4)},
		},
	}
	fail(json.Unmarshal([]byte(extra), &fields))
	whole, err := json.Marshal(fields)
	fail(err)
	return whole
}

func (l load) run(interrupted context.Context) report {
	count := int(l.rate*l.seconds + 0.5)
	answers := make([]answer, count)
	began := time.Now()
	var running sync.WaitGroup
	for number := range count {
		due := began.Add(time.Duration(float64(number) / l.rate * float64(time.Second)))
		select {
		case <-time.After(time.Until(due)):
		case <-interrupted.Done():
			return report{}
		}
		running.Add(1)
		go func() {
			defer running.Done()
			answers[number] = l.ask(interrupted, began, due)
		}()
	}
	running.Wait()
	return summary(answers, time.Since(began))
}

func summary(answers []answer, took time.Duration) report {
	told := report{Sent: len(answers), Seconds: took.Seconds(), Errors: map[string]int{}, First: []float64{}, Whole: []float64{}, Gaps: []float64{}}
	for _, each := range answers {
		told.Gaps = append(told.Gaps, each.gaps...)
		if each.problem != "" {
			told.Errors[each.problem]++
			continue
		}
		told.First = append(told.First, each.first)
		told.Whole = append(told.Whole, each.whole)
	}
	return told
}

func (l load) ask(interrupted context.Context, began, due time.Time) answer {
	within, cancel := context.WithDeadline(interrupted, due.Add(l.patience))
	defer cancel()
	request, err := http.NewRequestWithContext(within, http.MethodPost, l.url+"/chat/completions", bytes.NewReader(l.body))
	if err != nil {
		return answer{problem: err.Error()}
	}
	request.Header.Set("authorization", "Bearer "+l.key)
	request.Header.Set("content-type", "application/json")
	response, err := l.client.Do(request)
	if err != nil {
		return answer{problem: reason(err)}
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return answer{problem: fmt.Sprintf("status %d", response.StatusCode)}
	}
	return l.read(response, began, due)
}

// event is as much of a chunk as is looked at.
type event struct {
	Choices []struct {
		Delta struct {
			Content string `json:"content"`
		} `json:"delta"`
		FinishReason *string `json:"finish_reason"`
	} `json:"choices"`
	Error json.RawMessage `json:"error"`
}

// read takes a stream to its [DONE]. An answer that is cut, or is not the one that the upstream gave, is an error.
func (l load) read(response *http.Response, began, due time.Time) answer {
	var told answer
	var said strings.Builder
	var before time.Time
	finished := false
	lines := bufio.NewReaderSize(response.Body, 16384)
	for {
		line, err := lines.ReadBytes('\n')
		if err != nil {
			told.problem = "cut: " + reason(err)
			return told
		}
		data, found := bytes.CutPrefix(bytes.TrimSpace(line), []byte("data: "))
		if !found {
			continue
		}
		now := time.Now()
		if string(data) == "[DONE]" {
			told.whole = now.Sub(due).Seconds()
			if !finished || said.String() != l.expected {
				told.problem = "another text"
			}
			// What follows the last event is read, or the connection could not be used again.
			lines.WriteTo(io.Discard)
			return told
		}
		var chunk event
		if err := json.Unmarshal(data, &chunk); err != nil || len(chunk.Error) > 0 && string(chunk.Error) != "null" {
			told.problem = "error event"
			return told
		}
		for _, choice := range chunk.Choices {
			finished = finished || choice.FinishReason != nil
			if choice.Delta.Content == "" {
				continue
			}
			said.WriteString(choice.Delta.Content)
			if before.IsZero() {
				told.first = now.Sub(due).Seconds()
			} else if at := now.Sub(began).Seconds(); at >= l.gapsFrom && at <= l.gapsUntil {
				told.gaps = append(told.gaps, now.Sub(before).Seconds())
			}
			before = now
		}
	}
}

// reason is an error without addresses and ports, so that equal ones are counted together.
func reason(err error) string {
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return "timed out"
	case errors.Is(err, syscall.ECONNREFUSED):
		return "connection refused"
	case errors.Is(err, syscall.ECONNRESET):
		return "connection reset"
	}
	text := err.Error()
	return text[strings.LastIndex(text, ": ")+1:]
}
