"""Readers on small files in the packages' formats, error messages and, marked slow, the packages themselves."""

import gzip
import os
import shutil
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest

from recipes.shared import tokens
from recipes.shared.checks import DataError
from recipes.shared.data.debian import debian_package
from recipes.shared.data.images import fashion_mnist
from recipes.shared.data.sentences import help_sentences
from recipes.shared.data.text import load_text, web_text


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MULTIMAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def package(cache, name, files):
    """Puts a Debian package's content where a download would put it."""
    for path, content in files.items():
        file = cache / "debian" / name / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())


# -- readers ---------------------------------------------------------------------------------------------------------

SWORD = "usr/share/sword/modules/texts/ztext/engWEB"


def ztext(books):
    """The three files of one testament: every book is a block, every book's verses follow each other in it."""
    zs, vs, zz = b"", b"\0" * 10, b""  # an empty entry comes first, as in real modules
    for number, verses in enumerate(books):
        block = "".join(verses).encode()
        packed = zlib.compress(block)
        zs += struct.pack("<3I", len(zz), len(packed), len(block))
        zz += packed
        start = 0
        for verse in verses:
            size = len(verse.encode())
            vs += struct.pack("<2IH", number, start, size)
            start += size
    return {"bzs": zs, "bzv": vs, "bzz": zz}


def bible(cache, old, new):
    files = {f"{SWORD}/{t}.{end}": c for t, books in (("ot", old), ("nt", new)) for end, c in ztext(books).items()}
    package(cache, "sword-text-web", files)


def test_web_text_reads_ztext_and_leaves_markup_out(cache):
    genesis = [
        '<title level="1">Genesis</title> <div sID="gen4" type="x-p"/>',
        '<w lemma="strong:H0430">In</w> the beginning, <w>God</w><note placement="foot"><reference>1:1 </reference>The '
        "Hebrew word “אֱ”.</note><w>created</w> the heavens<note>Or sky</note>, and the earth. ",
        "God said,\n“Let there be light”. ",
    ]
    psalms = ['<div type="x-p"/><l level="1">Blessed &amp; glad</l><l level="2">is the man</l>']
    bible(cache, [genesis, psalms], [["The book of the genealogy."]])
    assert web_text().split("\n") == [
        "Genesis",
        "In the beginning, God created the heavens, and the earth. God said, “Let there be light”.",
        "Blessed & glad",
        "is the man",
        "The book of the genealogy.",
    ]
    assert load_text("web") == web_text()


def test_a_broken_module_is_named(cache):
    bible(cache, [["In the beginning."]], [["The book."]])
    broken = next((cache / "debian").rglob("nt.bzz"))
    broken.write_bytes(b"no zlib")
    with pytest.raises(DataError, match="engWEB is no SWORD module"):
        web_text()
    shutil.rmtree(broken.parent)
    with pytest.raises(DataError, match="delete that folder"):
        web_text()


def idx(array):
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return gzip.compress(header + array.astype(np.uint8).tobytes())


def test_fashion_mnist_reads_idx(cache):
    arrays = {}
    for prefix, count in (("train", 5), ("t10k", 2)):
        arrays[f"{prefix}-images-idx3"] = np.arange(count * 12).reshape(count, 4, 3)
        arrays[f"{prefix}-labels-idx1"] = np.arange(count)
    where = "usr/share/datasets/fashion-mnist"
    files = {f"{where}/{name}-ubyte.gz": idx(array) for name, array in arrays.items()}
    package(cache, "dataset-fashion-mnist", files)
    splits = fashion_mnist()
    assert list(splits) == ["train", "test"]
    np.testing.assert_array_equal(splits["train"].images, arrays["train-images-idx3"])
    np.testing.assert_array_equal(splits["test"].labels, [0, 1])
    assert splits["test"].images.dtype == np.uint8

    for wrong in (b"no gzip", gzip.compress(b"\0\0\x0d\x01\0\0\0\x01abcd"), idx(np.zeros(9))[:-12]):
        package(cache, "dataset-fashion-mnist", {f"{where}/train-labels-idx1-ubyte.gz": wrong})
        with pytest.raises(DataError, match="train-labels-idx1-ubyte.gz is no IDX file"):
            fashion_mnist()


