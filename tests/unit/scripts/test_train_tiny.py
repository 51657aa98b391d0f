"""The pure parts of the script that trains the tiny model."""

from __future__ import annotations

import math
import random
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.scripts import load_script

from pytest_llmperf.models.gguf import read_gguf
from pytest_llmperf.models.text import text
from pytest_llmperf.models.tokenizer import Tokenizer
from pytest_llmperf.models.vocabulary import EOS, vocabulary

tiny = load_script("train_tiny")
SMALL = tiny.Shape(
    vocab=400, context=64, embedding=32, layers=2, heads=4, kv_heads=2, feed_forward=48
)
WORDS = vocabulary(SMALL.vocab)
DOC = "Return the sum of all numbers that the caller gave in the order given, or zero."


def weights() -> dict[str, NDArray[np.float32]]:
    """Return random weights large enough for attention to differ from place to place."""
    generator = np.random.default_rng(1)
    return {
        name: (
            generator.normal(size=sizes) * 2 / math.sqrt(sizes[-1])
            if len(sizes) > 1
            else 1 + generator.normal(size=sizes) / 10
        ).astype(np.float32)
        for name, sizes in SMALL.tensors().items()
    }


def library(folder: Path) -> Path:
    """Write a small standard library."""
    for name, source in {
        "os.py": f'"""{DOC}"""\n',
        "json/__init__.py": f'def f():\n    """{DOC}\n\n        More.   \n    Less.\n    """\n',
        "json/tests/test_json.py": "tests = 1\n",
        "test/test_os.py": "tests = 2\n",
        "site-packages/numpy.py": "third_party = 1\n",
        "idlelib/run.py": "left_out = 1\n",
        "_sysconfigdata__linux.py": "generated = 1\n",
        "abc.py": f'"""{DOC}"""\n# Copyright of somebody.\n',
        "ast.py": '"""Short."""\nx = "\N{SNOWMAN}"\n',
        "cmd.py": f'"""{DOC} \N{SNOWMAN}"""\n',
    }.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    (folder / "bz2.py").write_bytes(b"# latin \xe9\n")
    return folder


def test_modules_are_those_of_the_library_by_name(tmp_path: Path) -> None:
    """No tests, no third-party packages, nothing generated, and nothing in another encoding."""
    found = tiny.modules(library(tmp_path))
    names = ["abc.py", "ast.py", "cmd.py", "json/__init__.py", "os.py"]
    assert [module.name for module in found] == names


def test_modules_do_not_depend_on_the_place(tmp_path: Path) -> None:
    """Two machines with the same Python have the same text."""
    one = tiny.modules(library(tmp_path / "one"))
    assert tiny.modules(library(tmp_path / "elsewhere" / "two")) == one


def test_docstrings_are_cleaned(tmp_path: Path) -> None:
    """Indentation and space at the end of a line are gone, and so are docstrings of a few words."""
    docs = {module.name: module.docs for module in tiny.modules(library(tmp_path))}
    assert docs["json/__init__.py"] == (f"{DOC}\n\n    More.\nLess.",)
    assert docs["ast.py"] == ()


def test_docstrings_are_in_the_order_of_the_source() -> None:
    """A class comes before its methods, whatever their depth."""
    source = f'class A:\n  """1 {DOC}"""\n  def f(self):\n    """2 {DOC}"""\n\n'
    source += f'async def g():\n  """3 {DOC}"""\n'
    assert [doc[0] for doc in tiny._docstrings(source)] == ["1", "2", "3"]


def many(count: int = 60) -> list[Any]:
    """Return modules, each third of which names a holder of rights."""
    return [
        tiny.Module(
            f"m{number:02}.py",
            f"source {number:02}" + " # Copyright" * (number % 3 == 0),
            tuple(f"{number:02} {part} {DOC}" for part in range(4)),
        )
        for number in range(count)
    ]


def test_what_is_judged_on_is_never_learnt() -> None:
    """A module is in one part only, with its source too."""
    parts = tiny.corpus(many(), 2000, 1000)
    learnt = "\n".join(parts.train)
    for module in many():
        judged = f"\n{module.docs[0]}\n" in "\n" + parts.quality
        chosen = f"\n{module.docs[0]}\n" in "\n" + parts.validation
        assert judged + chosen + (module.docs[0] in learnt) == 1, module.name
        assert (f"{module.source}\n" in f"{learnt}\n") == (not judged and not chosen)


def test_what_is_shipped_has_no_other_holder_of_rights() -> None:
    """Such modules are learnt from only, and the text says whose it is."""
    parts = tiny.corpus(many(), 10**6, 0)
    for number, module in enumerate(many()):
        assert (f"\n{module.docs[0]}\n" in parts.quality) == (number % 3 != 0)
    assert "Python Software Foundation" in parts.quality.partition("\n\n")[0]


def test_the_text_to_be_judged_on_has_the_size_asked_for() -> None:
    """At most that, and less by no more than a docstring."""
    body = tiny.corpus(many(), 2000, 0).quality.partition("\n\n")[2]
    assert 2000 - len(DOC) - 11 < len(body) <= 2000


