"""The guard of this web UI."""

import api_login
from frame import run

__all__: list[str] = []

_USED = (api_login,)

if __name__ == "__main__":
    run()
