package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net/http"
	"time"
)

const firstToken = 20 * time.Millisecond

// interval between the tokens of each model.
var interval = map[string]time.Duration{"bench": 5 * time.Millisecond, "steady": 50 * time.Millisecond}

type chatRequest struct {
	Model         string `json:"model"`
	Stream        bool   `json:"stream"`
	MaxTokens     int    `json:"max_tokens"`
	StreamOptions struct {
		IncludeUsage bool `json:"include_usage"`
	} `json:"stream_options"`
}

func runUpstream(arguments []string) error {
	flags := flag.NewFlagSet("upstream", flag.ExitOnError)
	listen := flags.String("listen", "127.0.0.1:9000", "address")
	flags.Parse(arguments)
	routes := http.NewServeMux()
	routes.HandleFunc("GET /v1/models", func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, `{"object":"list","data":[]}`) })
	routes.HandleFunc("POST /v1/chat/completions", chat)
	return http.ListenAndServe(*listen, routes)
}

func chat(w http.ResponseWriter, r *http.Request) {
	came := time.Now()
	var asked chatRequest
	if err := json.NewDecoder(r.Body).Decode(&asked); err != nil || interval[asked.Model] == 0 || asked.MaxTokens < 1 {
		http.Error(w, `{"error":{"message":"wrong request","type":"invalid_request_error","param":null,"code":null}}`, http.StatusBadRequest)
		return
	}
	if asked.Stream {
		stream(w, r, asked, came)
		return
	}
	pause(r, came.Add(firstToken+time.Duration(asked.MaxTokens-1)*interval[asked.Model]))
	w.Header().Set("content-type", "application/json")
	fmt.Fprintf(w, `{"id":"chatcmpl-1","object":"chat.completion","created":1,"model":%q,"choices":[{"index":0,"message":{"role":"assistant","content":%q},"finish_reason":"stop"}],"usage":%s}`,
		asked.Model, text(asked.MaxTokens), usage(asked))
}

// stream sends each token at its moment, counted from the request's arrival: a late one makes no other late.
func stream(w http.ResponseWriter, r *http.Request, asked chatRequest, came time.Time) {
	w.Header().Set("content-type", "text/event-stream")
	flusher := w.(http.Flusher)
	flusher.Flush()
	send := func(choices, rest string) {
		fmt.Fprintf(w, "data: {\"id\":\"chatcmpl-1\",\"object\":\"chat.completion.chunk\",\"created\":1,\"model\":%q,\"choices\":%s%s}\n\n", asked.Model, choices, rest)
	}
	for number := range asked.MaxTokens {
		if !pause(r, came.Add(firstToken+time.Duration(number)*interval[asked.Model])) {
			return
		}
		send(fmt.Sprintf(`[{"index":0,"delta":{"role":"assistant","content":%q},"finish_reason":null}]`, word(number)), "")
		flusher.Flush()
	}
	send(`[{"index":0,"delta":{},"finish_reason":"stop"}]`, "")
	if asked.StreamOptions.IncludeUsage {
		send("[]", `,"usage":`+usage(asked))
	}
	io.WriteString(w, "data: [DONE]\n\n")
}

func usage(asked chatRequest) string {
	return fmt.Sprintf(`{"prompt_tokens":10,"completion_tokens":%d,"total_tokens":%d}`, asked.MaxTokens, asked.MaxTokens+10)
}

// pause waits for a moment; false where the client has left.
func pause(r *http.Request, until time.Time) bool {
	timer := time.NewTimer(time.Until(until))
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-r.Context().Done():
		return false
	}
}
