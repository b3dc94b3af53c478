"""What a link leads to: the Hub, CivitAI, Google Drive, GitHub or a plain address, and what each needs."""

import html.parser
import json
import os
import re
import string
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, parse_qsl, quote, unquote, urlencode, urljoin, urlsplit, urlunsplit

from fastsd_helpers.downloads.transfer import Answer, ask
from fastsd_helpers.errors import DownloadError
from fastsd_helpers.runtime import redact, remember_secret, secret

__all__ = [
    "HubFile",
    "Link",
    "confirm_drive",
    "find_link",
    "find_repo",
    "holds_secret",
    "is_link",
    "is_repo_name",
    "safe_name",
    "show_typed",
    "show_url",
    "token_for",
]

# Kept apart, so that tests can lead them to a server of their own.
_CIVITAI = "https://civitai.com"
_DRIVE = "https://drive.usercontent.google.com"
_CIVITAI_HOSTS = ("civitai.com", "civitai.green", "civitai.red")
_DRIVE_HOSTS = ("drive.google.com", "docs.google.com", "drive.usercontent.google.com")
_HUB_NAME = r"[A-Za-z0-9][\w.-]{0,95}"  # of an account or a repository
_HUB_ID = re.compile(rf"(?P<repo>{_HUB_NAME}/{_HUB_NAME})(@(?P<revision>[\w./-]+))?")
_HUB_PAGE = re.compile(
    rf"https?://(www\.)?(huggingface\.co|hf\.co)/(?P<repo>{_HUB_NAME}/{_HUB_NAME})(/tree/(?P<revision>[^/?#]+))?/?"
)
_HUB_FILE = re.compile(rf"/(?P<repo>{_HUB_NAME}/{_HUB_NAME})/(blob|resolve|raw)/(?P<revision>[^/]+)/(?P<file>.+)")
_SECRET_NAMES = {"access_token", "api-key", "api_key", "apikey", "auth", "key", "password", "token"}
_AS_TYPED = string.punctuation  # stays in an address as it is; "%" too, or %20 would become %2520
_CIVITAI_TOKEN_HINT = (
    "Make an API key at civitai.com (account settings) and set it as CIVITAI_TOKEN "
    "(environment variable, or a Colab or Kaggle secret)."
)


@dataclass(frozen=True)
class HubFile:
    """One file of a Hugging Face repository, at a commit or branch when `revision` names one."""

    repo: str
    file: str
    revision: str | None = None


@dataclass(frozen=True)
class Link:
    """Where a file is fetched from, and what its site says about it."""

    url: str
    token: str | None = field(default=None, repr=False)  # sent to this address only, never to where it redirects
    name: str | None = None
    size: int | None = None
    sha256: str | None = None
    site: str = "web"  # web, civitai, drive, github
    cookies: str | None = field(default=None, repr=False)


def find_repo(text: str) -> tuple[str, str | None] | None:
    """The repository of the Hub, and its revision if named, of `owner/name`, `owner/name@revision` or its page."""
    match = _HUB_ID.fullmatch(text) or _HUB_PAGE.fullmatch(text)
    return (match["repo"], match["revision"]) if match else None


def is_repo_name(text: str) -> bool:
    """Whether the Hub takes a text as the name of a repository, with or without its owner before it."""
    return bool(re.fullmatch(rf"({_HUB_NAME}/)?{_HUB_NAME}", text))


def is_link(text: str) -> bool:
    """Whether a text is a web address.

    Args:
        text: what a user typed.
    """
    return bool(re.match(r"https?://", text.strip(), re.IGNORECASE))


def holds_secret(text: str) -> bool:
    """Whether a web address has a token, a key or a password in it, so that it may not be written down.

    Args:
        text: a web address, or any other text.
    """
    if not is_link(text):
        return False
    address, _, query = text.strip().partition("?")
    userinfo = "@" in address.partition("//")[2].partition("/")[0]
    return userinfo or any(name.lower() in _SECRET_NAMES for name, _ in parse_qsl(query.partition("#")[0]))


