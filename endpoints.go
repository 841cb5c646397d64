// How a sub-command finds a node to call, and which failed calls go on to
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
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"raft-key-value/kvpb"
)

const (
	// askTimeout bounds the wait for a node that is asked how it is: it gives the four
	// round trips of a connection and the question 500 ms each; a person waits for it.
	askTimeout = 2 * time.Second
	// askStagger is the wait for an endpoint before the next one is asked, too.
	askStagger = 200 * time.Millisecond
	// pollInterval lies between two questions of what is asked again and again.
	pollInterval = 200 * time.Millisecond
)

// clientKeepalive breaks a connection to a node that hangs, after 13 s. gRPC
// sends no ping sooner than every 10 s.
var clientKeepalive = keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 3 * time.Second}

// endpoint is a node that may be called. It is asked for its metrics first: that
// has no effect, and tells whether it answers, and for which cluster.
type endpoint struct {
	address string
	conn    *grpc.ClientConn
	asked   chan struct{} // closed once metrics or err is there; nil: it is not asked yet
	metrics *kvpb.MetricsResponse
	err     error
}

// ask asks the node, unless it is asked already. It does not wait for the answer.
func (e *endpoint) ask(ctx context.Context, timeout time.Duration) {
	if e.asked != nil {
		return
	}
	e.conn = dial(e.address, grpc.WithKeepaliveParams(clientKeepalive))
	e.asked = make(chan struct{})
	go func() {
		defer close(e.asked)
		short, cancel := context.WithTimeout(ctx, timeout)
		defer cancel()
		e.metrics, e.err = kvpb.NewClusterServiceClient(e.conn).Metrics(short, &kvpb.MetricsRequest{})
		if errors.Is(short.Err(), context.DeadlineExceeded) && e.err != nil && ctx.Err() == nil {
			e.err = status.Errorf(codes.DeadlineExceeded, "no answer in %v", timeout)
		}
	}()
}

// close ends the connection. The context of ask has to have ended, or the answer
// to be there.
func (e *endpoint) close() {
	if e.asked != nil {
		<-e.asked
		_ = e.conn.Close()
	}
}

// askTime is how long a node that is asked may take: half of the timeout is left
// for the call.
func (c *client) askTime() time.Duration { return min(c.timeout/2, askTimeout) }

// ask asks nodes for their metrics, all at the same time, and waits for all. The
// caller closes them.
func (c *client) ask(ctx context.Context, addresses []string) []*endpoint {
	var endpoints []*endpoint
	for _, address := range addresses {
		e := &endpoint{address: address}
		e.ask(ctx, c.askTime())
		endpoints = append(endpoints, e)
	}
	for _, e := range endpoints {
		<-e.asked
	}
	return endpoints
}

func closeAll(endpoints []*endpoint) {
	for _, e := range endpoints {
		e.close()
	}
}

// reply is what an endpoint said that did not do what it was asked.
type reply struct {
	Endpoint string `json:"endpoint"`
	Error    string `json:"error"`
	Code     string `json:"code"`   // gRPC's
	Reason   string `json:"reason"` // a node's, an ErrorReason without its prefix; empty: there is none
}

// round is one pass over the endpoints, in their order. It passes over those that
// do not answer and those that cannot answer for the cluster. An endpoint that
// hangs holds the next one up only once for all: they are asked while it is
// waited for.
type round struct {
	c       *client
	any     bool            // nodes in no cluster are wanted, too
	ctx     context.Context // of the questions
	cancel  context.CancelFunc
	left    []*endpoint // neither tried nor passed over yet
	tried   []*endpoint
	answers []reply // of those that were tried or passed over
}

// newRound begins a pass over the endpoints. The caller ends it.
func (c *client) newRound(ctx context.Context, any bool) *round {
	r := &round{c: c, any: any}
	r.ctx, r.cancel = context.WithCancel(ctx)
	for _, address := range c.endpoints {
		r.left = append(r.left, &endpoint{address: address})
	}
	return r
}

func (r *round) end() {
	r.cancel()
	closeAll(r.left)
	closeAll(r.tried)
}

// next is the next endpoint to be called; nil: there is none.
func (r *round) next() *endpoint {
	for len(r.left) > 0 {
		r.await()
		e := r.left[0]
		r.left = r.left[1:]
		r.tried = append(r.tried, e)
		err := r.unfit(e)
		if err == nil {
			return e
		}
		r.say(e, err)
	}
	return nil
}

// await waits for the answer of the first endpoint that is left, and meanwhile
// asks the others, one after another.
func (r *round) await() {
	first := r.left[0]
	first.ask(r.ctx, r.c.askTime())
	stagger := time.NewTicker(askStagger)
	defer stagger.Stop()
	for i := 1; ; i++ {
		select {
		case <-first.asked:
			return
		case <-stagger.C:
			if i < len(r.left) {
				r.left[i].ask(r.ctx, r.c.askTime())
			}
		}
	}
}

// unfit is why an endpoint that was asked must not be called; nil: it may be. The
// first that may be called says which cluster all others have to be in: what was
// begun in one must not go on in another.
func (r *round) unfit(e *endpoint) error {
	cluster := e.metrics.GetClusterId()
	switch {
	case e.err != nil:
		return e.err
	case r.any:
		return nil
	case cluster == 0:
		return apiError(codes.FailedPrecondition, kvpb.ErrorReason_ERROR_REASON_NOT_INITIALIZED, errNotInitialized.Error())
	case r.c.clusterID != 0 && r.c.clusterID != cluster:
		return fmt.Errorf("it is in another cluster, %016x, not in %016x", cluster, r.c.clusterID)
	}
	r.c.clusterID = cluster
	return nil
}

