"""Where things lie: the checkout, and the one folder that holds everything kept at run time."""

import os
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[5]
RECIPES = Path(__file__).resolve().parents[3]
ENVIRONMENT = CHECKOUT / ".tessera" / "venv"
"""Of Python. Always below the checkout, whose packages it links to, wherever `TESSERA_HOME` is."""
SETUP_LOCK = "setup.lock"


def home() -> Path:
    """`TESSERA_HOME`, else `.tessera` in the checkout. Not created here."""
    given = os.environ.get("TESSERA_HOME")
    return Path(given).resolve() if given else CHECKOUT / ".tessera"


def kept(*, with_downloads: bool = True) -> frozenset[str]:
    """Names in `home()` that are no trace of a platform: what `make setup` made, and what can be fetched again."""
    return frozenset({ENVIRONMENT.name, SETUP_LOCK} | ({cache().name} if with_downloads else set()))


def cache() -> Path:
    """What can be fetched or made again: Kafka's jars, the class data archive, uv."""
    return home() / "cache"
