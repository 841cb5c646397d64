// The errors of the API: status codes, reasons, and what the loop's errors become.

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	grpcpeer "google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/durationpb"

	"raft-key-value/kvpb"
)

const (
	errorDomain = "raftkv.v1"
	// retryDelay is when to try again what found a queue full.
	retryDelay = 100 * time.Millisecond
)

// apiError makes an error of the API. Its ErrorInfo names a field of the request, if one
// is given. RESOURCE_EXHAUSTED has a RetryInfo, too, but for QUOTA: a queue is full, but not for
// long.
func apiError(code codes.Code, reason kvpb.ErrorReason, message string, field ...string) error {
	info := errorInfo(reason)
	if len(field) > 0 {
		info.Metadata = map[string]string{"field": field[0]}
	}
	isQueue := code == codes.ResourceExhausted && reason != kvpb.ErrorReason_ERROR_REASON_QUOTA
	if isQueue {
		return detailedError(code, message, info, retryIn(retryDelay))
	}
	return detailedError(code, message, info)
}

// errorWith is an error whose ErrorInfo has one more fact in its metadata.
func errorWith(code codes.Code, reason kvpb.ErrorReason, message, key, value string) error {
	info := errorInfo(reason)
	info.Metadata = map[string]string{key: value}
	return detailedError(code, message, info)
}

func errorInfo(reason kvpb.ErrorReason) *errdetails.ErrorInfo {
	return &errdetails.ErrorInfo{
		Domain: errorDomain,
		Reason: strings.TrimPrefix(reason.String(), "ERROR_REASON_"),
	}
}

func retryIn(delay time.Duration) *errdetails.RetryInfo {
	return &errdetails.RetryInfo{RetryDelay: durationpb.New(delay)}
}

func detailedError(code codes.Code, message string, details ...protoadapt.MessageV1) error {
	// WithDetails fails only if the code is OK or a string of info is not UTF-8.
	st, _ := status.New(code, beginning(message, maxErrorBytes)).WithDetails(details...)
	return st.Err()
}

// errorReason is the reason that a node gave for an error; empty: the error is not a
// node's, but gRPC's.
func errorReason(err error) string {
	for _, d := range status.Convert(err).Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok && info.Domain == errorDomain {
			return info.Reason
		}
	}
	return ""
}

// invalid is the error over a field of a request: INVALID_ARGUMENT, with the field's name
// before the message and in the ErrorInfo.
func invalid(field, format string, args ...any) error {
	message := field + ": " + fmt.Sprintf(format, args...)
	return apiError(codes.InvalidArgument, kvpb.ErrorReason_ERROR_REASON_INVALID_FIELD, message, field)
}

const (
	// maxQuotedInput bounds what an error says of one part of its caller's input.
	maxQuotedInput = 64
	// maxErrorBytes bounds the message of an error, which may name all members. It comes
	// twice, once in base64: some clients take no more than 8 KiB of headers.
	maxErrorBytes = 3 << 10
)

// quoteInput quotes the beginning of what somebody has sent, for an error.
func quoteInput(input string) string { return strconv.Quote(beginning(input, maxQuotedInput)) }

// shown is what an error says of an address.
func shown(address string) string { return beginning(address, maxQuotedInput) }

// causeOf is why a call to a node has failed, which may have the node's address in it.
func causeOf(err error, node *kvpb.Node) string {
	text := status.Convert(err).Message()
	host, _, _ := net.SplitHostPort(node.Address)
	for _, long := range []string{node.Address, host} {
		if len(long) > maxQuotedInput {
			text = strings.ReplaceAll(text, long, shown(long))
		}
	}
	return text
}

// beginning returns the first bytes of a text, which show that there are more.
func beginning(text string, bytes int) string {
	if len(text) <= bytes {
		return text
	}
	return strings.ToValidUTF8(text[:bytes], "") + "…"
}

// remoteAddress is where a call comes from.
func remoteAddress(ctx context.Context) string {
	p, ok := grpcpeer.FromContext(ctx)
	if !ok {
		return ""
	}
	return p.Addr.String()
}