def test_help_sentences_are_aligned_by_paragraph(cache):
    english = """<h1 id="hd_id1" dir="auto"><a name="x"></a>Saving <span>a</span> file</h1>
        <p id="par_id2" class="x">Press <em>Ctrl</em>+S<br/>to save &amp; close.</p>
        <p id="par_id3">Only here, not there.</p>
        <p id="par_id4">LibreOffice 1 2 3.</p><p id="par_id5">Press Ctrl+S to save &amp; close.</p><p>No id here.</p>"""
    german = """<h1 id="hd_id1">Eine Datei speichern</h1>
        <p id="par_id5">Noch einmal, mit Strg+S.</p><p id="par_id4">LibreOffice 1 2 3.</p>
        <p id="par_id2">Mit Strg+S speichern\n   und schließen.</p>"""
    where = "usr/share/libreoffice/help"
    package(cache, "libreoffice-help-en-us", {f"{where}/en-US/text/swriter/a.html": english})
    package(cache, "libreoffice-help-de", {f"{where}/de/text/swriter/a.html": german})
    pair = ("Press Ctrl+S to save & close.", "Mit Strg+S speichern und schließen.")
    assert help_sentences() == [pair]
    assert help_sentences(max_words=4) == []
    assert help_sentences(min_words=6) == []


def test_pydoc_text_is_long_enough():
    assert len(load_text("pydoc")) > 400_000


# -- local files and the Hub -----------------------------------------------------------------------------------------


def test_files_and_folders(tmp_path):
    (tmp_path / "b.txt").write_text("second ä", encoding="utf-8")
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.md").write_text("first")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    assert load_text(str(tmp_path)) == "first\nsecond ä"
    assert load_text(str(tmp_path / "b.txt")) == "second ä"


