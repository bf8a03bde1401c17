import gzip
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npu_sparse.tasks import texts
from npu_sparse.tasks.texts import Document, documents, split


def test_folder_gives_one_document_a_file_in_order(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.md").write_text("first")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.rst.gz").write_bytes(gzip.compress(b"third"))
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "data.txt").write_bytes(b"not\0text")
    (tmp_path / "empty.txt").write_text(" \n")
    names = [f"{tmp_path.name}/{name}" for name in ("a.md", "b.txt", "sub/c.rst.gz")]
    assert documents(tmp_path) == [Document(*pair) for pair in zip(names, ("first", "second", "third"))]


def test_html_loses_tags_and_keeps_paragraphs_and_code(tmp_path):
    page = tmp_path / "page.html"
    page.write_text(
        "<html><head><title>no</title><style>p {}</style></head><body><h1>Title</h1><script>var x;</script>"
        "<p>One &amp;\n <b>bold</b> line.</p><p>Two.<br/>Three.</p><pre>if x:\n    y()</pre></body></html>"
    )
    assert documents(page)[0].text == "Title\n\nOne & bold line.\n\nTwo.\n\nThree.\n\nif x:\n    y()"


def test_same_text_is_read_once(tmp_path):
    (tmp_path / "a.txt").write_text("same")
    (tmp_path / "b.txt").write_text("same\n")
    assert [document.name for document in documents([tmp_path, tmp_path])] == [f"{tmp_path.name}/a.txt"]


def test_two_files_of_one_name_are_refused(tmp_path):
    for place in ("x", "y"):
        (tmp_path / place / "docs").mkdir(parents=True)
        (tmp_path / place / "docs" / "a.txt").write_text(place)
    with pytest.raises(ValueError, match="distinct names, got 'docs/a.txt' twice"):
        documents([tmp_path / "x" / "docs", tmp_path / "y" / "docs"])


def test_long_file_is_cut_at_paragraphs_and_nothing_is_lost(tmp_path):
    paragraphs = [f"Paragraph {i}. " + "word " * 100 for i in range(1000)]
    (tmp_path / "long.txt").write_text("\n\n".join(paragraphs))
    parts = documents(tmp_path)
    assert len(parts) == 10 and {part.file for part in parts} == {f"{tmp_path.name}/long.txt"}
    assert all(part.text.startswith("Paragraph") for part in parts)
    assert all(0.7 * texts.PART_CHARS < len(part.text) < 1.3 * texts.PART_CHARS for part in parts)
    joined = " ".join(" ".join(part.text for part in parts).split())
    assert joined == " ".join(" ".join(paragraphs).split())


def test_text_without_spaces_is_cut_all_the_same(tmp_path):
    (tmp_path / "solid.txt").write_text("".join(f"{i:08d}" for i in range(25_000)))
    assert [len(part.text) for part in documents(tmp_path)] == [50_000] * 4


def test_missing_package_names_the_command(monkeypatch, tmp_path):
    monkeypatch.setitem(texts.PACKAGES, "anarchism", texts.Package("anarchism", tmp_path, "*.html"))
    with pytest.raises(FileNotFoundError, match="run `apt-get install anarchism`"):
        documents("anarchism")
    monkeypatch.setattr(texts.shutil, "which", lambda command: None)
    with pytest.raises(FileNotFoundError, match="run `apt-get install bible-kjv bible-kjv-text`"):
        documents("bible-kjv-text")


def test_builtin_is_the_standard_library_where_no_package_is_installed(monkeypatch):
    monkeypatch.setattr(texts, "_installed", lambda name: name == "stdlib")
    monkeypatch.setattr(texts, "_standard_library", lambda: iter([("stdlib/ast.py", "tree")]))
    assert documents("builtin") == [Document("stdlib/ast.py", "tree")]


def test_standard_library_is_always_there():
    read = documents("stdlib")
    assert sum(len(document.text) for document in read) > 2_000_000
    assert not any("site-packages" in document.name for document in read)


