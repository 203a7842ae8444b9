// Tells the status of Kubernetes objects as the public kstatus library reads it: what `kubectl wait`-like tools
// (kpt, Flux, Argo CD's health checks, cli-utils) say about them.
//
// Input: one JSON object a line. Output, a line each: {"status":"InProgress","message":"..."}.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/cli-utils/pkg/kstatus/status"
)

type answer struct {
	Status  status.Status `json:"status"`
	Message string        `json:"message"`
}

func run(in io.Reader, out io.Writer) error {
	decoder, encoder := json.NewDecoder(in), json.NewEncoder(out)
	for number := 1; ; number++ {
		var text json.RawMessage
		object := &unstructured.Unstructured{}
		err := decoder.Decode(&text)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err == nil {
			err = object.UnmarshalJSON(text) // unlike encoding/json it tells whole numbers from others, as kstatus expects
		}
		if err != nil {
			return fmt.Errorf("cannot read object %d: %w; give one Kubernetes object as JSON a line", number, err)
		}
		result, err := status.Compute(object)
		if err != nil {
			return fmt.Errorf("cannot compute the status of object %d: %w", number, err)
		}
		if err := encoder.Encode(answer{result.Status, result.Message}); err != nil {
			return err
		}
	}
}

func main() {
	if err := run(os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
