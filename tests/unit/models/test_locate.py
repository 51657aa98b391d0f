"""Where model files are found, and whether they are the right ones."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pytest_llmperf.errors import ModelError
from pytest_llmperf.models.locate import check_sha256, locate, parts, sha256
from pytest_llmperf.plan.model import Model, PresetSpec, SynthSpec

GGUF = b"GGUF and so on"


def put(path: Path, content: bytes = GGUF) -> Path:
    """Write a file, folders included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def tiny(file: str, digest: str | None = None) -> Model:
    """Return a model that names a file."""
    return Model("tiny", file=file, sha256=digest)


def test_an_absolute_path_is_taken_as_it_is(tmp_path: Path) -> None:
    """No folder is searched for it."""
    path = put(tmp_path / "tiny.gguf")
    assert locate(tiny(str(path)), [], tmp_path) == path


def test_an_absolute_path_that_is_missing_is_named(tmp_path: Path) -> None:
    """The message has the model and the path."""
    with pytest.raises(ModelError, match=f"model `tiny`: no file {tmp_path / 'gone.gguf'}"):
        locate(tiny(str(tmp_path / "gone.gguf")), [tmp_path], tmp_path)


def test_the_first_folder_that_has_it_wins(tmp_path: Path) -> None:
    """The order is that of the folders."""
    put(tmp_path / "b" / "tiny.gguf")
    first = put(tmp_path / "a" / "tiny.gguf")
    folders = [tmp_path / "none", tmp_path / "a", tmp_path / "b"]
    assert locate(tiny("tiny.gguf"), folders, tmp_path) == first


def test_a_folder_in_a_folder_is_searched_after_it(tmp_path: Path) -> None:
    """One level down, in the order of the names, and only if the folder itself has it not."""
    put(tmp_path / "a" / "y" / "tiny.gguf")
    inner = put(tmp_path / "a" / "x" / "tiny.gguf")
    assert locate(tiny("tiny.gguf"), [tmp_path / "a"], tmp_path) == inner
    outer = put(tmp_path / "a" / "tiny.gguf")
    assert locate(tiny("tiny.gguf"), [tmp_path / "a"], tmp_path) == outer


def test_deeper_folders_are_not_searched(tmp_path: Path) -> None:
    """A folder of models may be a whole disk."""
    put(tmp_path / "a" / "x" / "y" / "tiny.gguf")
    with pytest.raises(ModelError):
        locate(tiny("tiny.gguf"), [tmp_path / "a"], tmp_path)


def test_a_relative_path_may_have_folders(tmp_path: Path) -> None:
    """It is taken from the model folder."""
    path = put(tmp_path / "a" / "x" / "y" / "tiny.gguf")
    assert locate(tiny("x/y/tiny.gguf"), [tmp_path / "a"], tmp_path) == path