def show_url(url: str) -> str:
    """An address as it may be shown: no user and password, no query (which can hold a token or a signature)."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return redact(urlunsplit((parts.scheme, host, parts.path, "…" if parts.query else "", "")))


def show_typed(text: str) -> str:
    """What a user typed where a link was expected, as it may be shown: whatever could be a secret is left out."""
    return redact(re.sub(r"//[^/@]*@", "//", re.sub(r"[?#].*", "?…", text, flags=re.DOTALL)))[:120]


def safe_name(name: str) -> str:
    """A file name that stays in its folder.

    Raises:
        DownloadError: it has a path in it, is hidden, empty, too long, or has characters that no disk likes.
    """
    if re.search(r"[/\\]", name) or name in ("", ".", "..") or name.startswith("."):
        raise DownloadError(
            f"'{name[:80]}' is not a file name: it points outside its folder, is hidden or is empty.",
            "Give a plain file name, such as model.safetensors.",
        )
    if len(name.encode()) > 200 or re.search(r'[\x00-\x1f<>:"|?*]', name):
        raise DownloadError(
            f"'{name[:80]}' is too long, or has characters that not every file system allows.",
            "Give a plain file name, such as model.safetensors.",
        )
    return name


def token_for(text: str) -> str | None:
    """The name of the token that a link may need, as `runtime.secret` knows it; None: none but the Hub's."""
    try:
        host = (urlsplit(text.strip()).hostname or "").removeprefix("www.").lower()
    except ValueError:
        return None
    return "CIVITAI_TOKEN" if host in _CIVITAI_HOSTS or text.strip().startswith(_CIVITAI) else None


def find_link(text: str) -> Link | HubFile:
    """Understand a web address; CivitAI is asked which file it means.

    Raises:
        DownloadError: it is not an address that can be fetched; the hint says what to paste instead.
    """
    text = text.strip()
    if not is_link(text) or re.search(r"\s", text):
        raise DownloadError(
            f"'{show_typed(text)}' is not a web address.", "Paste the whole link, beginning with https://."
        )
    try:
        parts = urlsplit(text)
        host = (parts.hostname or "").removeprefix("www.").lower()
        _ = parts.port
    except ValueError as err:
        raise DownloadError("That is not a web address: its host name is invalid.", "Paste the whole link.") from err
    if not host:
        raise DownloadError(f"'{show_url(text)}' has no host name.", "Paste the whole link.")
    if parts.username is not None or parts.password is not None:
        if parts.password:
            for password in (parts.password, unquote(parts.password)):  # as pasted, and as a site would show it
                remember_secret(password)
        raise DownloadError(
            f"The link to {host} contains a user and a password, which are never sent.",
            "Leave them out of the link; if the site requires a login, download the file in a browser and give its "
            "path.",
        )
    if host in ("huggingface.co", "hf.co") or host == urlsplit(os.environ.get("HF_ENDPOINT", "")).hostname:
        if match := _HUB_FILE.fullmatch(parts.path):
            return HubFile(match["repo"], unquote(match["file"]), unquote(match["revision"]))
        if re.fullmatch(rf"/{_HUB_NAME}/{_HUB_NAME}(/tree/.*)?/?", parts.path):
            raise DownloadError(
                f"{show_url(text)} is the page of a repository, not of a file.",
                "Open its tab 'Files', click the file and paste that link; or give owner/name as a model.",
            )
    if host in _CIVITAI_HOSTS or text.startswith(_CIVITAI):
        return _civitai(parts)
    if host in _DRIVE_HOSTS or text.startswith(_DRIVE):
        return _drive(parts)
    if host == "github.com":
        path = re.sub(r"^(/[^/]+/[^/]+)/blob/", r"\1/raw/", parts.path)
        return Link(_plain(urlunsplit(parts._replace(path=path))), site="github")
    return Link(_plain(text))


