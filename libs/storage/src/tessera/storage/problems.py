"""One line for a person about what went wrong in a command."""

from pydantic import ValidationError


def explained(error: Exception) -> str:
    """The error without its type's noise; for settings, every wrong value."""
    if isinstance(error, ValidationError):
        return "; ".join(
            f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors(include_input=False, include_url=False)
        )
    return (str(error) or type(error).__name__).splitlines()[0]