def test_only_ascii_is_judged_on(tmp_path: Path) -> None:
    """Characters that training hardly shows would dominate the perplexity."""
    parts = tiny.corpus(tiny.modules(library(tmp_path)), 10**6, 0)
    assert parts.quality.isascii()
    assert any("\N{SNOWMAN}" in document for document in parts.train)


def test_the_split_does_not_depend_on_the_order() -> None:
    """It depends on names alone."""
    shuffled = many()
    random.Random(1).shuffle(shuffled)  # noqa: S311  no key
    assert tiny.corpus(shuffled, 2000, 1000) == tiny.corpus(many(), 2000, 1000)


def test_the_vocabulary_leaves_rare_characters_to_bytes() -> None:
    """A few thousand characters of other scripts would leave no room for pieces."""
    words = tiny.vocabulary_of(["spam ham spam \N{SNOWMAN}", "jam\tjam \N{SNOWMAN}"], 370)
    assert len(words.tokens) == 370
    assert "▁spam" in words.tokens
    assert not {"\N{SNOWMAN}", "\t"} & set(words.tokens)
    assert tiny.vocabulary_of(["spam ham spam ", "jam\tjam "], 370) == words


def test_each_document_ends_with_the_end_token() -> None:
    """So the model knows where one ends."""
    words = vocabulary(400)
    tokenizer = Tokenizer(words.tokens, words.scores, words.types)
    ids = tiny.encode_all(tokenizer, ["one", "two"])
    assert ids.tolist() == [*tokenizer.encode("one"), EOS, *tokenizer.encode("two"), EOS]
    assert ids.dtype == np.int64


def test_every_matrix_can_be_written_in_any_quant() -> None:
    """K-quants take rows of 256 values, quantized KV types heads of 32."""
    shape = tiny.Shape()
    for name, sizes in shape.tensors().items():
        assert len(sizes) == 1 or sizes[1] % 256 == 0, name
    assert shape.head_size == 64
    assert shape.heads % shape.kv_heads == 0
    assert shape.vocab % 32 == 0
    assert 2 * sum(math.prod(sizes) for sizes in shape.tensors().values()) < 8_000_000


def test_the_file_says_what_the_model_is(tmp_path: Path) -> None:
    """Shape, tokenizer, and neither BOS nor a space put before a text."""
    path = tmp_path / "tiny.gguf"
    tiny.export(path, SMALL, WORDS, weights())
    keys, tensors = read_gguf(path)
    assert {name: values.shape for name, values in tensors.items()} == SMALL.tensors()
    assert keys["general.architecture"] == keys["tokenizer.ggml.model"] == "llama"
    assert keys["general.file_type"] == 1
    assert keys["llama.block_count"] == 2
    assert keys["llama.embedding_length"] == 32
    assert keys["llama.attention.head_count_kv"] == 2
    assert keys["llama.rope.dimension_count"] == 8
    assert keys["llama.rope.freq_base"] == 10000.0
    assert keys["tokenizer.ggml.tokens"] == list(WORDS.tokens)
    assert keys["tokenizer.ggml.eos_token_id"] == EOS
    assert not keys["tokenizer.ggml.add_bos_token"]
    assert not keys["tokenizer.ggml.add_space_prefix"]


def test_what_is_written_can_be_loaded(tmp_path: Path) -> None:
    """The weights come back as they were rounded, and shape and tokenizer as they were."""
    path = tmp_path / "tiny.gguf"
    written = tiny.export(path, SMALL, WORDS, weights())
    shape, tokenizer, loaded = tiny.load(path)
    assert shape.tensors() == SMALL.tensors()
    assert shape.epsilon == pytest.approx(SMALL.epsilon)
    assert tokenizer.decode(tokenizer.encode(text())) == text()
    for name, values in weights().items():
        np.testing.assert_array_equal(loaded[name], written[name])
        rounded = values.astype(np.float16) if values.ndim > 1 else values
        np.testing.assert_array_equal(loaded[name], rounded)


def test_no_token_sees_the_future() -> None:
    """Logits up to a token do not depend on what comes after it."""
    forward = tiny.reference(SMALL, weights())
    ids = np.arange(20)[None] * 7 % SMALL.vocab
    changed = ids.copy()
    changed[0, 12:] += 1
    one, two = forward(ids), forward(changed)
    assert one.shape == (1, 20, SMALL.vocab)
    np.testing.assert_allclose(one[0, :12], two[0, :12], atol=1e-5)
    assert np.abs(one[0, 12:] - two[0, 12:]).max() > 0.1


def test_the_order_of_tokens_matters() -> None:
    """Rotary embeddings tell places apart: a bag of tokens would give the same last logits."""
    forward = tiny.reference(SMALL, weights())
    logits = forward(np.array([[5, 9, 300, 40], [9, 300, 5, 40]]))
    assert np.abs(logits[0, -1] - logits[1, -1]).max() > 0.1


