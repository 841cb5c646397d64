// Which node a sub-command calls, and which failed calls go on to another one.

package main

import (
	"context"
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
	// askTimeout bounds the wait for a node's metrics: it gives the four round trips
	// of a connection and of the question 500 ms each; a person waits for it.
	askTimeout = 2 * time.Second
	// askStagger is the wait for one endpoint before the next one is asked as well.
	askStagger = 200 * time.Millisecond
)

// clientKeepalive breaks a connection to a node that hangs, after 13 s. gRPC
// sends no ping sooner than every 10 s.
var clientKeepalive = keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 3 * time.Second}

// Reasons of a node that decide where its caller goes on; see ErrorReason in kv.proto.
const (
	reasonCompacted      = "COMPACTED"
	reasonNotInitialized = "NOT_INITIALIZED"
	reasonOtherCluster   = "OTHER_CLUSTER"
	reasonOutcomeUnknown = "OUTCOME_UNKNOWN"
	reasonOverloaded     = "OVERLOADED"
	reasonStopping       = "STOPPING"
	reasonUnreachable    = "UNREACHABLE"
)

// apiCaller makes the calls of one sub-command: it chooses the endpoint, keeps all
// calls in one cluster, and repeats those that may be repeated. It is the
// connection of the generated stubs.
type apiCaller struct {
	endpoints    []string      // addresses, in the order in which they are called
	certificates *certificates // for TLS; nil: there is none
	connections  *connectionPool
	timeout      time.Duration // of the sub-command
	local        bool          // no other node can answer for the one that is called first
	clusterID    uint64        // of the endpoints that were called; 0: none was called yet
	changed      bool          // the last call that was done had an effect
}

// Invoke makes a unary call at the first endpoint that is fit for it.
func (c *apiCaller) Invoke(ctx context.Context, method string, req, resp any, _ ...grpc.CallOption) error {
	return c.callAny(ctx, method, func(e *endpoint) (metadata.MD, error) {
		var trailer metadata.MD
		err := e.conn.Invoke(ctx, method, req, resp, grpc.Trailer(&trailer))
		return trailer, err
	})
}

// endpointCall makes a call at an endpoint, and returns its trailer.
type endpointCall func(*endpoint) (metadata.MD, error)

// callAny has a call of a method made at the first endpoint that is fit for it. A call that
// has an effect goes on to a second endpoint only if the first one cannot have applied it,
// or if it takes effect once. Calls to KVService are repeated until ctx ends.
func (c *apiCaller) callAny(ctx context.Context, method string, call endpointCall) error {
	unknown := false
	var replies []reply
	var pause pauses
	for {
		r := c.newRound(ctx)
		r.wantsOutsiders = method == kvpb.ClusterService_Init_FullMethodName
		outcome := r.call(method, call)
		r.end()
		if outcome.done {
			c.changed = !slices.Contains(reads, method)
			return nil
		}
		unknown = unknown || outcome.unknown
		timeIsUp := isOutOfTime(ctx)
		if replies == nil || !timeIsUp { // What failed before the time was up says more.
			replies = r.replies
		}
		if timeIsUp || !outcome.mayRepeat || !c.repeats(method) {
			e := callError(replies)
			switch {
			case unknown:
				e.Text = "the outcome is unknown, it may or may not have been applied: " + e.Text
				e.Status = exitUnknown
				e.Reason = reasonOutcomeUnknown
			case outcome.refused:
				e.Status = exitUsage
			}
			return e
		}
		pause.wait(ctx)
	}
}

// NewStream makes apiCaller a grpc.ClientConnInterface. Streams are opened on the
// connection of one endpoint: what a stream has sent cannot be repeated here.
func (c *apiCaller) NewStream(
	context.Context, *grpc.StreamDesc, string, ...grpc.CallOption,
) (grpc.ClientStream, error) {
	return nil, status.Error(codes.Unimplemented, "a stream needs the connection of one endpoint")
}

// repeats reports whether a call that no endpoint could do is made again, at all
// endpoints, until the time is up.
func (c *apiCaller) repeats(method string) bool {
	return !c.local && strings.HasPrefix(method, "/"+kvpb.KVService_ServiceDesc.ServiceName+"/")
}

// prefer makes an address the first one for the next call.
func (c *apiCaller) prefer(address string) {
	c.endpoints = slices.Concat([]string{address}, c.others(address))
}

