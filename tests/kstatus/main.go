// Tells the status of Kubernetes objects as the public kstatus library reads it: what `kubectl wait`-like tools
// (kpt, Flux, Argo CD's health checks, cli-utils) say about them.
//
// Input: one JSON object a line. Output, a line each: {"status":"InProgress","message":"..."}.
//
// With the path of a health script of Argo CD as argument: what that says, run by the engine that Argo CD runs it by.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	lua "github.com/yuin/gopher-lua"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/cli-utils/pkg/kstatus/status"
)

type answer struct {
	Status  string `json:"status"`
	Message string `json:"message"`
}

type judge func(*unstructured.Unstructured) (answer, error)

func kstatus(object *unstructured.Unstructured) (answer, error) {
	result, err := status.Compute(object)
	if err != nil {
		return answer{}, err
	}
	return answer{string(result.Status), result.Message}, nil
}

// argo returns what a health script makes of an object: obj goes in as a global, a table with status and message comes out.
func argo(script string) judge {
	return func(object *unstructured.Unstructured) (answer, error) {
		state := lua.NewState(lua.Options{SkipOpenLibs: true}) // Argo CD opens these libraries and no others
		defer state.Close()
		for name, open := range map[string]lua.LGFunction{
			lua.BaseLibName: lua.OpenBase, lua.TabLibName: lua.OpenTable, lua.StringLibName: lua.OpenString, lua.MathLibName: lua.OpenMath,
		} {
			if err := state.CallByParam(lua.P{Fn: state.NewFunction(open), Protect: true}, lua.LString(name)); err != nil {
				return answer{}, err
			}
		}
		state.SetGlobal("obj", value(state, object.Object))
		if err := state.DoString(script); err != nil {
			return answer{}, err
		}
		table, is := state.Get(-1).(*lua.LTable)
		if !is {
			return answer{}, fmt.Errorf("the script returns a %s, not a table", state.Get(-1).Type())
		}
		return answer{lua.LVAsString(table.RawGetString("status")), lua.LVAsString(table.RawGetString("message"))}, nil
	}
}

// value returns a value of JSON as one of Lua.
func value(state *lua.LState, from any) lua.LValue {
	switch from := from.(type) {
	case map[string]any:
		table := state.NewTable()
		for key, one := range from {
			table.RawSetString(key, value(state, one))
		}
		return table
	case []any:
		table := state.NewTable()
		for _, one := range from {
			table.Append(value(state, one))
		}
		return table
	case string:
		return lua.LString(from)
	case int64:
		return lua.LNumber(from)
	case float64:
		return lua.LNumber(from)
	case bool:
		return lua.LBool(from)
	default:
		return lua.LNil
	}
}

func run(in io.Reader, out io.Writer, says judge) error {
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
		said, err := says(object)
		if err != nil {
			return fmt.Errorf("cannot compute the status of object %d: %w", number, err)
		}
		if err := encoder.Encode(said); err != nil {
			return err
		}
	}
}

func main() {
	says := judge(kstatus)
	if len(os.Args) > 1 {
		script, err := os.ReadFile(os.Args[1])
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		says = argo(string(script))
	}
	if err := run(os.Stdin, os.Stdout, says); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
