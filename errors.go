// The errors of the API: status codes, reasons, and what the loop's errors become.

package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
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

// apiError makes an error of the API; its ErrorInfo names a field, if one is
// given. Who is told that a queue is full is told when to come back.
func apiError(code codes.Code, reason kvpb.ErrorReason, message string, field ...string) error {
	info := &errdetails.ErrorInfo{Domain: errorDomain, Reason: strings.TrimPrefix(reason.String(), "ERROR_REASON_")}
	if len(field) > 0 {
		info.Metadata = map[string]string{"field": field[0]}
	}
	details := []protoadapt.MessageV1{info}
	if code == codes.ResourceExhausted {
		details = append(details, &errdetails.RetryInfo{RetryDelay: durationpb.New(retryDelay)})
	}
	st, _ := status.New(code, message).WithDetails(details...) // fails only if the code is OK or a string of info is not UTF-8
	return st.Err()
}

// errorReason is the reason that a node gave for an error; empty: it is not a
// node's, but gRPC's.
func errorReason(err error) string {
	for _, d := range status.Convert(err).Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok && info.Domain == errorDomain {
			return info.Reason
		}
	}
	return ""
}

func invalid(field, format string, args ...any) error {
	return apiError(codes.InvalidArgument, kvpb.ErrorReason_ERROR_REASON_INVALID_FIELD, field+": "+fmt.Sprintf(format, args...), field)
}

func validateNode(field string, n *kvpb.Node) error {
	if n.GetId() == 0 {
		return invalid(field+".id", "it is 0")
	}
	if _, port, err := splitAddress(n.GetAddress()); err != nil {
		return invalid(field+".address", "%v", err)
	} else if port == 0 {
		return invalid(field+".address", "%q has no port", n.GetAddress())
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
	{errInCluster, codes.FailedPrecondition, kvpb.ErrorReason_ERROR_REASON_ALREADY_INITIALIZED},
	{errOverloaded, codes.ResourceExhausted, kvpb.ErrorReason_ERROR_REASON_OVERLOADED},
	{errStopping, codes.Unavailable, kvpb.ErrorReason_ERROR_REASON_STOPPING},
	{errContradiction, codes.DataLoss, kvpb.ErrorReason_ERROR_REASON_CORRUPT},
	{context.DeadlineExceeded, codes.DeadlineExceeded, kvpb.ErrorReason_ERROR_REASON_DEADLINE},
	{context.Canceled, codes.Canceled, kvpb.ErrorReason_ERROR_REASON_DEADLINE},
}

// toStatus makes the errors of the loop those of the API. What it does not know
// has ended the loop: a write with such an error was not proposed.
func toStatus(err error, kv bool) error {
	for _, e := range apiErrors { // an unknown outcome may wrap a status
		if errors.Is(err, e.err) {
			if e.err == errNotInitialized && !kv {
				e.code = codes.FailedPrecondition
			}
			return apiError(e.code, e.reason, err.Error())
		}
	}
	if _, ok := status.FromError(err); ok {
		return err
	}
	return apiError(codes.Unavailable, kvpb.ErrorReason_ERROR_REASON_NODE_FAILED, "this node has failed: "+err.Error())
}