def test_a_folder_relative_to_here_gives_an_absolute_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server may be started elsewhere."""
    path = put(tmp_path / "a" / "tiny.gguf")
    monkeypatch.chdir(tmp_path)
    assert locate(tiny("tiny.gguf"), [Path("a")], tmp_path) == path


def test_a_missing_file_lists_the_folders_and_the_mend(tmp_path: Path) -> None:
    """Folders that do not exist are marked."""
    (tmp_path / "a").mkdir()
    with pytest.raises(ModelError) as caught:
        locate(tiny("tiny.gguf"), [tmp_path / "a", tmp_path / "b"], tmp_path)
    assert str(caught.value) == (
        f"model `tiny`: no tiny.gguf in {tmp_path / 'a'}, {tmp_path / 'b'} (no such folder): "
        "add its folder with --llmperf-models=DIR or LLMPERF_MODELS"
    )


def test_no_folder_at_all_has_its_own_message(tmp_path: Path) -> None:
    """There is nothing to list."""
    with pytest.raises(ModelError, match=r"in which tiny\.gguf could be: .*LLMPERF_MODELS"):
        locate(tiny("tiny.gguf"), [], tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no GGUF file, it starts with b''"),
        (b"<!doctype html>", "is no GGUF file, it starts with b'<!do'"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer, .*: run git lfs pull"),
    ],
)
def test_what_is_no_gguf_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    """A page saved under the name of a model is found out before a server is started."""
    put(tmp_path / "tiny.gguf", content)
    with pytest.raises(ModelError, match=f"model `tiny`: .*{message}"):
        locate(tiny("tiny.gguf"), [tmp_path], tmp_path)


def split(folder: Path, count: int = 3) -> list[Path]:
    """Write a split GGUF."""
    return [
        put(folder / f"tiny-{n:05d}-of-{count:05d}.gguf", GGUF + bytes([n]))
        for n in range(1, count + 1)
    ]


def test_a_split_model_is_its_first_part(tmp_path: Path) -> None:
    """All parts are there, so a server finds the others by itself."""
    files = split(tmp_path)
    assert locate(tiny(files[0].name), [tmp_path], tmp_path) == files[0]
    assert parts(files[0]) == tuple(files)


def test_a_split_model_that_lacks_parts_names_them(tmp_path: Path) -> None:
    """The message counts them, and names three at most."""
    files = split(tmp_path, 6)
    for file in files[2:]:
        file.unlink()
    with pytest.raises(
        ModelError, match=r"4 of 6 parts are missing from .*tiny-00003-of.*, \.\.\.;"
    ):
        locate(tiny(files[0].name), [tmp_path], tmp_path)


def test_a_later_part_is_refused(tmp_path: Path) -> None:
    """A server is given the first one."""
    files = split(tmp_path)
    with pytest.raises(ModelError, match=r"name the first, tiny-00001-of-00003\.gguf"):
        locate(tiny(files[1].name), [tmp_path], tmp_path)


def test_a_damaged_later_part_is_refused(tmp_path: Path) -> None:
    """Each part has the magic bytes."""
    files = split(tmp_path)
    put(files[2], b"<html>")
    with pytest.raises(ModelError, match=r"tiny-00003-of-00003\.gguf is no GGUF file"):
        locate(tiny(files[0].name), [tmp_path], tmp_path)


def test_a_shape_is_made_in_the_cache(tmp_path: Path) -> None:
    """Model folders are not for what the project makes."""
    pytest.importorskip("gguf")
    spec = SynthSpec(layers=1, embedding=64, heads=2, kv_heads=1, feed_forward=64, vocab=512)
    path = locate(Model("made", synth=spec), [], tmp_path)
    assert path.parent == tmp_path / "models"
    assert path.read_bytes()[:4] == b"GGUF"


def test_a_preset_is_made_in_the_cache(tmp_path: Path) -> None:
    """As a shape is, under its own name."""
    pytest.importorskip("gguf")
    spec = PresetSpec("qwen3-moe-tiny", layers=1, vocab=600)
    path = locate(Model("made", synth=spec), [], tmp_path)
    assert path == tmp_path / "models" / f"qwen3-moe-tiny-Q4_K-{spec.digest()}.gguf"
    assert path.read_bytes()[:4] == b"GGUF"


def test_a_model_of_the_package_is_found_last(tmp_path: Path) -> None:
    """It needs no folder, and a file of that name in a folder of the user's goes before."""
    found = locate(tiny("tiny-quality.gguf"), [], tmp_path)
    assert found.parts[-3:] == ("pytest_llmperf", "data", "tiny-quality.gguf")
    assert locate(tiny("tiny-quality.gguf"), [tmp_path], tmp_path) == found
    own = put(tmp_path / "tiny-quality.gguf")
    assert locate(tiny("tiny-quality.gguf"), [tmp_path], tmp_path) == own


def test_a_path_is_not_looked_for_in_the_package(tmp_path: Path) -> None:
    """Who names a folder means it."""
    with pytest.raises(ModelError, match="no folder is named in which"):
        locate(tiny("../data/tiny-quality.gguf"), [], tmp_path)


QUANTIZED = Model("less", source="tiny", quantize="Q4_K")


def test_a_quantized_model_is_made_in_the_cache(tmp_path: Path) -> None:
    """From the model of that name, wherever that lies."""
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp")
    models = {"tiny": tiny("tiny-quality.gguf"), "less": QUANTIZED}
    path = locate(QUANTIZED, [], tmp_path, models)
    assert path.parent == tmp_path / "models"
    assert path.name.startswith("tiny-quality-Q4_K-")


def test_a_quantized_model_whose_source_is_another_is_refused(tmp_path: Path) -> None:
    """The hash of the source is checked before anything is made of it."""
    put(tmp_path / "a.gguf")
    with pytest.raises(ModelError, match=r"model `tiny`: .*a\.gguf has sha256 .*, the suite file"):
        locate(QUANTIZED, [tmp_path], tmp_path, {"tiny": tiny("a.gguf", "0" * 64)})


def test_a_quantized_model_whose_source_is_missing_names_the_source(tmp_path: Path) -> None:
    """That is the file to look for."""
    with pytest.raises(ModelError, match=r"model `tiny`: .* in which gone\.gguf could be"):
        locate(QUANTIZED, [], tmp_path, {"tiny": tiny("gone.gguf")})
    with pytest.raises(ModelError, match="model `less`: no model `tiny` to quantize from"):
        locate(QUANTIZED, [], tmp_path)


def test_a_model_that_cannot_be_quantized_is_named(tmp_path: Path) -> None:
    """As it is called in the suite file."""
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp")
    put(tmp_path / "a.gguf")
    with pytest.raises(ModelError, match=r"model `less`: .*a\.gguf cannot be quantized to Q4_K"):
        locate(QUANTIZED, [tmp_path], tmp_path, {"tiny": tiny("a.gguf")})


