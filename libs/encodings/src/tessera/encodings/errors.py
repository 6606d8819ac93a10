"""What can be wrong with an encoding, a text or a list of tokens.

EncodingsError (ValueError)
├── UnknownEncodingError   no such encoding
├── UnknownTemplateError   no such chat template
├── PromptShapeError       messages given to a template that takes text only
├── UnencodableTextError   the text holds lone surrogates, which UTF-8 cannot express
├── UnknownTokenError      an id that the encoding does not have
├── IncompleteTextError    the tokens end or begin inside a character
└── CorruptRanksError      the vendored ranks are not the published ones: never go on
"""


class EncodingsError(ValueError):
    """Base of the errors of this library; `code` is machine-readable and stable."""

    code = "invalid_tokens"


class UnknownEncodingError(EncodingsError):
    """No encoding of that name is vendored."""

    code = "unknown_encoding"


class UnknownTemplateError(EncodingsError):
    """No chat template of that name."""

    code = "unknown_template"


class PromptShapeError(EncodingsError):
    """The template counts plain text and was given messages."""

    code = "messages_not_supported"


class UnencodableTextError(EncodingsError):
    """The text holds a lone surrogate; encoding it would silently change it."""

    code = "unencodable_text"


class UnknownTokenError(EncodingsError):
    """A token id that the encoding does not have."""

    code = "unknown_token"


class IncompleteTextError(EncodingsError):
    """The bytes of the tokens are not whole characters."""

    code = "incomplete_text"


class CorruptRanksError(EncodingsError):
    """The vendored file is not the published one."""

    code = "corrupt_ranks"