def test_data_without_text_is_refused_in_one_sentence(tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes("gr\u00fcn".encode("latin-1"))
    (tmp_path / "folder").mkdir()
    for name, message in {
        "empty.txt": "there is no text in",
        "latin.txt": r"is not UTF-8 text \(byte 2\)",
        "folder": r"there is no .txt, .md, .rst file in",
        "missing": "there is no file or folder",
    }.items():
        with pytest.raises(DataError, match=message) as error:
            load_text(str(tmp_path / name))
        assert name in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(DataError, match="there is no file or folder missing.txt"):
        load_text("missing.txt")


def test_hub_data_sets(monkeypatch):
    datasets = pytest.importorskip("datasets")
    made = {
        "owner/one": {"text": ["first", "second"], "title": ["a", "b"]},
        "owner/other": {"body": ["only"], "number": [1]},
        "owner/none": {"number": [1]},
        "owner/many": {"a": ["x"], "b": ["y"]},
    }

    def load_dataset(name, configuration, split, streaming):
        assert split == "train" and streaming
        if name not in made:
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist on the Hub\nor so")
        if configuration not in (None, "raw"):
            raise ValueError(f"BuilderConfig '{configuration}' not found")
        return datasets.Dataset.from_dict(made[name]).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_text("owner/one") == load_text("owner/one:raw") == "first\nsecond"
    assert load_text("owner/one", max_characters=7) == "first\ns"
    assert load_text("owner/other") == "only"
    for source, message in {
        "owner/none": "no column 'text', only number",
        "owner/many": "no column 'text', only a, b",
        "owner/one:cooked": "cannot be read from the Hub: BuilderConfig 'cooked' not found",
        "owner/missing": "is no built-in text .* cannot be read from the Hub: Dataset 'owner/missing' doesn't exist",
    }.items():
        with pytest.raises(DataError, match=message) as error:
            load_text(source)
        assert "\n" not in str(error.value)


# -- Debian packages -------------------------------------------------------------------------------------------------


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """A PATH with only these shell scripts, by name, and the few commands that they need."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def write(**scripts):
        for name, script in scripts.items():
            file = folder / name.replace("_", "-")
            file.write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\n{script}\n")
            file.chmod(0o755)

    monkeypatch.setenv("PATH", str(folder))
    return write


def test_a_package_is_fetched_once_and_whole(cache, programs):
    programs(
        apt_get='test "$1" = download && echo x >> "$HF_MULTIMAX_CACHE/calls" && echo > some-data_1.deb',
        dpkg_deb='mkdir -p "$3/usr/share" && echo content > "$3/usr/share/file"',
    )
    folder = debian_package("some-data")
    assert (folder / "usr/share/file").read_text() == "content\n"
    assert folder == cache / "debian" / "some-data" == debian_package("some-data")
    assert (cache / "calls").read_text() == "x\n"
    assert os.listdir(cache / "debian") == ["some-data"]


@pytest.mark.parametrize(
    "scripts, reason",
    [
        ({}, "there is no apt-get here"),
        ({"apt_get": "echo 'W: careful' >&2; echo 'E: Unable to locate package some-data' >&2; exit 100"},
         "Unable to locate package some-data"),
        ({"apt_get": "exit 3"}, "apt-get ended with 3"),
        ({"apt_get": ":"}, "apt-get wrote no archive"),
        ({"apt_get": "echo > half.deb"}, "there is no dpkg-deb here"),
        ({"apt_get": "echo > half.deb", "dpkg_deb": 'mkdir -p "$3/usr"; echo dpkg-deb: truncated archive >&2; exit 2'},
         "truncated archive"),
    ],
)  # fmt: skip
def test_a_package_that_cannot_be_fetched_leaves_nothing(cache, programs, scripts, reason):
    programs(**scripts)
    with pytest.raises(DataError, match=reason) as error:
        debian_package("some-data")
    assert "apt-get update" in str(error.value) and "\n" not in str(error.value)
    assert os.listdir(cache / "debian") == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("HF_MULTIMAX_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match="set HF_MULTIMAX_CACHE"):
        debian_package("some-data")


def test_a_user_without_a_home_folder_is_told_what_to_set(monkeypatch):
    monkeypatch.setenv("HF_MULTIMAX_CACHE", "~nobody-of-this-name/cache")
    with pytest.raises(DataError, match="Set HF_MULTIMAX_CACHE"):
        debian_package("some-data")


# -- tokens ----------------------------------------------------------------------------------------------------------


def test_the_tokenizer_gives_every_text_back(tmp_path):
    from transformers import AutoTokenizer

    text = "one two  three\n\n   four — ä 漢字\n" * 20
    tokenizer = tokens.train_tokenizer(text, 280, 64)
    assert 257 <= len(tokenizer) <= 280
    assert tokenizer.decode(tokens.encode(tokenizer, text)) == text
    unseen = "Zebra\t0 ♞ \r\n"
    assert tokenizer.decode(tokens.encode(tokenizer, unseen)) == unseen
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(text)["input_ids"] == tokens.encode(tokenizer, text).tolist()
    assert loaded.model_max_length == 64 and loaded.eos_token == loaded.pad_token == "<|endoftext|>"
    with pytest.raises(ValueError, match="at least 257"):
        tokens.train_tokenizer(text, 256, 64)


# -- the real packages -----------------------------------------------------------------------------------------------


def fetched(name):
    """Skips, with the reason, where the package cannot be had."""
    try:
        return debian_package(name)
    except DataError as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_the_real_web_text():
    fetched("sword-text-web")
    text = web_text()
    assert 4_800_000 < len(text) < 5_050_000
    assert "In the beginning, God created the heavens and the earth." in text
    assert not set("<>") & set(text)


@pytest.mark.slow
def test_the_real_fashion_mnist():
    fetched("dataset-fashion-mnist")
    splits = fashion_mnist()
    assert splits["train"].images.shape == (60_000, 28, 28) and splits["test"].images.shape == (10_000, 28, 28)
    for images in splits.values():
        assert (np.bincount(images.labels) == len(images.labels) // 10).all()


@pytest.mark.slow
def test_the_real_help_sentences():
    for language in ("en-us", "de"):
        fetched(f"libreoffice-help-{language}")
    pairs = help_sentences()
    assert 17_000 < len(pairs) < 22_000
    assert len({english for english, _ in pairs}) == len(pairs)
    assert all(3 <= len(text.split()) <= 40 and not set("<>\n") & set(text[0]) for pair in pairs for text in pair)


@pytest.mark.slow
def test_two_processes_may_fetch_at_once(tmp_path):
    fetched("sword-text-web")
    command = [
        sys.executable,
        "-c",
        "from recipes.shared.data.debian import debian_package as f; print(f('sword-text-web'))",
    ]
    environment = {**os.environ, "HF_MULTIMAX_CACHE": str(tmp_path)}
    processes = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    folders = {process.communicate(timeout=300)[0].strip() for process in processes}
    assert folders == {str(tmp_path / "debian" / "sword-text-web")}
    assert os.listdir(tmp_path / "debian") == ["sword-text-web"]