def test_the_hash_is_that_of_the_content(tmp_path: Path) -> None:
    """As sha256sum prints it."""
    path = put(tmp_path / "tiny.gguf")
    assert sha256(path, tmp_path) == hashlib.sha256(GGUF).hexdigest()


def test_the_hash_of_a_split_model_is_that_of_all_parts(tmp_path: Path) -> None:
    """One after the other."""
    files = split(tmp_path)
    whole = b"".join(file.read_bytes() for file in files)
    assert sha256(files[0], tmp_path / "cache") == hashlib.sha256(whole).hexdigest()


def test_parts_may_be_links_to_blobs(tmp_path: Path) -> None:
    """As in the cache of a model hub: the names of the links say what belongs together."""
    blobs = split(tmp_path / "blobs", 2)
    links = [tmp_path / "links" / blob.name for blob in blobs]
    links[0].parent.mkdir()
    for number, (link, blob) in enumerate(zip(links, blobs, strict=True)):
        link.symlink_to(blob.rename(blob.with_name(f"blob{number}")))
    whole = b"".join(link.read_bytes() for link in links)
    assert sha256(links[0], tmp_path / "cache") == hashlib.sha256(whole).hexdigest()


def test_progress_runs_to_one_and_a_kept_hash_reads_nothing(tmp_path: Path) -> None:
    """The second time there is nothing to report."""
    path = put(tmp_path / "tiny.gguf", GGUF + bytes(9 << 20))
    seen: list[float] = []
    first = sha256(path, tmp_path / "cache", seen.append)
    assert seen == sorted(seen)
    assert len(seen) == 3
    assert seen[-1] == 1.0
    assert sha256(path, tmp_path / "cache", seen.append) == first
    assert len(seen) == 3


def test_a_changed_file_is_hashed_again(tmp_path: Path) -> None:
    """Even if its size is the same."""
    path = put(tmp_path / "tiny.gguf")
    first = sha256(path, tmp_path)
    put(path, GGUF[:-1] + b"?")
    os.utime(path, ns=(1, 1))
    assert sha256(path, tmp_path) != first


@pytest.mark.parametrize("damage", [b"", b"[]", b"{", b'{"%s": 3}', b"\xff"])
def test_a_damaged_store_counts_as_empty(damage: bytes, tmp_path: Path) -> None:
    """It is written anew."""
    path = put(tmp_path / "tiny.gguf")
    store = put(tmp_path / "hashes.json", damage.replace(b"%s", os.fsencode(path)))
    assert sha256(path, tmp_path) == hashlib.sha256(GGUF).hexdigest()
    assert list(json.loads(store.read_text())) == [str(path)]


def test_hashes_kept_at_once_are_all_kept(tmp_path: Path) -> None:
    """No writer loses what another wrote."""
    paths = [put(tmp_path / f"m{n}.gguf", GGUF + bytes([n])) for n in range(12)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda path: sha256(path, tmp_path), paths))
    kept = json.loads((tmp_path / "hashes.json").read_text())
    assert sorted(kept) == sorted(map(str, paths))


def test_a_store_that_cannot_be_written_costs_the_keeping_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The hash is still right, and a warning says that it is not kept."""
    path = put(tmp_path / "tiny.gguf")
    cache = put(tmp_path / "a-file")
    assert sha256(path, cache) == hashlib.sha256(GGUF).hexdigest()
    assert "is not kept" in caplog.text


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """A missing file is a ModelError here too."""
    with pytest.raises(ModelError, match=r"cannot read .*gone\.gguf: No such file"):
        sha256(tmp_path / "gone.gguf", tmp_path)


def test_a_model_without_a_hash_is_not_read(tmp_path: Path) -> None:
    """Hashing a hundred gigabytes is only for those who asked."""
    check_sha256(tiny("tiny.gguf"), tmp_path / "gone.gguf", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_right_hash_passes(tmp_path: Path) -> None:
    """Nothing happens."""
    path = put(tmp_path / "tiny.gguf")
    check_sha256(tiny("tiny.gguf", hashlib.sha256(GGUF).hexdigest()), path, tmp_path)
    assert (tmp_path / "hashes.json").is_file()


def test_a_wrong_hash_names_both(tmp_path: Path) -> None:
    """So that one can be copied over the other."""
    path = put(tmp_path / "tiny.gguf")
    with pytest.raises(ModelError) as caught:
        check_sha256(tiny("tiny.gguf", "ab" * 32), path, tmp_path)
    for part in ("`tiny`", str(path), hashlib.sha256(GGUF).hexdigest(), "ab" * 32):
        assert part in str(caught.value)
