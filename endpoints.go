// How a sub-command finds a node that answers, and which failed calls go on to
// another one.

package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/code"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"raft-key-value/kvpb"
)

// Invoke sends a request to one endpoint after another until one answers. What
// has an effect goes to a second one only if the first cannot have applied it,
// or if it takes effect once. What KVService is asked is sent until the timeout.
func (c *client) Invoke(ctx context.Context, method string, req, resp any, _ ...grpc.CallOption) error {
	unknown := false
	var said []string
	for {
		addrs, failures, again := slices.Clone(c.endpoints), []string{}, true
		for i := 0; i < len(addrs) && again; i++ {
			f, err := send(ctx, addrs[i], c.timeout/time.Duration(len(addrs)), method, req, resp)
			if err == nil {
				c.endpoints = slices.Concat(addrs[i:i+1], addrs[:i], addrs[i+1:]) // the next one goes there first
				return nil
			}
			failures = append(failures, addrs[i]+": "+err.Error())
			again, unknown, c.refused = f.again, unknown || f.unknown, f.refused
			if f.leader != "" && !c.local && !slices.Contains(addrs[:i+1], f.leader) {
				addrs = slices.Insert(addrs, i+1, f.leader)
			}
		}
		if said == nil || ctx.Err() == nil {
			said = failures // what failed before the time was up tells more
		}
		if !again || c.local || !strings.HasPrefix(method, "/"+kvpb.KVService_ServiceDesc.ServiceName) || ctx.Err() != nil {
			return errors.New(oneOf(unknown, "the outcome is unknown, it may or may not have been applied: ", "") + strings.Join(said, "; "))
		}
		sleep(ctx, pollInterval)
	}
}

// failure is what a call to one node that failed means for others.
type failure struct {
	leader  string // where to go next
	again   bool   // another node may be tried
	unknown bool   // it may or may not have been applied
	refused bool   // as invalid
}

// send makes a call to one node, which has only its share of the time to
// answer at all, and to do what may be sent again.
func send(ctx context.Context, addr string, share time.Duration, method string, req, resp any) (f failure, err error) {
	conn := dial(addr)
	defer conn.Close()
	short, cancel := context.WithTimeout(ctx, share)
	defer cancel()
	if slices.Contains(reads, method) || slices.Contains(writes, method) {
		ctx = short
	}
	var trailer metadata.MD
	// A first call without an effect tells whether anybody is there.
	if _, err = healthpb.NewHealthClient(conn).Check(short, &healthpb.HealthCheckRequest{}, grpc.Trailer(&trailer)); err != nil {
		f.again = true
	} else if err = conn.Invoke(ctx, method, req, resp, grpc.Trailer(&trailer)); err != nil {
		f.again, f.unknown = judge(method, err)
		f.refused = status.Code(err) == codes.InvalidArgument
	}
	f.leader = strings.Join(trailer.Get(leaderMetadata), "")
	return f, readable(err)
}

// reads are the methods without an effect, writes those that take effect once
// however often they are sent: all have an id, or open a session for it.
var (
	reads  = []string{kvpb.KVService_Get_FullMethodName, kvpb.KVService_List_FullMethodName, kvpb.ClusterService_Metrics_FullMethodName, healthpb.Health_Check_FullMethodName}
	writes = []string{kvpb.KVService_OpenSession_FullMethodName, kvpb.KVService_Set_FullMethodName, kvpb.KVService_Delete_FullMethodName}
)

// judge tells of a call that failed whether it may be sent to another node, and
// whether its effect is not known. A node's UNAVAILABLE means "not applied", or
// that it may be sent again, but gRPC has one of its own for a connection that
// broke. A node's DEADLINE means "not applied" for a write of a key, but not
// for a change of the cluster.
func judge(method string, err error) (again, unknown bool) {
	code, reason := status.Code(err), errorReason(err)
	transient := code == codes.Unavailable || code == codes.DeadlineExceeded
	switch {
	case slices.Contains(reads, method) || method == kvpb.KVService_OpenSession_FullMethodName:
		return transient, false
	case slices.Contains(writes, method):
		return transient, reason == "" || reason == "OUTCOME_UNKNOWN"
	case reason == "UNREACHABLE", reason != "" && method == kvpb.ClusterService_Init_FullMethodName: // no other node knows better
		return false, false
	case code == codes.Unavailable && reason != "": // that is about the called node
		return true, false
	}
	return false, reason == "" || code == codes.DeadlineExceeded
}

// readable makes an error of gRPC one for people.
func readable(err error) error {
	st, ok := status.FromError(err)
	if err == nil || !ok {
		return err
	}
	text := strings.Replace(st.Message(), `connection error: desc = "transport: Error while dialing: `, `"`, 1)
	return fmt.Errorf("%s (%s)", text, strings.TrimSpace(code.Code(st.Code()).String()+" "+errorReason(err)))
}