// say keeps the error of an endpoint, for the message at the end.
func (r *round) say(e *endpoint, err error) {
	a := reply{Endpoint: e.address, Error: readable(err).Error(), Reason: errorReason(err)}
	if st, ok := status.FromError(err); ok {
		a.Code = code.Code(st.Code()).String()
	}
	r.answers = append(r.answers, a)
}

// goTo makes a node the next one to be called, unless it was already.
func (r *round) goTo(address string) {
	at := func(e *endpoint) bool { return e.address == address }
	if address == "" || slices.ContainsFunc(r.tried, at) {
		return
	}
	i := slices.IndexFunc(r.left, at)
	if i < 0 {
		r.left = slices.Insert(r.left, 0, &endpoint{address: address})
		return
	}
	e := r.left[i]
	r.left = slices.Insert(slices.Delete(r.left, i, i+1), 0, e)
}

// verdict is what is known of a call after a round.
type verdict struct {
	done    bool // an endpoint has answered
	again   bool // it may be made again, at another endpoint or at the same
	unknown bool // it may or may not have been applied
	refused bool // a node called it invalid
}

// call makes a call at one endpoint after another, until one answers, or until no
// other one may be called. A call that runs is left only when its connection
// breaks, or ctx ends.
func (r *round) call(ctx context.Context, method string, req, resp any) verdict {
	v := verdict{again: true}
	for v.again {
		e := r.next()
		if e == nil {
			return v
		}
		var trailer metadata.MD
		err := e.conn.Invoke(ctx, method, req, resp, grpc.Trailer(&trailer))
		if err == nil {
			r.c.prefer(e.address)
			v.done = true
			return v
		}
		r.say(e, err)
		again, unknown := judge(method, err)
		v.again = again
		v.unknown = v.unknown || unknown
		v.refused = status.Code(err) == codes.InvalidArgument
		if !r.c.local {
			r.goTo(strings.Join(trailer.Get(leaderMetadata), ""))
		}
	}
	return v
}

// prefer makes an endpoint the first one for the next call.
func (c *client) prefer(address string) {
	others := slices.DeleteFunc(slices.Clone(c.endpoints), func(a string) bool { return a == address })
	c.endpoints = slices.Concat([]string{address}, others)
}

// Invoke makes a call at the first endpoint that is fit for it. What has an effect
// goes to a second one only if the first cannot have applied it, or if it takes
// effect once. What KVService is asked is sent until the timeout.
func (c *client) Invoke(ctx context.Context, method string, req, resp any, _ ...grpc.CallOption) error {
	repeats := !c.local && strings.HasPrefix(method, "/"+kvpb.KVService_ServiceDesc.ServiceName+"/")
	unknown := false
	var answers []reply
	for {
		r := c.newRound(ctx, method == kvpb.ClusterService_Init_FullMethodName)
		v := r.call(ctx, method, req, resp)
		r.end()
		if v.done {
			c.changed = !slices.Contains(reads, method)
			return nil
		}
		unknown = unknown || v.unknown
		if answers == nil || ctx.Err() == nil {
			answers = r.answers // what failed before the time was up tells more
		}
		if !v.again || !repeats || ctx.Err() != nil {
			return callError(answers, unknown, v.refused)
		}
		sleep(ctx, pollInterval)
	}
}

// callError is the error of a call that no endpoint has answered.
func callError(answers []reply, unknown, refused bool) *commandError {
	e := &commandError{Status: exitNotDone, Endpoints: answers}
	var said []string
	for _, a := range answers {
		said = append(said, a.Endpoint+": "+a.Error)
		if a.Reason != "" && (e.Reason == "" || e.Reason == "NOT_INITIALIZED") { // who is in a cluster knows better
			e.Reason = a.Reason
		}
	}
	e.Text = strings.Join(said, "; ")
	switch {
	case unknown:
		e.Text = "the outcome is unknown, it may or may not have been applied: " + e.Text
		e.Status = exitUnknown
		e.Reason = "OUTCOME_UNKNOWN"
	case refused:
		e.Status = exitUsage
	}
	return e
}

// reads are the methods without an effect, writes those that take effect once
// however often they are sent: all have an id, or open a session for it.
var (
	reads = []string{
		kvpb.KVService_Get_FullMethodName, kvpb.KVService_List_FullMethodName,
		kvpb.ClusterService_Metrics_FullMethodName, healthpb.Health_Check_FullMethodName,
	}
	writes = []string{
		kvpb.KVService_OpenSession_FullMethodName, kvpb.KVService_Set_FullMethodName, kvpb.KVService_Delete_FullMethodName,
	}
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
	case reason != "" && method == kvpb.ClusterService_Init_FullMethodName: // no other node knows better
		return false, reason == "OUTCOME_UNKNOWN" || code == codes.DeadlineExceeded
	case reason == "OVERLOADED", reason == "NOT_INITIALIZED": // nothing was applied, and that is about the called node
		return true, false
	case slices.Contains(reads, method) || method == kvpb.KVService_OpenSession_FullMethodName:
		return transient, false
	case slices.Contains(writes, method):
		return transient, reason == "" || reason == "OUTCOME_UNKNOWN"
	case reason == "OUTCOME_UNKNOWN":
		return false, true
	case reason == "UNREACHABLE": // no other node knows better
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

// splitEndpoints takes a list of addresses apart, with or without blanks at its
// commas.
func splitEndpoints(list string) ([]string, error) {
	var endpoints []string
	for _, address := range strings.Split(list, ",") {
		address = strings.TrimSpace(address)
		_, port, err := splitAddress(address)
		if err != nil {
			return nil, err
		}
		if port == 0 {
			return nil, fmt.Errorf("address %q: nobody listens on port 0", address)
		}
		if !slices.Contains(endpoints, address) {
			endpoints = append(endpoints, address)
		}
	}
	return endpoints, nil
}
