"""`python -m tessera.gateway.development_key` prints a new key for the setting `development_key`."""

import sys

from tessera.gateway.domain import keys

if __name__ == "__main__":
    sys.stdout.write(keys.generate("dev").reveal() + "\n")