def _plain(url: str) -> str:
    """An address as it is sent: what is not ASCII in its path or query goes as %XX."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=quote(parts.path, safe=_AS_TYPED), query=quote(parts.query, safe=_AS_TYPED)))


# ------------------------------------------------------------------------------------------------- CivitAI


def _token(name: str, hint: str) -> str | None:
    token = secret(name)
    return None if token is None else _checked(token, name, hint)


def _checked(token: str, place: str, hint: str) -> str:
    if not re.fullmatch(r"[!-~]+", token):
        raise DownloadError(f"The token in {place} contains a space or an unusual character.", hint)
    return token


def _civitai(parts: Any) -> Link:
    """Ask CivitAI's API which file a page or a download link means. Source: CivitAI's public REST API, v1."""
    query = dict(parse_qsl(parts.query))
    typed = query.pop("token", "").strip()
    if typed:  # pasted into the link: it moves to a header, and out of every message
        remember_secret(typed)
        typed = _checked(typed, "the link", "Copy the token again, without spaces.")
    token = typed or _token("CIVITAI_TOKEN", _CIVITAI_TOKEN_HINT)
    model = re.match(r"/models/(\d+)", parts.path)
    version = query.get("modelVersionId")
    if match := re.match(r"/api/download/models/(\d+)|/model-versions/(\d+)|/api/v1/model-versions/(\d+)", parts.path):
        version = next(item for item in match.groups() if item)
    if (version is None and model is None) or (version is not None and not re.fullmatch(r"[0-9]+", version)):
        raise DownloadError(
            f"{show_url(parts.geturl())} is not the page of a model on CivitAI.",
            "Paste the model's page (civitai.com/models/...) or the address of its Download button.",
        )
    if version is None and model is not None:
        said = _ask_json(f"{_CIVITAI}/api/v1/models/{model[1]}", token)
        versions = said.get("modelVersions") or []
        if not versions:
            raise DownloadError("That model has no version to download on CivitAI.", "Choose another model.")
        about = versions[0]  # the newest is listed first
    else:
        about = _ask_json(f"{_CIVITAI}/api/v1/model-versions/{version}", token)
    return _civitai_file(about, query, token)


def _civitai_file(about: dict[str, Any], query: dict[str, str], token: str | None) -> Link:
    files = [file for file in about.get("files") or [] if file.get("downloadUrl")]
    if not files:
        raise DownloadError(
            "CivitAI lists no file for that version.",
            "It may be in early access or taken down: open its page and look, or choose another version.",
        )
    fitting = _wanted_of(files, query)
    file = max(
        fitting, key=lambda file: (bool(file.get("primary")), str(file.get("name", "")).endswith(".safetensors"))
    )
    sha256 = str((file.get("hashes") or {}).get("SHA256") or "").lower()
    url = urljoin(_CIVITAI, str(file["downloadUrl"]))
    if query.get("fileId") and "fileId=" not in url:  # two files may have one address but for this
        url += f"{'&' if '?' in url else '?'}{urlencode({'fileId': query['fileId']})}"
    host = (urlsplit(url).hostname or "").removeprefix("www.")
    return Link(
        url=url,
        token=token if host in (*_CIVITAI_HOSTS, urlsplit(_CIVITAI).hostname) else None,
        name=Path(str(file["name"])).name if file.get("name") else None,
        sha256=sha256 if re.fullmatch(r"[0-9a-f]{64}", sha256) else None,
        site="civitai",
    )


def _wanted_of(files: list[dict[str, Any]], query: dict[str, str]) -> list[dict[str, Any]]:
    """The files that a link means by fileId, type, format, size and fp, or a refusal that lists what there is."""

    def details(file: dict[str, Any]) -> dict[str, str]:
        found = {"fileId": file.get("id"), "type": file.get("type"), **(file.get("metadata") or {})}
        return {key: str(value).lower() for key, value in found.items() if value is not None}

    wanted = {key: query[key].lower() for key in ("fileId", "type", "format", "size", "fp") if query.get(key)}
    fitting = [file for file in files if all(details(file).get(key) == value for key, value in wanted.items())]
    if not fitting and "fileId" not in wanted:
        # Many a file says little of itself: one model that contradicts nothing is meant.
        kind = wanted.get("type", "model")
        alike = [file for file in files if details(file).get("type", "model") == kind]
        fitting = [
            file for file in alike if all(details(file).get(key, value) == value for key, value in wanted.items())
        ]
        fitting = fitting if len(fitting) == 1 else []
    if fitting:
        return fitting
    there = "; ".join(
        " ".join([str(file.get("name", "")), *(f"{key}={details(file).get(key, '-')}" for key in wanted)])
        for file in files[:8]
    )
    asked = ", ".join(f"{key}={value}" for key, value in wanted.items())
    raise DownloadError(
        f"That version on CivitAI has no file with {asked}.", f"It has: {there}. Change the link, or leave that out."
    )


def _ask_json(url: str, token: str | None) -> dict[str, Any]:
    answer = ask(url, token=token, limit=4_000_000)
    if answer.status == 404:
        raise DownloadError(
            f"CivitAI has no such model or version ({show_url(url)}).",
            "Open its page in a browser and paste that link.",
        )
    if answer.status in (401, 403):
        raise DownloadError("CivitAI requires a login to show that model.", _CIVITAI_TOKEN_HINT)
    try:
        said = json.loads(answer.body)
        if answer.status == 200 and isinstance(said, dict):
            return said
    except ValueError:
        pass
    raise DownloadError(
        f"CivitAI returned no usable answer ({answer.status}).", "Wait a few minutes and run this again."
    )


# -------------------------------------------------------------------------------------------- Google Drive


def _drive(parts: Any) -> Link:
    query = parse_qs(parts.query)
    match = re.search(r"/(?:file|document)/d/([\w-]{10,})", parts.path)
    found = match[1] if match else (query.get("id") or [""])[0]
    if "/folders/" in parts.path:
        raise DownloadError(
            "That link leads to a folder on Google Drive, not to a file.",
            "Share the one file and paste its link; or mount Drive and give the path.",
        )
    if not re.fullmatch(r"[\w-]{10,}", found):
        raise DownloadError(
            f"{show_url(parts.geturl())} names no file on Google Drive.",
            "Paste the link of 'Share > Copy link', which has /file/d/ in it.",
        )
    return Link(f"{_DRIVE}/download?{urlencode({'id': found, 'export': 'download', 'confirm': 't'})}", site="drive")


class _Form(html.parser.HTMLParser):
    """The download form of Google Drive's page about files too large to scan for viruses."""

    def __init__(self) -> None:
        super().__init__()
        self.action: str | None = None
        self.fields: dict[str, str] = {}
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect the form's address and hidden fields."""
        found = dict(attrs)
        if tag == "form" and found.get("id") in ("download-form", "downloadForm", None):
            self.action = found.get("action") or self.action
        if tag == "input" and found.get("type") == "hidden" and found.get("name"):
            self.fields[str(found["name"])] = found.get("value") or ""

    def handle_data(self, data: str) -> None:
        """Collect what the page says."""
        self.text += data


def confirm_drive(link: Link, page: Answer) -> Link:
    """Answer Google Drive's question whether to download a file it could not scan.

    Raises:
        DownloadError: the page asks something else: the file is private, over its quota, or gone.
    """
    form = _Form()
    form.feed(page.body.decode("utf-8", "replace"))
    if form.action and form.fields:
        action = urljoin(link.url, form.action)
        if urlsplit(action).hostname != urlsplit(link.url).hostname:
            raise DownloadError(
                "Google Drive's confirmation page leads to another host.", "Download it in a browser instead."
            )
        return replace(link, url=f"{action.partition('?')[0]}?{urlencode(form.fields)}", cookies=page.cookies)
    text = " ".join(form.text.split()).lower()
    if "quota" in text or "too many users" in text:
        raise DownloadError(
            "Google Drive has blocked this file for now: too many people downloaded it.",
            "Wait a day, or add the file to your own Drive, mount it and give the path.",
        )
    raise DownloadError(
        "Google Drive shows a page instead of the file: it is not shared with everyone who has the link.",
        "Set it to 'Anyone with the link', or mount Drive and give the path.",
    )
