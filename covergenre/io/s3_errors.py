"""The errors of botocore: which are worth a retry, and each as an OSError of one line."""

import os
from typing import Any

CUSTOMER_KEY_FILE = "COVERGENRE_S3_CUSTOMER_KEY_FILE"
"""Environment variable with the path of the key (SSE-C) that encrypts all objects."""

_BAD_CREDENTIALS = (
    *("AuthFailure", "ExpiredToken", "ExpiredTokenException", "InvalidAccessKeyId", "InvalidToken"),
    *("RequestExpired", "SignatureDoesNotMatch", "TokenRefreshRequired"),
)
_EXPIRED = ("ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired")
_WRONG_REGION = (
    *("301", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"),
    "PermanentRedirect",
)
_RETRYABLE = (
    *("BadDigest", "ConditionalRequestConflict", "IncompleteBody", "InternalError"),
    *("OperationAborted", "RequestTimeout", "ServiceUnavailable", "SlowDown", "Throttling"),
    *("ThrottlingException", "TooManyRequests", "RequestLimitExceeded"),
)


class S3Error(OSError):
    """A request to S3 failed. The message is one line, without secrets."""

    def __init__(self, message: str, code: str = "") -> None:
        super().__init__(message)
        self.code = code
        """The code of the StorageError that it becomes."""


class S3UnavailableError(S3Error):
    """S3 is unreachable or refuses this process, no matter which object is requested."""


class TruncatedResponseError(Exception):
    """A response is shorter than its Content-Length, or lacks a required field."""


def error_code(error: BaseException) -> str:
    """The code in S3's error response, such as "NoSuchKey"; "" for any other error."""
    response = getattr(error, "response", None)
    return str(response["Error"].get("Code", "")) if isinstance(response, dict) else ""


def is_expired(error: BaseException) -> bool:
    """Whether S3 refused credentials because they have expired."""
    return error_code(error) in _EXPIRED


def is_retryable(error: BaseException) -> bool:
    """Whether the same request may succeed a little later."""
    from botocore import exceptions, parsers

    if isinstance(error, exceptions.SSLError):
        return "CERTIFICATE" not in str(error)
    if isinstance(error, exceptions.ClientError):
        code = error_code(error)
        status = error.response["ResponseMetadata"].get("HTTPStatusCode") or 0
        # Expired credentials may be about to be renewed.
        return code in _RETRYABLE + _EXPIRED or status == 429 or (status >= 500 and status != 501)
    return isinstance(
        error,
        exceptions.CredentialRetrievalError
        | exceptions.MetadataRetrievalError
        | exceptions.ConnectionError
        | exceptions.HTTPClientError
        | exceptions.IncompleteReadError
        | parsers.ResponseParserError
        | TruncatedResponseError,
    )


def translate(error: Exception, endpoint: str) -> OSError:
    """An error of botocore as an OSError that names the setting to check, without any secret.

    endpoint: URL of the S3 server. Raises any other `error` itself.
    """
    from botocore import exceptions, parsers

    match error:
        case exceptions.ClientError():
            return _translate_response(error, endpoint)
        case exceptions.ProfileNotFound():
            return S3UnavailableError(f"{error}; check AWS_PROFILE", "no_profile")
        case exceptions.NoCredentialsError() | exceptions.PartialCredentialsError():
            return S3UnavailableError(
                "no AWS credentials; set AWS_PROFILE, or AWS_ACCESS_KEY_ID and"
                " AWS_SECRET_ACCESS_KEY, or give the machine an instance profile",
                "no_credentials",
            )
        case exceptions.CredentialRetrievalError():
            # Its text contains the output of a credential_process.
            provider = error.kwargs.get("provider", "their provider")
            return S3UnavailableError(
                f"no AWS credentials from {provider}; check AWS_PROFILE", "no_credentials"
            )
        case exceptions.ParamValidationError():
            return S3Error("not a valid name of a bucket or object", "invalid_name")
        case exceptions.SSLError():
            return S3UnavailableError(
                f"{endpoint}: the TLS connection failed; check AWS_CA_BUNDLE and AWS_ENDPOINT_URL",
                "tls",
            )
        case exceptions.ConnectionError() | exceptions.HTTPClientError():
            return no_response(endpoint)
        case (
            exceptions.IncompleteReadError()
            | parsers.ResponseParserError()
            | TruncatedResponseError()
        ):
            return S3UnavailableError(
                f"{endpoint}: its responses are truncated, or not those of an S3 server; check"
                " AWS_ENDPOINT_URL",
                "invalid_response",
            )
        case exceptions.BotoCoreError():
            return S3UnavailableError(f"{error}; check the AWS settings".replace("\n", " "))
        case ValueError() if "endpoint" in str(error):
            return S3UnavailableError(
                "AWS_ENDPOINT_URL is not an http(s) URL; correct it", "invalid_endpoint"
            )
        case OSError():  # ours; some of botocore's are OSErrors too
            return error
    raise error


def no_bucket(endpoint: str) -> S3UnavailableError:
    """The error for a bucket that does not exist."""
    return S3UnavailableError(
        f"no such bucket at {endpoint}; check its name and AWS_ENDPOINT_URL", "no_bucket"
    )


def no_response(endpoint: str) -> S3UnavailableError:
    """The error for a server that does not respond."""
    return S3UnavailableError(
        f"{endpoint} does not respond; check AWS_ENDPOINT_URL, the region (AWS_REGION), and the"
        " network",
        "no_response",
    )


def _translate_response(error: Any, endpoint: str) -> OSError:
    """An error response of the server."""
    code, status = error_code(error), error.response["ResponseMetadata"].get("HTTPStatusCode")
    if code == "NoSuchBucket":
        return no_bucket(endpoint)
    if code in _BAD_CREDENTIALS:
        return S3UnavailableError(
            f"S3 refuses the credentials ({code}); check AWS_ACCESS_KEY_ID and"
            " AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
            "bad_credentials",
        )
    if code in _WRONG_REGION:
        return S3UnavailableError(
            f"the bucket is in another region ({code}); check AWS_REGION", "wrong_region"
        )
    if code in ("404", "NoSuchKey"):
        return FileNotFoundError("no such file or directory")
    if code in ("403", "AccessDenied", "AllAccessDisabled", "Forbidden"):
        more = f" and {CUSTOMER_KEY_FILE}" if os.environ.get(CUSTOMER_KEY_FILE) else ""
        return S3Error(
            f"access denied; check the permissions of the credentials{more}", "access_denied"
        )
    if status == 412:
        return S3Error("the object changed while it was read", "changed")
    if status == 400 and code in ("400", "InvalidRequest", "InvalidArgument"):
        return S3Error(
            f"S3 refuses the request ({code}); check {CUSTOMER_KEY_FILE}: the object may be"
            " encrypted with another key, or with none",
            "customer_key",
        )
    # The code alone: the message of a response may repeat what was sent, secrets included.
    kind = S3UnavailableError if is_retryable(error) else S3Error
    return kind(f"S3 responds {code or status}")