@pytest.mark.parametrize("name", [*texts.PACKAGES, texts.BIBLE])
def test_installed_package_gives_clean_english_text(name):
    if not texts._installed(name):
        pytest.skip(f"package {name!r} is not installed")
    read = documents(name)
    text = "\n".join(document.text for document in read)
    assert len(read) > 50 and len(text) > 400_000
    assert len(re.findall(r"\bthe\b", text)) / len(text.split()) > 0.03
    assert len(re.findall(r"</?(p|div|a|td|span)\b", text)) < 1e-4 * len(text.split())
    assert max(len(document.text) for document in read) <= 1.5 * texts.PART_CHARS


@pytest.mark.parametrize(
    "source, error, sentence",
    [
        ("no-such-place", FileNotFoundError, "a source must be an existing file or folder or one of anarchism, "),
        ([], ValueError, "sources must hold text, got none"),
    ],
)
def test_bad_sources_are_refused(source, error, sentence):
    with pytest.raises(error, match=re.escape(sentence)):
        documents(source)


def test_unreadable_suffix_is_refused(tmp_path):
    (tmp_path / "a.pdf").write_text("x")
    with pytest.raises(ValueError, match="a source file must end in .txt"):
        documents(tmp_path / "a.pdf")
    with pytest.raises(ValueError, match="sources must hold text"):
        documents(tmp_path)


def corpus(parts_of_files: list[int]) -> list[Document]:
    return [
        Document(f"file{f}" if parts == 1 else f"file{f}#{part:04d}", f"{f}/{part}")
        for f, parts in enumerate(parts_of_files)
        for part in range(1, parts + 1)
    ]


@settings(max_examples=200, deadline=None)
@given(
    parts=st.lists(st.integers(1, 40), min_size=2, max_size=30),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 10**9),
)
def test_split_never_overlaps_and_cuts_a_file_at_most_twice(parts, fraction, seed):
    everything = corpus(parts)
    training, validation = split(everything, fraction, seed)
    assert training and validation
    assert sorted(training + validation, key=everything.index) == everything
    assert not {d.name for d in training} & {d.name for d in validation}
    held_out = {document.name for document in validation}
    for file, count in enumerate(parts):
        sides = [document.name in held_out for document in everything if document.file == f"file{file}"]
        changes = sum(a != b for a, b in zip(sides, sides[1:]))
        assert changes <= (2 if count >= texts.LEAST_PARTS_TO_DIVIDE else 0)


def test_split_of_a_single_long_file_holds_out_one_run():
    training, validation = split(corpus([50]), 0.1, seed=0)
    numbers = [int(document.name[-4:]) for document in validation]
    assert len(training) == 45 and numbers == list(range(numbers[0], numbers[0] + 5))


def test_split_moves_few_files_when_some_are_added():
    few, many = corpus([1] * 200), corpus([1] * 210)
    before, after = ({d.name for d in split(files, 0.2, 7)[1]} for files in (few, many))
    kept = {document.name for document in few}
    assert len(before ^ (after & kept)) <= 10


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([1, 10, 100, 1000, 10_000]), min_size=20, max_size=60),
    fraction=st.floats(0.05, 0.5),
    seed=st.integers(0, 10**9),
)
def test_split_follows_the_fraction_in_characters(sizes, fraction, seed):
    everything = [Document(f"file{i}", "x" * size) for i, size in enumerate(sizes)]
    training, validation = split(everything, fraction, seed)
    held_out = sum(len(document.text) for document in validation)
    assert abs(held_out - fraction * sum(sizes)) <= max(sizes) / 2 or len(validation) == 1


def test_split_depends_on_the_seed():
    everything = corpus([1] * 100)
    assert split(everything, 0.2, 0) != split(everything, 0.2, 1)
    assert split(everything, 0.2, 0) == split(everything, 0.2, 0)
    assert split(everything, 0, 0) == (everything, [])


@pytest.mark.parametrize(
    "everything, fraction, sentence",
    [
        (corpus([1]), 0.1, "documents must come from two files or be ten parts of one"),
        (corpus([1, 1]), 1.0, "validation_fraction must be in [0, 1), got 1.0"),
        (corpus([1]) * 2, 0.1, "documents must have distinct names"),
    ],
)
def test_split_refuses_what_it_cannot_divide(everything, fraction, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        split(everything, fraction, 0)
