"""Plain text from files, folders and installed packages, for haystacks and for distillation.

Nothing is downloaded and nothing is kept: texts are read where they are installed.
"""

import gzip
import hashlib
import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

PART_CHARS = 50_000
PART_MARK = "#"
LEAST_PARTS_TO_DIVIDE = 10

SUFFIXES = (".txt", ".md", ".rst", ".html", ".htm", ".py")
DOC_ROOT = Path("/usr/share/doc")


@dataclass(frozen=True)
class Document:
    """A text and its name: source and file, and for a part of a long file `#` and the part's number."""

    name: str
    text: str

    @property
    def file(self) -> str:
        return self.name.rpartition(PART_MARK)[0] or self.name


@dataclass(frozen=True)
class Package:
    """Where an installed Debian package keeps its text: files below `folder` that match `pattern`.

    One pattern each, since the packages hold the same text in several formats or languages.
    """

    name: str
    folder: Path
    pattern: str


PACKAGES = {
    package.name: package
    for package in (
        Package("anarchism", DOC_ROOT / "anarchism/html", "*.html"),
        Package("python3.11-doc", DOC_ROOT / "python3.11/html/_sources", "**/*.rst.txt"),
        Package("linux-doc-6.1", DOC_ROOT / "linux-doc-6.1/Documentation", "**/*.rst.gz"),
        Package("debian-handbook", DOC_ROOT / "debian-handbook/html/en-US", "*.html"),
    )
}
BIBLE = "bible-kjv-text"
BUILTIN_ORDER = ("anarchism", BIBLE, "python3.11-doc", "linux-doc-6.1", "debian-handbook", "stdlib")
NAMED_SOURCES = (*BUILTIN_ORDER, "builtin")


def documents(sources: str | Path | Iterable[str | Path] = "builtin") -> list[Document]:
    """The texts of all sources, each source's in a fixed order; no text twice.

    A source is a file or folder of .txt .md .rst .html .py (also .gz), an installed package by name (`PACKAGES` and
    "bible-kjv-text"), "stdlib" (the sources of Python's standard library), or "builtin": the first of `BUILTIN_ORDER`
    that is installed. A file longer than 1.5 x 50,000 characters is cut at its paragraphs into parts of about 50,000.
    FileNotFoundError says what is missing and, for a package, the command that installs it.
    """
    names = [sources] if isinstance(sources, str | Path) else list(sources)
    unique: dict[str, Document] = {}
    for source in names:
        for file, text in _read_source(str(source)):
            for document in _parts(file, text):
                unique.setdefault(hashlib.sha256(document.text.encode()).hexdigest(), document)
    counts = Counter(document.name for document in unique.values())
    if twice := [name for name, count in counts.items() if count > 1]:
        raise ValueError(f"sources must give distinct names, got {twice[0]!r} twice: rename one of the folders")
    if not unique:
        raise ValueError(f"sources must hold text, got none in {', '.join(map(str, names)) or 'an empty list'}")
    return list(unique.values())


def split(
    documents: Sequence[Document], validation_fraction: float, seed: int
) -> tuple[list[Document], list[Document]]:
    """Training and validation documents, in their given order; none is in both.

    Files of fewer than ten parts go whole to one side: they are held out in the order of a hash of seed and name, as
    many as come nearest to `validation_fraction` of their characters (files added later move only those at the end of
    the row). Of a longer file, one run of adjacent parts is held out, at a place that the hash chooses, so that
    neighbouring parts are separated at the run's two ends only. Neither side is empty unless the fraction is 0.
    """
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"validation_fraction must be in [0, 1), got {validation_fraction}")
    if len({document.name for document in documents}) < len(documents):
        raise ValueError("documents must have distinct names, got one twice")
    if validation_fraction == 0:
        return list(documents), []
    by_file: dict[str, list[Document]] = {}
    for document in documents:
        by_file.setdefault(document.file, []).append(document)
    places = {file: _unit_interval(f"{seed}/{file}") for file in by_file}
    whole = sorted((file for file, parts in by_file.items() if len(parts) < LEAST_PARTS_TO_DIVIDE), key=places.get)
    held_out: set[str] = set()
    for file in by_file.keys() - set(whole):
        parts = by_file[file]
        run = min(max(1, round(validation_fraction * len(parts))), len(parts) - 1)
        start = int(places[file] * (len(parts) - run + 1))
        held_out.update(part.name for part in parts[start : start + run])
    sizes = {file: sum(len(part.text) for part in by_file[file]) for file in whole}
    chosen = _nearest_sum(whole, sizes, validation_fraction * sum(sizes.values()))
    if not held_out:
        if len(whole) < 2:
            raise ValueError(
                f"documents must come from two files or be ten parts of one to be split, got {len(documents)}"
            )
        chosen = (chosen or whole[:1])[: len(whole) - 1]
    held_out.update(part.name for file in chosen for part in by_file[file])
    training = [document for document in documents if document.name not in held_out]
    return training, [document for document in documents if document.name in held_out]


def _nearest_sum(files: list[str], sizes: dict[str, int], target: float) -> list[str]:
    """Files taken in order while each brings the sum of sizes nearer to the target."""
    chosen: list[str] = []
    total = 0
    for file in files:
        if total + sizes[file] / 2 <= target:
            chosen.append(file)
            total += sizes[file]
    return chosen