// postpone makes an address the last one for the next call.
func (c *apiCaller) postpone(address string) {
	c.endpoints = append(c.others(address), address)
}

// others are the endpoints but for one, in their order.
func (c *apiCaller) others(address string) []string {
	return slices.DeleteFunc(slices.Clone(c.endpoints), func(a string) bool { return a == address })
}

// askTime bounds the wait for a node's metrics: half of the timeout is left for the
// call.
func (c *apiCaller) askTime() time.Duration { return min(c.timeout/2, askTimeout) }

// ask asks nodes for their metrics, all at the same time, and waits for all. Whoever
// calls it closes the endpoints.
func (c *apiCaller) ask(ctx context.Context, addresses []string) []*endpoint {
	endpoints := c.startAsking(ctx, addresses)
	awaitAll(endpoints)
	return endpoints
}

// startAsking is ask without the wait.
func (c *apiCaller) startAsking(ctx context.Context, addresses []string) []*endpoint {
	var endpoints []*endpoint
	for _, address := range addresses {
		e := &endpoint{address: address, calls: c}
		e.startAsking(ctx, c.askTime())
		endpoints = append(endpoints, e)
	}
	return endpoints
}

func awaitAll(endpoints []*endpoint) {
	for _, e := range endpoints {
		<-e.asked
	}
}

// endpoint is a node that may be called. It is asked for its metrics first: that
// has no effect, and shows whether the node responds, and for which cluster.
type endpoint struct {
	address string
	calls   *apiCaller
	conn    *grpc.ClientConn
	asked   chan struct{} // closed once metrics or err is set; nil: the node is not asked yet
	metrics *kvpb.MetricsResponse
	err     error // why there are no metrics
	failed  bool  // a call has failed, and the node has not said why
}

// startAsking asks the node for its metrics, unless it was asked already, and does
// not wait for them.
func (e *endpoint) startAsking(ctx context.Context, timeout time.Duration) {
	if e.asked != nil {
		return
	}
	e.conn = e.calls.connections.take(e.address)
	if e.conn == nil {
		e.conn = dial(e.address, e.calls.certificates, grpc.WithKeepaliveParams(clientKeepalive))
	}
	e.asked = make(chan struct{})
	go func() {
		defer close(e.asked)
		short, cancel := context.WithTimeout(ctx, timeout)
		defer cancel()
		e.metrics, e.err = kvpb.NewClusterServiceClient(e.conn).Metrics(short, &kvpb.MetricsRequest{})
		timedOut := isOutOfTime(short) && !isOutOfTime(ctx)
		if e.err != nil && timedOut {
			e.err = status.Errorf(codes.DeadlineExceeded, "no answer in %v", timeout)
		}
	}()
}

// close puts the connection back, or ends it, if it may be broken: else gRPC would pause before it
// connects again. It waits for the metrics: the context of startAsking has ended, or they are
// there.
func (e *endpoint) close() {
	if e.asked == nil {
		return
	}
	<-e.asked
	if e.err != nil || e.failed {
		_ = e.conn.Close()
		return
	}
	e.calls.connections.put(e.address, e.conn)
}

func closeAll(endpoints []*endpoint) {
	for _, e := range endpoints {
		e.close()
	}
}

// reply is what an endpoint said instead of doing what it was asked. It is printed
// with -o json.
type reply struct {
	Endpoint string `json:"endpoint"`
	Error    string `json:"error"`
	Code     string `json:"code"`   // gRPC's
	Reason   string `json:"reason"` // a node's, an ErrorReason without its prefix; empty: there is none
}

func replyOf(address string, err error) reply {
	r := reply{Endpoint: address, Error: readable(err).Error(), Reason: errorReason(err)}
	if st, ok := status.FromError(err); ok {
		r.Code = codeName(st)
	}
	return r
}

// codeName is the name of a status code as the specification of gRPC has it.
func codeName(st *status.Status) string { return code.Code(st.Code()).String() }

// readable makes an error of gRPC one for people. It leaves out the words with which
// grpc-go wraps an error of the dialer; should they change, they are printed.
func readable(err error) error {
	st, ok := status.FromError(err)
	if err == nil || !ok {
		return err
	}
	text := strings.Replace(st.Message(), `connection error: desc = "transport: Error while dialing: `, `"`, 1)
	if strings.HasSuffix(text, `error reading server preface: EOF"`) {
		text += ", as a node does that wants TLS: --cert-file, --key-file and --trusted-ca-file"
	}
	label := codeName(st)
	if reason := errorReason(err); reason != "" && reason != label {
		label += " " + reason
	}
	return fmt.Errorf("%s (%s)", text, label)
}

