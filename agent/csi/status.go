package csi

import (
	"context"
	"errors"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"google.golang.org/genproto/googleapis/rpc/errdetails"

	"stillpoint.io/stillpoint/fault"
)

// code is the gRPC code of a fault's kind: the one place where kinds become codes. What callers do about them is in the
// CSI specification's section "Error Scheme" and its tables of errors. Aborted, ResourceExhausted, Unavailable, Canceled and
// DeadlineExceeded tell the sidecars that a call may have begun something; every other code is final for that try.
func code(err error) codes.Code {
	switch fault.KindOf(err) {
	case fault.NotFound:
		return codes.NotFound
	case fault.Invalid:
		return codes.InvalidArgument
	case fault.Busy, fault.Unsupported: // somebody has to change something first
		return codes.FailedPrecondition
	case fault.Corrupt:
		return codes.DataLoss
	case fault.Exhausted:
		return codes.ResourceExhausted
	case fault.Void:
		return codes.Aborted
	case fault.Unavailable:
		if errors.Is(err, context.DeadlineExceeded) {
			return codes.DeadlineExceeded
		}
		return codes.Unavailable
	}
	if errors.Is(err, context.Canceled) {
		return codes.Canceled
	}
	return codes.Internal
}

// toStatus gives an error its code, unless it has one. Of an error with a time to wait the status has that as its detail.
func toStatus(err error) error {
	if err == nil {
		return nil
	}
	var s interface{ GRPCStatus() *status.Status }
	if errors.As(err, &s) {
		return err
	}
	st := status.New(code(err), err.Error())
	if wait := fault.RetryAfter(err); wait > 0 {
		if detailed, e := st.WithDetails(&errdetails.RetryInfo{RetryDelay: durationpb.New(wait)}); e == nil {
			st = detailed
		}
	}
	return st.Err()
}

// missing is InvalidArgument for a field that the specification requires.
func missing(field string) error {
	return status.Errorf(codes.InvalidArgument, "the request has no %s", field)
}