def test_pytorch_computes_what_numpy_computes() -> None:
    """Training and reference are the same model."""
    torch = pytest.importorskip("torch")
    ids = np.random.default_rng(1).integers(0, SMALL.vocab, (3, 20))
    found = tiny.torch_forward(torch, SMALL, weights(), "cpu")(ids)
    np.testing.assert_allclose(found, tiny.reference(SMALL, weights())(ids), atol=1e-3)


def test_chunks_are_those_of_llama_perplexity() -> None:
    """512 tokens each, without overlap; what is left at the end is not read."""
    ids = list(range(1300))
    np.testing.assert_array_equal(tiny.chunks_of(ids), np.arange(1024).reshape(2, 512))
    np.testing.assert_array_equal(tiny.chunks_of(ids, 1), np.arange(512).reshape(1, 512))
    np.testing.assert_array_equal(tiny.chunks_of(ids, 9), tiny.chunks_of(ids))


def test_a_model_that_knows_nothing_is_as_perplexed_as_it_has_tokens() -> None:
    """The perplexity of equal logits is the size of the vocabulary, with no error."""
    chunks = np.random.default_rng(1).integers(0, 64, (20, 512))
    found = tiny.perplexity(chunks, lambda windows: np.zeros((*windows.shape, 64), np.float32))
    assert found.value == pytest.approx(64)
    assert found.error == pytest.approx(0, abs=1e-6)
    assert found.chunks == 20


def test_the_second_half_of_each_chunk_is_scored_but_for_its_first_token() -> None:
    """255 of 512 tokens: a model that is right about them alone has perplexity one."""
    chunks = np.random.default_rng(1).integers(0, 64, (3, 512))

    def forward(windows: NDArray[np.int64]) -> NDArray[np.float32]:
        logits = np.zeros((*windows.shape, 64), np.float32)
        following = np.roll(windows, -1, axis=1)
        np.put_along_axis(logits, following[..., None], 50.0, axis=-1)
        logits[:, :256] *= -1  # predicts tokens 1 to 256
        logits[:, 511] *= -1  # there is no token 512
        return logits

    assert tiny.perplexity(chunks, forward).value == pytest.approx(1)


def test_the_error_is_that_of_the_mean_logarithm() -> None:
    """As `+/-` in llama-perplexity's estimate: the deviation over the root of n - 1."""
    losses = np.array([1.0, 2.0, 4.0])
    found = tiny._summary(losses, 1)
    assert found.value == pytest.approx(math.exp(7 / 3))
    variance = (1 + 4 + 16) / 3 - (7 / 3) ** 2
    assert found.error == pytest.approx(math.exp(7 / 3) * math.sqrt(variance / 2))


def test_the_unigram_model_knows_how_often_tokens_come() -> None:
    """Its perplexity is between that of the text's best constant guess and of the vocabulary."""
    ids = np.repeat([1, 2, 3, 3], 10_000)
    chunks = np.tile([1, 2, 3, 3], 128)[None]
    found = tiny.unigram(ids, chunks, 64)
    assert found.value == pytest.approx(2**1.5, rel=0.01)


def test_the_rate_rises_and_falls() -> None:
    """From nearly nothing over its height to nothing."""
    rates = [tiny._rate(step, step / 1000) for step in range(1001)]
    assert rates[0] < 0.02 * max(rates)
    assert 50 < int(np.argmax(rates)) < 150
    assert rates[1000] == pytest.approx(0)
    assert all(one >= two for one, two in pairwise(rates[150:]))


@pytest.mark.parametrize(("factor", "status"), [(1.001, 0), (1.02, 1), (0.98, 1)])
def test_a_check_compares_with_the_tool(factor: float, status: int, tmp_path: Path) -> None:
    """Half a percent apart is a difference in rounding, more is another model."""
    model, document = tmp_path / "tiny.gguf", tmp_path / "text.txt"
    written = tiny.export(model, SMALL, WORDS, weights())
    document.write_text(text()[:4000], encoding="utf-8")
    _, tokenizer, _ = tiny.load(model)
    chunks = tiny.chunks_of(tokenizer.encode(text()[:4000]), 2)
    value = tiny.perplexity(chunks, tiny.reference(SMALL, written)).value
    tool = tmp_path / "tool"
    tool.write_text(
        f"#!{sys.executable}\nimport sys\nassert sys.argv[-2:] == ['--chunks', '2']\n"
        f"print('Final estimate: PPL = {value * factor:.4f} +/- 1.0', file=sys.stderr)\n"
    )
    tool.chmod(0o755)
    assert tiny.check(model, document, str(tool), 2) == status


def test_a_check_without_an_estimate_fails(tmp_path: Path) -> None:
    """The tool exits with 0 even where it failed: what counts is its last line."""
    model, document = tmp_path / "tiny.gguf", tmp_path / "text.txt"
    tiny.export(model, SMALL, WORDS, weights())
    document.write_text(text()[:4000], encoding="utf-8")
    with pytest.raises(SystemExit, match="true gave no estimate"):
        tiny.check(model, document, "true", 1)
