"""What the client raises.

TesseraError
└── ClientError
    ├── UnreachableError   no answer: nothing listens, the connection broke, or it took too long
    └── AnswerError        the server refused; status, code, param and request id say what and where
"""

from tessera.contracts.errors import TesseraError


class ClientError(TesseraError):
    """Base of everything that the client raises."""


class UnreachableError(ClientError):
    """No answer came."""

    code = "unreachable"


class AnswerError(ClientError):
    """The server answered with an error object."""

    def __init__(self, status: int, code: str, message: str, *, param: str | None = None, request_id: str | None = None) -> None:
        super().__init__(message, code=code)
        self.status = status
        self.param = param
        self.request_id = request_id

    def __str__(self) -> str:
        where = f" ({self.param})" if self.param else ""
        request = f" [request {self.request_id}]" if self.request_id else ""
        return f"{self.status} {self.code}{where}: {self.message}{request}"