// callError is the error of a call that no endpoint has done.
func callError(replies []reply) *commandError {
	return &commandError{
		Text:      textOf(replies),
		Status:    exitNotDone,
		Reason:    firstReason(replies),
		Endpoints: replies,
	}
}

func textOf(replies []reply) string {
	var texts []string
	for _, r := range replies {
		texts = append(texts, r.Endpoint+": "+r.Error)
	}
	return strings.Join(texts, "; ")
}

// firstReason is the first reason among replies. That of a node in no cluster, or in another
// one, counts only if there is no other: a member knows more.
func firstReason(replies []reply) string {
	reason := ""
	for _, r := range replies {
		switch r.Reason {
		case "":
		case reasonNotInitialized, reasonOtherCluster:
			reason = r.Reason
		default:
			return r.Reason
		}
	}
	return reason
}

// round is one pass over the endpoints of a caller, in their order. It skips those
// that do not respond, those in no cluster, and those in another cluster.
//
// Endpoints that hang cost the time of one: the others are asked while the round
// waits for the first.
type round struct {
	caller         *apiCaller
	wantsOutsiders bool            // nodes in no cluster are called, too
	questions      context.Context // of the endpoints' metrics; it ends with the round
	endQuestions   context.CancelFunc
	left           []*endpoint // neither chosen nor skipped yet
	past           []*endpoint // chosen or skipped
	replies        []reply     // of the endpoints that were skipped, or chosen and called in vain
}

// newRound begins a pass over the endpoints. Whoever calls it ends the round.
func (c *apiCaller) newRound(ctx context.Context) *round {
	r := &round{caller: c}
	r.questions, r.endQuestions = context.WithCancel(ctx)
	for _, address := range c.endpoints {
		r.left = append(r.left, &endpoint{address: address, calls: c})
	}
	return r
}

func (r *round) end() {
	r.endQuestions()
	closeAll(r.left)
	closeAll(r.past)
}

// take takes an endpoint that was chosen out of the round: whoever takes it closes it.
func (r *round) take(e *endpoint) {
	r.past = slices.DeleteFunc(r.past, func(past *endpoint) bool { return past == e })
}

// next chooses the endpoint to be called; nil: there is none. The cluster of the
// first one that is chosen becomes the caller's.
func (r *round) next() *endpoint {
	for len(r.left) > 0 {
		r.await()
		e := r.left[0]
		r.left = r.left[1:]
		r.past = append(r.past, e)
		if err := r.whySkip(e); err != nil {
			r.record(e, err)
			continue
		}
		if !r.wantsOutsiders {
			r.caller.clusterID = e.metrics.GetClusterId()
		}
		return e
	}
	return nil
}

// await waits for the metrics of the first endpoint that is left. Meanwhile it asks
// the others for theirs, one after another.
func (r *round) await() {
	first := r.left[0]
	first.startAsking(r.questions, r.caller.askTime())
	stagger := time.NewTicker(askStagger)
	defer stagger.Stop()
	for i := 1; ; i++ {
		select {
		case <-first.asked:
			return
		case <-stagger.C:
			if i < len(r.left) {
				r.left[i].startAsking(r.questions, r.caller.askTime())
			}
		}
	}
}

// whySkip is why an endpoint, which was asked, must not be called; nil: it may be.
// What was begun in one cluster must not go on in another.
func (r *round) whySkip(e *endpoint) error {
	if e.err != nil {
		return e.err
	}
	if r.wantsOutsiders {
		return nil
	}
	theirs := e.metrics.GetClusterId()
	if theirs == 0 {
		return apiError(codes.FailedPrecondition,
			kvpb.ErrorReason_ERROR_REASON_NOT_INITIALIZED, errNotInitialized.Error())
	}
	ours := r.caller.clusterID
	if ours != 0 && ours != theirs {
		return apiError(codes.FailedPrecondition, kvpb.ErrorReason_ERROR_REASON_OTHER_CLUSTER,
			fmt.Sprintf("it is in another cluster, %016x, not in %016x", theirs, ours))
	}
	return nil
}