def _unit_interval(name: str) -> float:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def _read_source(source: str) -> Iterator[tuple[str, str]]:
    if source == "builtin":
        source = next(name for name in BUILTIN_ORDER if _installed(name))
    if source == "stdlib":
        return _standard_library()
    if source == BIBLE:
        return _bible()
    if source in PACKAGES:
        if not _installed(source):
            raise FileNotFoundError(f"no text of package {source!r}: run `apt-get install {source}`")
        package = PACKAGES[source]
        return _read_files(source, package.folder, sorted(package.folder.glob(package.pattern)))
    path = Path(source).expanduser()
    if path.is_file():
        if not _readable(path):
            raise ValueError(f"a source file must end in {' '.join(SUFFIXES)} or .gz, got {source!r}")
        return _read_files(path.resolve().parent.name, path.parent, [path])
    if path.is_dir():
        return _read_files(path.resolve().name, path, sorted(file for file in path.rglob("*") if _readable(file)))
    raise FileNotFoundError(
        f"a source must be an existing file or folder or one of {', '.join(NAMED_SOURCES)}, got {source!r}"
    )


def _installed(name: str) -> bool:
    if name == BIBLE:
        return shutil.which("bible") is not None
    return name == "stdlib" or any(PACKAGES[name].folder.glob(PACKAGES[name].pattern))


def _readable(path: Path) -> bool:
    inner = Path(path.name.removesuffix(".gz")).suffix
    return path.is_file() and (inner in SUFFIXES or (inner == "" and path.suffix == ".gz"))


def _read_files(source: str, folder: Path, paths: Iterable[Path]) -> Iterator[tuple[str, str]]:
    for path in paths:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        if b"\0" in content:
            continue
        text = content.decode("utf-8", errors="replace")
        if path.name.removesuffix(".gz").endswith((".html", ".htm")):
            text = html_text(text)
        yield f"{source}/{path.relative_to(folder).as_posix()}", text


def _standard_library() -> Iterator[tuple[str, str]]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "encodings", "__pycache__", "pydoc_data"}
    paths = (path for path in sorted(folder.rglob("*.py")) if not skipped & set(path.relative_to(folder).parts))
    return _read_files("stdlib", folder, paths)


def _bible() -> Iterator[tuple[str, str]]:
    """One text per book, printed by the reader that understands the compressed form in which it is installed."""
    if not _installed(BIBLE):
        raise FileNotFoundError(f"no text of package {BIBLE!r}: run `apt-get install bible-kjv {BIBLE}`")
    command = ["bible", "-f", "Gen1:1-Rev22:21"]
    verses = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True).stdout
    books: dict[str, list[str]] = {}
    chapter = ""
    for line in verses.splitlines():
        reference, _, verse = line.partition(" ")
        if (place := re.match(r"(\d?[A-Za-z]+)(\d+):", reference)) is None:
            raise ValueError(f"{command[0]} must print one verse a line, got {line!r}")
        book, number = place.groups()
        lines = books.setdefault(book, [])
        if lines and number != chapter:
            lines.append("")
        lines.append(verse.strip())
        chapter = number
    return ((f"{BIBLE}/{place:02d}-{book}", "\n".join(lines)) for place, (book, lines) in enumerate(books.items(), 1))


def _parts(name: str, text: str) -> Iterator[Document]:
    text = text.strip()
    if not text:
        return
    count = round(len(text) / PART_CHARS) if len(text) > 1.5 * PART_CHARS else 1
    if count == 1:
        yield Document(name, text)
        return
    start = 0
    for number in range(1, count + 1):
        end = len(text) if number == count else _cut(text, start, round(len(text) * number / count))
        yield Document(f"{name}{PART_MARK}{number:04d}", text[start:end].strip())
        start = end


def _cut(text: str, start: int, target: int) -> int:
    for separator in ("\n\n", "\n", " "):
        place = text.rfind(separator, max(start, target - PART_CHARS // 4), target)
        if place > start:
            return place
    return target


def html_text(html: str) -> str:
    """The text of a page: paragraphs separated by blank lines, without tags, scripts and styles."""
    reader = _HtmlText()
    reader.feed(html)
    reader.close()
    return "\n\n".join(reader.paragraphs())


class _HtmlText(HTMLParser):
    HIDDEN = frozenset({"script", "style", "title"})
    BLOCKS = frozenset(
        "address article blockquote body br dd div dl dt footer h1 h2 h3 h4 h5 h6 head header hr html li main nav ol p "
        "pre section table td th tr ul".split()
    )

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._done: list[str] = []
        self._open: list[str] = []
        self._depth = {"hidden": 0, "pre": 0}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._edge(tag, +1)

    def handle_endtag(self, tag: str) -> None:
        self._edge(tag, -1)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._edge(tag, 0)

    def handle_data(self, data: str) -> None:
        if not self._depth["hidden"]:
            self._open.append(data)

    def _edge(self, tag: str, change: int) -> None:
        if tag in self.BLOCKS:
            self._finish()
        for kind, member in (("hidden", tag in self.HIDDEN), ("pre", tag == "pre")):
            self._depth[kind] = max(0, self._depth[kind] + change * member)

    def _finish(self) -> None:
        text = "".join(self._open)
        text = text.strip("\n").rstrip() if self._depth["pre"] else " ".join(text.split())
        if text:
            self._done.append(text)
        self._open = []

    def paragraphs(self) -> list[str]:
        self._finish()
        return self._done