// validateNode finds what is wrong with a node that a request names.
func validateNode(field string, n *kvpb.Node) error {
	if n.GetId() == 0 {
		return invalid(field+".id", "it is 0")
	}
	_, port, err := splitAddress(n.GetAddress())
	if err != nil {
		return invalid(field+".address", "%v", err)
	}
	if port == 0 {
		return invalid(field+".address", "%s has no port", quoteInput(n.GetAddress()))
	}
	return nil
}

// apiErrors are the errors of the loop, and what they are in the API.
var apiErrors = []struct {
	err    error
	code   codes.Code
	reason kvpb.ErrorReason
}{
	{errChangeUnknown, codes.DeadlineExceeded, kvpb.ErrorReason_ERROR_REASON_OUTCOME_UNKNOWN},
	{errNoLeader, codes.Unavailable, kvpb.ErrorReason_ERROR_REASON_NO_LEADER},
	{errNotLeader, codes.Unavailable, kvpb.ErrorReason_ERROR_REASON_NOT_LEADER},
	{errOutcomeUnknown, codes.DeadlineExceeded, kvpb.ErrorReason_ERROR_REASON_OUTCOME_UNKNOWN},
	{errSessionUnknown, codes.FailedPrecondition, kvpb.ErrorReason_ERROR_REASON_SESSION_UNKNOWN},
	{errSequenceTooOld, codes.FailedPrecondition, kvpb.ErrorReason_ERROR_REASON_SEQUENCE_TOO_OLD},
	{errSequenceTooFar, codes.FailedPrecondition, kvpb.ErrorReason_ERROR_REASON_SEQUENCE_TOO_FAR},
	{errSessionTaken, codes.Unavailable, kvpb.ErrorReason_ERROR_REASON_SESSION_TAKEN},
	{errNotInitialized, codes.Unavailable, kvpb.ErrorReason_ERROR_REASON_NOT_INITIALIZED},
	{errLoopHangs, codes.Unavailable, kvpb.ErrorReason_ERROR_REASON_UNREACHABLE},
	{errHistoryReplaced, codes.Unavailable, kvpb.ErrorReason_ERROR_REASON_NOT_INITIALIZED},
	{errInCluster, codes.FailedPrecondition, kvpb.ErrorReason_ERROR_REASON_ALREADY_INITIALIZED},
	{errOverloaded, codes.ResourceExhausted, kvpb.ErrorReason_ERROR_REASON_OVERLOADED},
	{errRequestYielded, codes.ResourceExhausted, kvpb.ErrorReason_ERROR_REASON_OVERLOADED},
	{errQuota, codes.ResourceExhausted, kvpb.ErrorReason_ERROR_REASON_QUOTA},
	{errViewEnded, codes.ResourceExhausted, kvpb.ErrorReason_ERROR_REASON_VIEW_ENDED},
	{errStopping, codes.Unavailable, kvpb.ErrorReason_ERROR_REASON_STOPPING},
	{errContradiction, codes.DataLoss, kvpb.ErrorReason_ERROR_REASON_CORRUPT},
	{context.DeadlineExceeded, codes.DeadlineExceeded, kvpb.ErrorReason_ERROR_REASON_DEADLINE},
	{context.Canceled, codes.Canceled, kvpb.ErrorReason_ERROR_REASON_DEADLINE},
}

// toStatus makes an error of the loop one of the API. kv: a call of KVService gets it, for
// which a node in no cluster is but a node that cannot serve it. An error that is neither
// known nor of the API has ended the loop: a write with such an error was not proposed.
func toStatus(err error, kv bool) error {
	for _, e := range apiErrors { // before err is looked at as a status: an unknown outcome may wrap one
		if !errors.Is(err, e.err) {
			continue
		}
		code := e.code
		if e.err == errNotInitialized && !kv {
			code = codes.FailedPrecondition
		}
		return apiError(code, e.reason, err.Error())
	}
	if _, ok := status.FromError(err); ok {
		return err
	}
	return apiError(codes.Unavailable, kvpb.ErrorReason_ERROR_REASON_NODE_FAILED, "this node has failed: "+err.Error())
}