// record keeps the error of an endpoint, for the message at the end.
func (r *round) record(e *endpoint, err error) {
	r.replies = append(r.replies, replyOf(e.address, err))
	e.failed = errorReason(err) == ""
}

// putFirst makes a node the next one to be chosen, unless it was chosen or skipped
// before.
func (r *round) putFirst(address string) {
	isThere := func(e *endpoint) bool { return e.address == address }
	if slices.ContainsFunc(r.past, isThere) {
		return
	}
	i := slices.IndexFunc(r.left, isThere)
	if i < 0 {
		r.left = slices.Insert(r.left, 0, &endpoint{address: address, calls: r.caller})
		return
	}
	e := r.left[i]
	r.left = slices.Insert(slices.Delete(r.left, i, i+1), 0, e)
}

// callOutcome is what is known of a call after a round.
type callOutcome struct {
	done      bool // an endpoint has done it
	mayRepeat bool // it may be sent again, to another endpoint or to the same
	unknown   bool // an endpoint may have applied it, or may still do so
	refused   bool // the endpoint that was called last found it invalid
}

// call has a call made at one endpoint after another, until one has done it, or until
// it must not be sent to another one. A call that runs is given up only when its
// connection breaks, or its context ends.
func (r *round) call(method string, call endpointCall) callOutcome {
	outcome := callOutcome{mayRepeat: true}
	for outcome.mayRepeat {
		e := r.next()
		if e == nil {
			return outcome
		}
		trailer, err := call(e)
		if err == nil {
			r.caller.prefer(e.address)
			outcome.done = true
			return outcome
		}
		r.record(e, err)
		mayRepeat, unknown := afterFailure(method, err)
		outcome.mayRepeat = mayRepeat
		outcome.unknown = outcome.unknown || unknown
		outcome.refused = status.Code(err) == codes.InvalidArgument
		leader := strings.Join(trailer.Get(leaderMetadata), "") // one value, or none
		if leader != "" && !r.caller.local {
			r.putFirst(leader)
		}
	}
	return outcome
}

var (
	// reads are the methods without an effect.
	reads = []string{
		kvpb.KVService_Get_FullMethodName,
		kvpb.KVService_List_FullMethodName,
		kvpb.KVService_Scan_FullMethodName,
		kvpb.KVService_Watch_FullMethodName,
		kvpb.ClusterService_Metrics_FullMethodName,
		healthpb.Health_Check_FullMethodName,
	}
	// writes are the methods that take effect once, however often they are sent: the
	// command line sends none without an id.
	writes = []string{
		kvpb.KVService_Set_FullMethodName,
		kvpb.KVService_Delete_FullMethodName,
		kvpb.KVService_DeleteRange_FullMethodName,
	}
)

// afterFailure says of a call that failed whether it may be sent again, and whether
// it may have been applied nevertheless.
//
// An error without a reason is gRPC's own, such as the UNAVAILABLE of a connection
// that broke: nobody knows what the node did. A node's UNAVAILABLE has a reason and
// means that the call was not applied, or that it may be repeated. A node's
// DEADLINE_EXCEEDED means "not applied" for a write, but not for a change of the
// cluster.
func afterFailure(method string, err error) (mayRepeat, unknown bool) {
	reason := errorReason(err)
	late := status.Code(err) == codes.DeadlineExceeded
	unavailable := status.Code(err) == codes.Unavailable
	nodeDoesNotKnow := reason == "" || reason == reasonOutcomeUnknown
	switch {
	case method == kvpb.ClusterService_Init_FullMethodName: // No other node knows more of it.
		return false, nodeDoesNotKnow || late
	case reason == reasonOverloaded || reason == reasonNotInitialized: // Another node may be able to.
		return true, false
	case slices.Contains(reads, method):
		return unavailable || late, false
	case method == kvpb.KVService_OpenSession_FullMethodName: // A second session does no harm.
		return unavailable || late, false
	case slices.Contains(writes, method):
		return unavailable || late, nodeDoesNotKnow
	case reason == reasonUnreachable: // That is about a node that the change needs, not the one called.
		return false, false
	case nodeDoesNotKnow || late:
		return false, true
	}
	return unavailable, false
}

// splitEndpoints takes a list of addresses apart. There may be blanks at its commas.
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
