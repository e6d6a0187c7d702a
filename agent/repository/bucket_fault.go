package repository

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/xml"
	"errors"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"

	"github.com/kopia/kopia/repo/blob"
	"github.com/minio/minio-go/v7"

	"stillpoint.io/stillpoint/fault"
)

// storeFault gives an error of an S3 client its kind and says what to do. What is missing or out of range becomes kopia's
// word for it, without a kind: whether that is a fault is for others to say.
func storeFault(err error) error {
	if err == nil {
		return nil
	}
	var answer minio.ErrorResponse
	if errors.As(err, &answer) {
		return answerFault(answer)
	}
	var (
		unknown   x509.UnknownAuthorityError
		untrusted *tls.CertificateVerificationError
		plain     tls.RecordHeaderError
		network   net.Error
		syntax    *xml.SyntaxError
	)
	switch {
	case fault.KindOf(err) != fault.Internal, errors.Is(err, blob.ErrInvalidRange), errors.Is(err, context.Canceled):
		return err
	case errors.As(err, &unknown):
		return fault.Errorf(fault.Invalid, "%w; if the store has a CA of its own, give its certificate (s3-ca-file)", withoutURL(err))
	case errors.As(err, &untrusted):
		return fault.Errorf(fault.Invalid, "%w", withoutURL(err))
	case errors.As(err, &plain), strings.Contains(err.Error(), "server gave HTTP response to HTTPS client"):
		return fault.Errorf(fault.Invalid, "the store does not speak TLS at this address; if that is meant, write http:// before the endpoint")
	case errors.As(err, &network), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, io.EOF), errors.As(err, &syntax):
		return fault.Errorf(fault.Unavailable, "the store cannot be reached or broke off: %w", withoutURL(err))
	}
	return err
}

// withoutURL takes the request's address out of an error: it says less than what is around it.
func withoutURL(err error) error {
	var u *url.Error
	if errors.As(err, &u) {
		return u.Err
	}
	return err
}

// answerFault is for what the store itself says.
func answerFault(a minio.ErrorResponse) error {
	say := func(k fault.Kind, remedy string) error {
		return fault.Errorf(k, "the store says \"%w\" (%s, HTTP %d)%s", a, a.Code, a.StatusCode, remedy)
	}
	switch a.Code {
	case minio.NoSuchKey, "NoSuchVersion":
		return blob.ErrBlobNotFound
	case minio.NoSuchBucket:
		return say(fault.NotFound, "; make the bucket first, or correct its name")
	case "InvalidRange":
		return blob.ErrInvalidRange
	case "RequestTimeTooSkewed":
		return say(fault.Invalid, "; the clock of this machine or of the store is wrong: set it, with NTP for example")
	case "InvalidAccessKeyId", "SignatureDoesNotMatch", "AuthorizationHeaderMalformed", "XAdminUserNotFound": // the last is versitygw's
		if a.Code == "AuthorizationHeaderMalformed" && a.Region != "" {
			return say(fault.Invalid, "; set the signing region (s3-signing-region) to "+a.Region)
		}
		return say(fault.Invalid, "; check the access key, the secret key and the signing region")
	case "ExpiredToken", "InvalidToken", "TokenRefreshRequired":
		return say(fault.Invalid, "; get new temporary credentials with their session token")
	case "PermanentRedirect", "IllegalLocationConstraintException", "InvalidRegion":
		return say(fault.Invalid, "; check the endpoint and the signing region (s3-signing-region)")
	case "QuotaExceeded", "XMinioStorageFull", "InsufficientStorage", "ServiceQuotaExceededException", "EntityTooLarge":
		return say(fault.Exhausted, "; make room or raise the quota, or forget backups and run maintenance")
	case "BadDigest", "InvalidDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch":
		return say(fault.Corrupt, "; bytes changed on their way to the store: look at proxies, network cards and memory")
	case "SlowDown", "RequestTimeout", "RequestLimitExceeded", "Throttling", "OperationAborted", "IncompleteBody":
		return say(fault.Unavailable, "")
	case "NotImplemented", "MethodNotAllowed":
		return say(fault.Unsupported, "")
	}
	switch {
	case a.StatusCode == http.StatusInsufficientStorage:
		return say(fault.Exhausted, "; make room or raise the quota, or forget backups and run maintenance")
	case a.StatusCode == http.StatusUnauthorized, a.StatusCode == http.StatusForbidden:
		return say(fault.Invalid, "; these credentials must be allowed to list the bucket and to read, write and delete objects under the prefix")
	case a.StatusCode == http.StatusRequestedRangeNotSatisfiable:
		return blob.ErrInvalidRange
	case a.StatusCode == http.StatusNotFound:
		return say(fault.NotFound, "; check the endpoint")
	case a.StatusCode >= 500, a.StatusCode == http.StatusTooManyRequests, a.StatusCode == http.StatusRequestTimeout:
		return say(fault.Unavailable, "")
	case a.StatusCode >= 300:
		return say(fault.Invalid, "")
	}
	return say(fault.Unavailable, "") // an error in an answer that says success: it is garbled
}
