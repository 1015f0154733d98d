"""What mkdocs does besides: pages and files of the repository that lie outside `docs/` become part of the site.

Markdown in this repository links to files as GitHub shows them (`../results/adapt.jsonl` from a page in `docs/`). On
the site such a link leads to the page that is made of that file, or to a copy of it. A link to what is not in the
repository stays as it is, and `mkdocs build --strict` refuses it.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "derivation.md": "src/titans_lm/ops/README.md",
}
"""Pages of the site that are files elsewhere in the repository."""
_SHIM = "https://unpkg.com/iframe-worker/shim"
_LINK = re.compile(r"(\]\()(?![a-z]+:|#|/)([^)#\s]+)")


def _source(page: str) -> str:
    """The file that a page is made of, from the repository's root."""
    return PAGES.get(page, f"docs/{page}")


def _target(page: str, link: str) -> str:
    """The file that a link of a page names, from the repository's root."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(_source(page)), link))


def _on_site(file: str) -> str:
    """Where a file of the repository is on the site, as mkdocs names its sources."""
    pages = {"README.md": "index.md", **{source: page for page, source in PAGES.items()}}
    return pages.get(file, file.removeprefix("docs/"))


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of `PAGES`, and every file that a page links to."""
    for page, source in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for page in [file.src_uri for file in files if file.src_uri.endswith(".md")]:
        for _, link in _LINK.findall((ROOT / _source(page)).read_text(encoding="utf-8")):
            file = _target(page, link)
            if (ROOT / file).is_file() and files.get_file_from_path(_on_site(file)) is None:
                files.append(File.generated(config, _on_site(file), abs_src_path=str(ROOT / file)))
    return files


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """The search's script comes from the site itself."""
    return output.replace(_SHIM, posixpath.relpath("iframe-worker.js", posixpath.dirname(page.url) or "."))


def on_post_template(output: str, **_: Any) -> str:
    """The same for the page that a server shows in place of a missing one."""
    return output.replace(_SHIM, "/iframe-worker.js")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as they are on the site."""
    here = posixpath.dirname(page.file.src_uri)

    def mapped(link: re.Match[str]) -> str:
        file = _target(page.file.src_uri, link[2])
        if not (ROOT / file).is_file():
            return link[0]
        return link[1] + posixpath.relpath(_on_site(file), here or ".")

    return _LINK.sub(mapped, markdown)
