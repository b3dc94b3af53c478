"""The guard of this web UI."""

from frame import run

__all__: list[str] = []

if __name__ == "__main__":
    run()
