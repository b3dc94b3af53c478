"""Hooks of MkDocs (mkdocs.yml): pages that are kept elsewhere, what the code says of itself, and links that hold twice.

A page's links are those of the repository, so that they lead somewhere on GitHub too. Here each is turned into the link
of the site: to the page made from that file, or to the file in the repository where there is no such page.
"""

import logging
import posixpath
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import error_texts  # noqa: E402
import make_reference  # noqa: E402

logger = logging.getLogger("mkdocs.hooks.site")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["fastsd"]["repository"]
OUTSIDE = (
    "README.md",
    "CHANGELOG.md",
    "SECURITY.md",
    "CONTRIBUTING.md",
)  # pages of the site from the repository's root
_LINK = re.compile(r"(?<!`)(!?\[(?:[^\[\]]|\[[^\]]*\])*\])\(([^()\s]+)\)")
_FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
_SEARCH = 'data-md-component="search" role="dialog"'
_FILL = re.compile(r"<!-- (errors|settings): (\w+) -->")


def on_files(files: Any, config: Any) -> Any:
    """Add the results pages and those of the repository's root to the pages of docs/."""
    from mkdocs.structure.files import File

    for name in OUTSIDE[1:]:
        files.append(File.generated(config, name, content=(ROOT / name).read_text(encoding="utf-8")))
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.md")):
        files.append(File.generated(config, f"benchmarks/{path.name}", content=path.read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Fill in errors and settings, and turn the repository's links into the site's."""
    markdown = _FILL.sub(lambda mark: filled(mark[1], mark[2]), markdown)
    known = {file.src_uri for file in files}
    return with_site_links(markdown, page.file.src_uri, known)


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Say where a page would fetch something from elsewhere when it is opened: a strict build then fails."""
    for address in fetched_from_elsewhere(output):
        logger.warning("%s fetches %s when it is opened.", page.file.src_uri, address)
    output = with_named_search(output)
    # A drawing that scrolls is reached by keyboard too.
    return re.sub(r'<p>(?=<img [^>]*class="drawing")', '<p class="scrolls" tabindex="0">', output)


def on_post_template(output: str, template_name: str, config: Any) -> str:
    """The page for an address that is none has the theme's search too."""
    return with_named_search(output) if template_name.endswith(".html") else output


def with_named_search(html: str) -> str:
    """The theme's search has a role that needs a name, and has none."""
    return html.replace(_SEARCH, f'{_SEARCH} aria-label="Search"')


def fetched_from_elsewhere(html: str) -> list[str]:
    """Addresses of other machines that a browser asks for by itself: scripts, styles, fonts, images, frames."""
    tags = re.findall(r"<(?:script|link|img|iframe|source|video|audio)\b[^>]*>", html)
    tags = [tag for tag in tags if not re.search(r"rel=\"?(canonical|prev|next|alternate)", tag)]
    return [found[1] for tag in tags for found in re.finditer(r"(?:src|href)=[\"']?((?:https?:)?//[^\s\"'>]+)", tag)]


def filled(kind: str, name: str) -> str:
    """The errors of a class, or the table of a settings class, as Markdown."""
    if kind == "errors":
        return error_texts.as_markdown(name)
    return "\n".join(make_reference.settings_table(make_reference.settings_classes()[name]))


def with_site_links(markdown: str, page: str, known: set[str]) -> str:
    """The text with each relative link as the site has it; code is left as it is.

    Args:
        page: the page's path in the site, e.g. "how/gate.md".
        known: every page and file of the site.
    """
    parts = _FENCE.split(markdown)
    for place in range(0, len(parts), 2):
        parts[place] = _LINK.sub(lambda link: f"{link[1]}({site_link(link[2], page, known)})", parts[place])
    return "".join(parts)


def site_link(target: str, page: str, known: set[str]) -> str:
    """Where a link of a page leads in the site."""
    path, _, anchor = target.partition("#")
    if not path or re.match(r"[a-z]+:", path):
        return target
    here = posixpath.dirname(repository_path(page))
    wanted = posixpath.normpath(posixpath.join(here, path))
    site = site_path(wanted)
    end = f"#{anchor}" if anchor else ""
    if site in known:
        return posixpath.relpath(site, posixpath.dirname(page) or ".") + end
    if (ROOT / wanted).exists():
        return f"{PROJECT}/blob/main/{wanted}{end}"
    return target  # leads nowhere, which a strict build says


def repository_path(page: str) -> str:
    """The file that a page of the site is made from."""
    if page.startswith("benchmarks/"):
        return f"benchmarks/results/{posixpath.basename(page)}"
    return page if page in OUTSIDE else f"docs/{page}"


def site_path(file: str) -> str:
    """The page that is made from a file of the repository; README is the first one."""
    if file == "README.md":
        return "index.md"
    if file.startswith("benchmarks/results/"):
        return f"benchmarks/{posixpath.basename(file)}"
    return file.removeprefix("docs/") if file.startswith("docs/") else file
