// Reads a compose file with the parser that `docker compose` itself uses and fails on what it would refuse.
package main

import (
	"context"
	"fmt"
	"os"
	"sort"

	"github.com/compose-spec/compose-go/v2/cli"
)

func main() {
	options, err := cli.NewProjectOptions(os.Args[1:], cli.WithOsEnv, cli.WithInterpolation(true), cli.WithConsistency(true))
	if err == nil {
		var project, failure = options.LoadProject(context.Background())
		err = failure
		if err == nil {
			names := project.ServiceNames()
			sort.Strings(names)
			fmt.Println(len(names), "services:", names)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
