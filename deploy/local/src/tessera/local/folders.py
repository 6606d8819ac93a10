"""Where things lie: the checkout, and the one folder that holds everything kept at run time."""

import os
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[5]
RECIPES = Path(__file__).resolve().parents[3]


def home() -> Path:
    """`TESSERA_HOME`, else `.tessera` in the checkout. Not created here."""
    given = os.environ.get("TESSERA_HOME")
    return Path(given).resolve() if given else CHECKOUT / ".tessera"


def cache() -> Path:
    """What can be fetched or made again: Kafka's jars, the class data archive, uv."""
    return home() / "cache"
