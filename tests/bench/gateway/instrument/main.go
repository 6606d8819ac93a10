// Measuring instruments of `make bench-gateway`, outside Python: a provider that answers at fixed moments, and an open-loop load.
//
//	instrument upstream -listen 127.0.0.1:9000
//	instrument load -url http://127.0.0.1:8080/v1 -model bench -rate 50 -seconds 10
package main

import (
	"fmt"
	"os"
	"strings"
)

func main() {
	if len(os.Args) < 2 {
		fail(fmt.Errorf("say upstream or load"))
	}
	switch os.Args[1] {
	case "upstream":
		fail(runUpstream(os.Args[2:]))
	case "load":
		fail(runLoad(os.Args[2:]))
	default:
		fail(fmt.Errorf("say upstream or load, not %q", os.Args[1]))
	}
}

func fail(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// word is the text of a token: the load knows what every answer must be.
func word(number int) string {
	return fmt.Sprintf("w%d ", number)
}

// text is a whole answer.
func text(tokens int) string {
	var whole strings.Builder
	for number := range tokens {
		whole.WriteString(word(number))
	}
	return whole.String()
}
