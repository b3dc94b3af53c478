"""The `fastsd` command: the settings classes as flags, one function call per command, no logic of its own.

Standard output has the answer; progress goes to standard error. With `--json` the last line of standard output is one
JSON object. Exit codes: 0; 2 a mistake of the user (a sentence and a hint); 1 a failure of ours; 130 after Ctrl-C.
"""

from fastsd_helpers.cli.entry import main

__all__ = ["main"]
