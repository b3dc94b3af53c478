"""Compare models.toml and controlnets.toml with the Hugging Face Hub: sizes, hashes, commits; run it before a release.

    python scripts/check_registry.py              # says what differs; ends with 1 when anything does
    python scripts/check_registry.py --write      # also notes today's date in the rows that agree, and what was missing

It needs the network and, for gated rows, HF_TOKEN. Nothing is downloaded: the Hub's answers to HEAD name each file's
size and sha256. Rows never compared say `checked = "never"`.
"""

import argparse
import datetime
import logging
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fastsd_helpers.controlnet import controlnets  # noqa: E402
from fastsd_helpers.downloads.hub import network_errors  # noqa: E402
from fastsd_helpers.registry import models  # noqa: E402
from fastsd_helpers.runtime import redact, secret  # noqa: E402

PACKAGE = ROOT / "fastsd_helpers"


def files_to_check() -> list[tuple[str, str, str, str, str | None, int | None, str | None]]:
    """(table, key, repo, file, revision, bytes, sha256) of every single file the tables name."""
    found = []
    for spec in models(None):
        about = spec.checkpoint
        if about:
            found.append(
                ("models", spec.key, about["repo"], about["file"], None, about.get("bytes"), about.get("sha256"))
            )
    for row in controlnets():
        size = row.bytes if row.bytes_exact else None
        found.append(("controlnets", row.key, row.repo, row.file, row.revision, size, row.sha256))
    return found


def no_answer(err: Exception) -> str:
    """What the Hub refused, in words; without a connection this ends, since no row can be judged."""
    from huggingface_hub.errors import HfHubHTTPError

    why = redact(" ".join(str(err).split()))[:160]
    if not isinstance(err, HfHubHTTPError):
        sys.exit(f"The Hub cannot be reached ({why}): check the network and HF_ENDPOINT. Nothing was written.")
    return f"no answer: {why}"


def compare(repo: str, file: str, revision: str | None, size: int | None, sha256: str | None) -> tuple[list[str], dict]:
    """What differs, in words, and what the Hub said."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # versions before 1 also warn of every try
    try:
        said = get_hf_file_metadata(hf_hub_url(repo, file, revision=revision), token=secret("HF_TOKEN"))
    except (OSError, *network_errors()) as err:
        return [no_answer(err)], {}
    found = {"bytes": said.size, "sha256": said.etag if said.etag and len(said.etag) == 64 else None}
    problems = []
    if size is not None and said.size is not None and size != said.size:
        problems.append(f"{said.size} bytes there, {size} here")
    if sha256 and found["sha256"] and sha256 != found["sha256"]:
        problems.append(f"sha256 {found['sha256'][:12]}… there, {sha256[:12]}… here")
    return problems, found


def check_repositories() -> list[str]:
    """Whether every repository of the sources is there, at its commit."""
    from huggingface_hub import HfApi

    api, problems = HfApi(token=secret("HF_TOKEN")), []
    for spec in models(None):
        for source in spec.sources:
            try:
                api.model_info(source.repo, revision=source.revision)
            except (OSError, *network_errors()) as err:
                problems.append(f"{spec.key}: {source.repo}: {no_answer(err)}")
    return problems


def note_date(text: str, key: str, today: str, found: dict) -> str:
    """The table's text with today's date in one row, and with an exact size and hash where it had none."""
    table = re.compile(rf"(?ms)^\[{re.escape(key)}\]\n.*?(?=^\[(?!\[?{re.escape(key)}\.)|\Z)")
    match = table.search(text)
    row = match[0]
    if re.search(r"(?m)^checked = ", row):
        row = re.sub(r'(?m)^checked = ".*"$', f'checked = "{today}"', row)
    else:
        row = row.rstrip("\n") + f'\nchecked = "{today}"\n\n'
    file_line = re.search(r'(?m)^file = ".*"$', row)
    if file_line and found.get("bytes") and not re.search(r"(?m)^bytes = ", row):
        row = re.sub(r"(?m)^about_bytes = .*\n", "", row)
        row = row.replace(file_line[0], f"{file_line[0]}\nbytes = {found['bytes']}")
    if file_line and found.get("sha256") and not re.search(r"(?m)^sha256 = ", row):
        row = row.replace(file_line[0], f'{file_line[0]}\nsha256 = "{found["sha256"]}"')
    return text[: match.start()] + row + text[match.end() :]


def main() -> int:
    """Compare everything; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="note the date in the rows that agree")
    chosen = parser.parse_args()
    today = datetime.date.today().isoformat()
    texts = {name: (PACKAGE / f"{name}.toml").read_text(encoding="utf-8") for name in ("models", "controlnets")}
    wrong = check_repositories()
    agreed = 0
    for table, key, repo, file, revision, size, sha256 in files_to_check():
        problems, found = compare(repo, file, revision, size, sha256)
        wrong += [f"{key}: {file} of {repo}: {problem}" for problem in problems]
        if not problems:
            agreed += 1
            texts[table] = note_date(texts[table], key, today, found)
    print("\n".join(wrong) if wrong else "Everything agrees.")
    print(f"{agreed} files agree, {len(wrong)} differences.")
    if chosen.write:
        for name, text in texts.items():
            (PACKAGE / f"{name}.toml").write_text(text, encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
