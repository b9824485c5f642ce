"""What botocore raises: which errors are worth a retry, and each as an OSError of one line."""

import os
from typing import Any

CUSTOMER_KEY_FILE = "COVERGENRE_S3_CUSTOMER_KEY_FILE"
"""Environment variable with the path of the key (SSE-C) of everything that is read and written."""

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


class S3UnavailableError(OSError):
    """S3 is out of reach or refuses this process, no matter which object is requested."""


class TruncatedResponseError(Exception):
    """A response is shorter than it says, or lacks what it must have."""


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
        code, status = error_code(error), error.response["ResponseMetadata"].get("HTTPStatusCode")
        status = status or 0
        # Expired credentials: they may be about to be renewed.
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
    """`error` as an OSError that names the setting to check, without any secret.

    Raises `error` itself if it is none of botocore's.
    """
    from botocore import exceptions, parsers

    match error:
        case exceptions.ClientError():
            return _translate_response(error, endpoint)
        case exceptions.ProfileNotFound():
            return S3UnavailableError(f"{error}; check AWS_PROFILE")
        case exceptions.NoCredentialsError() | exceptions.PartialCredentialsError():
            return S3UnavailableError(
                "no AWS credentials; set AWS_PROFILE, or AWS_ACCESS_KEY_ID and"
                " AWS_SECRET_ACCESS_KEY, or give the machine an instance profile"
            )
        case exceptions.CredentialRetrievalError():
            # Its text contains the output of a credential_process.
            provider = error.kwargs.get("provider", "their provider")
            return S3UnavailableError(f"no AWS credentials from {provider}; check AWS_PROFILE")
        case exceptions.ParamValidationError():
            return OSError("not a valid name of a bucket or object")
        case exceptions.SSLError():
            return S3UnavailableError(
                f"{endpoint}: the TLS connection failed; check AWS_CA_BUNDLE and AWS_ENDPOINT_URL"
            )
        case exceptions.ConnectionError() | exceptions.HTTPClientError():
            return S3UnavailableError(no_response(endpoint))
        case (
            exceptions.IncompleteReadError()
            | parsers.ResponseParserError()
            | TruncatedResponseError()
        ):
            return S3UnavailableError(
                f"{endpoint}: its responses are truncated, or not those of an S3 server; check"
                " AWS_ENDPOINT_URL"
            )
        case exceptions.BotoCoreError():
            return S3UnavailableError(f"{error}; check the AWS settings".replace("\n", " "))
        case ValueError() if "endpoint" in str(error):
            return S3UnavailableError("AWS_ENDPOINT_URL is not an http(s) URL; correct it")
        case OSError():  # ours; some of botocore's are OSErrors too
            return error
    raise error


def no_bucket(endpoint: str) -> str:
    """The message for a bucket that does not exist."""
    return f"no such bucket at {endpoint}; check its name and AWS_ENDPOINT_URL"


def no_response(endpoint: str) -> str:
    """The message for a server that does not respond."""
    return (
        f"{endpoint} does not respond; check AWS_ENDPOINT_URL, the region (AWS_REGION), and the"
        " network"
    )


def _translate_response(error: Any, endpoint: str) -> OSError:
    """An error response of the server."""
    code, status = error_code(error), error.response["ResponseMetadata"].get("HTTPStatusCode")
    if code == "NoSuchBucket":
        return S3UnavailableError(no_bucket(endpoint))
    if code in _BAD_CREDENTIALS:
        return S3UnavailableError(
            f"the store refuses the credentials ({code}); check AWS_ACCESS_KEY_ID and"
            " AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        )
    if code in _WRONG_REGION:
        return S3UnavailableError(f"the bucket is in another region ({code}); check AWS_REGION")
    if code in ("404", "NoSuchKey"):
        return FileNotFoundError("no such file or directory")
    if code in ("403", "AccessDenied", "AllAccessDisabled", "Forbidden"):
        more = f" and {CUSTOMER_KEY_FILE}" if os.environ.get(CUSTOMER_KEY_FILE) else ""
        return PermissionError(f"access denied; check the permissions of the credentials{more}")
    if status == 412:
        return OSError("it changed while it was read")
    if status == 400 and code in ("400", "InvalidRequest", "InvalidArgument"):
        return OSError(
            f"the store refuses the request ({code}); check {CUSTOMER_KEY_FILE}: the object may be"
            " encrypted with another key, or with none"
        )
    # The code alone: the message of a response may repeat what was sent, secrets included.
    kind = S3UnavailableError if is_retryable(error) else OSError
    return kind(f"the store responds {code or status}")
