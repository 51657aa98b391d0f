"""The compact reference: small, close, with a bound that holds; refused when damaged."""

import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pytest_llmperf.errors import BaselineError
from pytest_llmperf.quality import _reference_file
from pytest_llmperf.quality.divergence import TokenDivergences, compare
from pytest_llmperf.quality.logits import LogitsReader, write_stream
from pytest_llmperf.quality.reference import (
    Reference,
    ReferenceDivergences,
    ReferenceSettings,
    build_reference,
    compare_reference,
    own_divergences,
)

MODEL, CORPUS = "ab" * 32, "cd" * 32
SEEDS = st.integers(0, 2**32 - 1)
ALL = ReferenceSettings(tail_mass=0.0, most_kept=65535)


def peaked(
    seed: int, *, n_vocab: int = 500, n_chunk: int = 2, n_ctx: int = 14, noise: float = 0.2
) -> tuple[bytes, bytes]:
    """Streams of a base and a candidate near it: Zipf's law, from steep to flat, ids shuffled."""
    random = np.random.default_rng(seed)
    rows = n_chunk * (n_ctx - 1 - n_ctx // 2)
    ranks = np.log(np.arange(1, n_vocab + 1, dtype=np.float32))
    steepness = random.uniform(1.1, 3.5, rows).astype(np.float32)
    logits = np.stack([random.permutation(-slope * ranks) for slope in steepness])
    logits += random.normal(0, 0.5, logits.shape).astype(np.float32)
    shifted = logits + random.normal(0, noise, logits.shape).astype(np.float32)
    text = random.integers(0, n_vocab, (n_chunk, n_ctx))
    sinks = io.BytesIO(), io.BytesIO()
    for sink, values in zip(sinks, (logits, shifted), strict=True):
        write_stream(sink, text, [values], n_vocab=n_vocab)
    return sinks[0].getvalue(), sinks[1].getvalue()


def reader(data: bytes, name: str = "base", **options: int) -> LogitsReader:
    """A reader of a stream in memory."""
    return LogitsReader(io.BytesIO(data), name, **options)


def built(data: bytes, path: Path, options: ReferenceSettings | None = None) -> Reference:
    """The reference of a stream."""
    return build_reference(
        reader(data), path, model_sha256=MODEL, corpus_sha256=CORPUS, settings=options
    )


def both(
    streams: tuple[bytes, bytes], path: Path, options: ReferenceSettings | None = None
) -> tuple[TokenDivergences, ReferenceDivergences]:
    """The exact divergences of two streams, and those from a reference of the first."""
    base, candidate = streams
    exact = compare(reader(base), reader(candidate, "candidate"))
    return exact, compare_reference(built(base, path, options), reader(candidate, "candidate"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all examples of a property share."""
    return tmp_path_factory.mktemp("references")


@given(SEEDS)
def test_a_reference_that_keeps_all_is_exact(folder: Path, seed: int) -> None:
    """With nothing in the tail there is no error, and the bounds say so."""
    exact, got = both(peaked(seed), folder / "reference", ALL)
    np.testing.assert_allclose(got.tokens.kld, exact.kld, rtol=1e-5, atol=5e-6)
    np.testing.assert_allclose(got.lower, got.upper, atol=1e-12)
    assert got.kld_error == 0


@given(
    seed=SEEDS,
    tail=st.floats(0, 0.9),
    kept=st.integers(1, 60),
    noise=st.sampled_from([0.0, 0.05, 0.5, 3.0]),
)
def test_the_exact_kld_lies_within_the_stated_bounds(
    folder: Path, seed: int, tail: float, kept: int, noise: float
) -> None:
    """For every token, however much is left to the tail and however far the candidate is."""
    options = ReferenceSettings(tail_mass=tail, most_kept=kept)
    exact, got = both(peaked(seed, noise=noise), folder / "reference", options)
    rounding = 5e-6 + 1e-5 * np.abs(exact.kld)
    assert (got.lower <= exact.kld + rounding).all()
    assert (exact.kld <= got.upper + rounding).all()
    low, high = got.kld_bounds
    assert low - 1e-4 <= exact.kld.mean() <= high + 1e-4


@given(SEEDS)
def test_all_but_the_kld_is_exact(folder: Path, seed: int) -> None:
    """NLLs, same-top and the change of probability do not depend on the tail."""
    exact, got = both(peaked(seed), folder / "reference", ReferenceSettings(most_kept=5))
    for name in ("nll", "nll_base", "same_top", "delta_p", "at_floor", "at_floor_base"):
        np.testing.assert_array_equal(getattr(got.tokens, name), getattr(exact, name))


@pytest.mark.parametrize("seed", range(5))
def test_the_estimate_is_as_close_as_it_says(tmp_path: Path, seed: int) -> None:
    """Also with few kept tokens, the mean KLD is off by a few of its standard errors at most."""
    options = ReferenceSettings(tail_mass=0.1, most_kept=30)
    exact, got = both(peaked(seed, n_vocab=3000, n_chunk=20), tmp_path / "reference", options)
    error = abs(got.tokens.kld.mean(dtype=np.float64) - exact.kld.mean(dtype=np.float64))
    assert error < 4 * got.kld_error
    assert got.kld_error < 0.1 * exact.kld.mean()


def test_at_a_large_vocabulary_it_is_small_and_close(tmp_path: Path) -> None:
    """At 248 K tokens: no more than 0.5 % of the stream, mean KLD within 1 %."""
    base, candidate = peaked(0, n_vocab=248320, n_chunk=1, n_ctx=50)
    exact = compare(reader(base), reader(candidate, "candidate"))
    reference = built(base, tmp_path / "reference")
    got = compare_reference(reference, reader(candidate, "candidate"))
    assert reference.nbytes <= 0.005 * len(base)
    assert reference.nbytes == (tmp_path / "reference").stat().st_size
    assert got.tokens.kld.mean() == pytest.approx(exact.kld.mean(), rel=0.01)


@given(st.integers(1, 8))
def test_the_size_of_a_block_does_not_matter(folder: Path, rows: int) -> None:
    """Building and comparing row by row give what they give all at once."""
    base, candidate = peaked(3)
    size = rows * 2 * 504
    whole = compare_reference(built(base, folder / "whole"), reader(candidate))
    build_reference(
        reader(base, block_bytes=size),
        folder / "parts",
        model_sha256=MODEL,
        corpus_sha256=CORPUS,
    )
    assert (folder / "parts").read_bytes() == (folder / "whole").read_bytes()
    parts = compare_reference(Reference.load(folder / "parts"), reader(candidate, block_bytes=size))
    np.testing.assert_array_equal(parts.tokens.kld, whole.tokens.kld)
    np.testing.assert_array_equal(parts.lower, whole.lower)


@given(SEEDS, st.floats(0.001, 0.5), st.integers(1, 40))
def test_tokens_are_kept_until_the_rest_is_light(
    folder: Path, seed: int, tail: float, most: int
) -> None:
    """The tail has the mass asked for or less, unless the most tokens are kept."""
    options = ReferenceSettings(tail_mass=tail, most_kept=most, mass_per_sample=0.01)
    base, _ = peaked(seed)
    rows = built(base, folder / "reference", options).rows(1)
    full = rows.kept == most
    assert (rows.tail_mass[~full] <= tail + 1e-4).all()
    assert (rows.kept >= 1).all()
    assert (rows.kept <= most).all()
    tailed = rows.tail_count > 0
    wanted = rows.tail_mass[tailed] / 0.01
    assert (rows.sampled[tailed] >= np.clip(np.ceil(wanted - 1e-3), 2, 128)).all()
    assert (rows.sampled[tailed] <= np.clip(np.ceil(wanted + 1e-3), 2, 128)).all()


@given(SEEDS)
def test_the_base_diverges_from_itself_by_nothing(folder: Path, seed: int) -> None:
    """A reference of few tokens tells the same as the stream compared with itself."""
    # A flat row and a steep one: some of the tokens that came next are clipped.
    base, _ = peaked(seed, noise=0.0, n_ctx=30)
    exact = compare(reader(base), reader(base, "again"))
    own = own_divergences(built(base, folder / "reference", ReferenceSettings(most_kept=3)))
    assert (own.n_scored, own.n_chunk) == (exact.n_scored, exact.n_chunk)
    np.testing.assert_allclose(own.kld, exact.kld, atol=1e-6)
    for name in ("nll", "nll_base", "same_top", "at_floor", "at_floor_base"):
        np.testing.assert_array_equal(getattr(own, name), getattr(exact, name))


def test_what_was_altered_is_no_base_of_itself(tmp_path: Path) -> None:
    """A chunk is checked when it is read."""
    path = tmp_path / "reference"
    reference = built(peaked(0)[0], path)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(BaselineError, match="chunk 1 has been altered"):
        own_divergences(reference)


def test_progress_is_told_after_each_chunk(tmp_path: Path) -> None:
    """When building and when comparing."""
    base, candidate = peaked(0)
    built_, compared = [], []  # type: list[int], list[int]
    reference = build_reference(
        reader(base, block_bytes=2048),
        tmp_path / "reference",
        model_sha256=MODEL,
        corpus_sha256=CORPUS,
        progress=built_.append,
    )
    compare_reference(reference, reader(candidate, block_bytes=2048), progress=compared.append)
    assert built_ == compared == [1, 2]


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    """Hashes, settings, sizes and text come back as they were."""
    base, _ = peaked(0)
    options = ReferenceSettings(0.03, 20, 0.004, 10)
    built(base, tmp_path / "new" / "reference", options)
    loaded = Reference.load(tmp_path / "new" / "reference")
    header = reader(base).header
    assert loaded.facts.settings == options
    assert (loaded.facts.model_sha256, loaded.facts.corpus_sha256) == (MODEL, CORPUS)
    assert (loaded.header.n_ctx, loaded.header.n_vocab, loaded.header.n_chunk) == (14, 500, 2)
    np.testing.assert_array_equal(loaded.header.tokens, header.tokens)
    loaded.check_base(model_sha256=MODEL, corpus_sha256=CORPUS)


@pytest.mark.parametrize(
    ("model", "corpus", "message"),
    [("ef" * 32, CORPUS, "recorded from another model"), (MODEL, MODEL, "from another text")],
)
def test_another_model_or_text_is_refused(
    tmp_path: Path, model: str, corpus: str, message: str
) -> None:
    """The message names the file and which of the two differs."""
    reference = built(peaked(0)[0], tmp_path / "reference")
    with pytest.raises(BaselineError, match=message) as caught:
        reference.check_base(model_sha256=model, corpus_sha256=corpus)
    assert str(caught.value).startswith(str(tmp_path / "reference"))


def test_a_candidate_of_another_text_is_refused(tmp_path: Path) -> None:
    """The reference is named by its path."""
    reference = built(peaked(0)[0], tmp_path / "reference")
    with pytest.raises(BaselineError, match="reference and candidate differ in the text"):
        compare_reference(reference, reader(peaked(1)[1], "candidate"))


def small(path: Path) -> bytes:
    """A reference of a few hundred bytes."""
    built(peaked(0, n_vocab=40, n_ctx=4)[0], path)
    return path.read_bytes()


def test_every_cut_is_refused_by_name(tmp_path: Path) -> None:
    """Whatever its length, a file that ends early is no reference."""
    path = tmp_path / "reference"
    data = small(path)
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(BaselineError, match=r"truncated|altered") as caught:
            Reference.load(path)
        assert str(caught.value).startswith(f"{path}: ")


def test_every_altered_byte_is_refused_by_name(tmp_path: Path) -> None:
    """There is no byte that may be another."""
    path = tmp_path / "reference"
    data = small(path)
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(bytes(damaged))
        with pytest.raises(BaselineError) as caught:
            Reference.load(path)
        assert str(caught.value).startswith(f"{path}: ")


def test_bytes_after_the_last_chunk_are_refused(tmp_path: Path) -> None:
    """A file that goes on is not the one that was saved."""
    path = tmp_path / "reference"
    path.write_bytes(small(path) + b"\0")
    with pytest.raises(BaselineError, match="bytes follow chunk 1, the last"):
        Reference.load(path)


def test_a_file_altered_after_it_was_loaded_is_refused(tmp_path: Path) -> None:
    """A chunk is read when it is asked for, and checked again then."""
    path = tmp_path / "reference"
    reference = built(peaked(0)[0], path)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))
    reference.rows(0)
    with pytest.raises(BaselineError, match="chunk 1 has been altered"):
        reference.rows(1)
    path.unlink()
    with pytest.raises(BaselineError, match="chunk 0 cannot be read"):
        reference.rows(0)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    """With the mend, as any other."""
    with pytest.raises(BaselineError, match=r"none: cannot be read .*: record the reference again"):
        Reference.load(tmp_path / "none")


def with_header(data: bytes, version: int = 1, **changes: object) -> bytes:
    """The file with another header, its checksum correct."""
    length = struct.unpack_from("<I", data, 12)[0]
    facts = json.loads(data[16 : 16 + length]) | changes
    text = json.dumps({key: value for key, value in facts.items() if value != "gone"}).encode()
    start = data[:8] + struct.pack("<II", version, len(text)) + text
    return start + struct.pack("<I", zlib.crc32(start)) + data[16 + length + 4 :]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "format 2, and this version reads 1"),
        ({"n_ctx": "gone"}, "the header cannot be understood"),
        ({"n_ctx": 4.0}, "the header cannot be understood"),
        ({"n_ctx": 2}, "the header cannot be understood"),
        ({"n_vocab": 1 << 30}, "the header cannot be understood"),
        ({"model_sha256": "ab"}, "the header cannot be understood"),
        ({"settings": 7}, "the header cannot be understood"),
        ({"colour": "red"}, "the header cannot be understood"),
        ({"n_ctx": 5}, "the text is not what the header says"),
        ({"n_ctx": 3}, "the text is not as large as its header says"),
        ({"n_vocab": 5}, "the text is not what the header says"),
        ({"n_chunk": 1, "n_ctx": 8}, "bytes follow chunk 0, the last"),
    ],
)
def test_a_header_that_cannot_be_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    """Also one whose checksum is right: the message says what is wrong with it."""
    path = tmp_path / "reference"
    path.write_bytes(with_header(small(path), **changes))
    with pytest.raises(BaselineError, match=message):
        Reference.load(path)


@pytest.mark.parametrize(
    "raw", [b"", b"\0" * 26, b"\1" * 26, b"\0" * 100], ids=["empty", "zeros", "short", "long"]
)
def test_a_chunk_of_another_layout_is_refused(raw: bytes) -> None:
    """Counts and sizes are checked before anything is made of them."""
    with pytest.raises(BaselineError, match="chunk 0 does not hold what a reference holds"):
        _reference_file.decode(raw, 1, 100, "chunk 0")


def test_a_chunk_that_unpacks_to_more_than_it_may_is_refused() -> None:
    """A small file must not fill the memory."""
    sink = io.BytesIO()
    _reference_file.write_section(sink, 1, bytes(1_000_000))
    payload = sink.getvalue()[8:]
    assert len(payload) < 2000
    with pytest.raises(BaselineError, match="chunk 0 is not as large as its header says"):
        _reference_file.decompress(payload, 1000, "chunk 0")
    with pytest.raises(BaselineError, match="chunk 0 cannot be decompressed"):
        _reference_file.decompress(b"\xff" * 20, 1000, "chunk 0")


def test_a_build_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    """The file is replaced as a whole or not at all, and nothing else stays behind."""
    path = tmp_path / "reference"
    old = small(path)
    base, _ = peaked(1)
    with pytest.raises(BaselineError, match="base: truncated in chunk 1"):
        built(base[:-1], path)
    assert path.read_bytes() == old
    assert [entry.name for entry in tmp_path.iterdir()] == ["reference"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """One line, with the path."""
    (tmp_path / "file").write_text("")
    with pytest.raises(BaselineError, match="reference: cannot be written"):
        built(peaked(0)[0], tmp_path / "file" / "reference")


@pytest.mark.parametrize(
    "values",
    [
        {"tail_mass": -0.1},
        {"tail_mass": 1.0},
        {"most_kept": 0},
        {"most_kept": 65536},
        {"mass_per_sample": 0},
        {"most_sampled": 1},
    ],
)
def test_settings_out_of_range_are_refused(values: dict[str, Any]) -> None:
    """A setting that the format cannot hold, or that says nothing, is the caller's mistake."""
    with pytest.raises(ValueError, match="out of range"):
        ReferenceSettings(**values)


def test_a_hash_that_is_none_is_refused(tmp_path: Path) -> None:
    """A reference that cannot be matched with a model is of no use."""
    with pytest.raises(ValueError, match="model_sha256 is 'b8149'"):
        build_reference(
            reader(peaked(0)[0]), tmp_path / "r", model_sha256="b8149", corpus_sha256=CORPUS
        )


@settings(max_examples=20)
@given(SEEDS)
def test_a_sample_is_drawn_in_proportion(folder: Path, seed: int) -> None:
    """A sampled token is in the tail, and a tail token is drawn as often as its share, +- 1."""
    options = ReferenceSettings(tail_mass=0.5, most_kept=3, mass_per_sample=0.004)
    base, _ = peaked(seed, n_chunk=1)
    rows = built(base, folder / "reference", options).rows(0)
    log_probs = np.concatenate([block.log_probs() for block in reader(base)]).astype(np.float64)
    kept: list[NDArray[np.int64]] = np.split(rows.kept_ids, np.cumsum(rows.kept)[:-1])
    drawn: list[NDArray[np.int64]] = np.split(rows.sampled_ids, np.cumsum(rows.sampled)[:-1])
    for row, (top, sample) in enumerate(zip(kept, drawn, strict=True)):
        assert not set(top.tolist()) & set(sample.tolist())
        share = np.exp(log_probs[row, sample]) / rows.tail_mass[row] * len(sample)
        times = (sample[:, None] == sample).sum(axis=1)
        assert (np.abs(times - share) <= 1 + 1e-3).all()
