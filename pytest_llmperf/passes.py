"""All passes over corpora of one run: which build answers what, against which reference.

Every pass of a build, config and corpus is made once, however many tests and metrics look at it.
What a config's answers are compared with is its reference:

* its own answers on the baseline's build, if it names nothing else (``against`` is empty): a
  baseline diverges from itself by nothing, so all divergence is the build's doing;
* the answers of another config on the baseline's build (``against = "f16"``): both builds
  diverge from those, by what the quantization costs, and the build is judged by the difference;
* a file of recorded distributions (``against = "f16.kldref"``), however old, from any machine.

Two builds that are compared side by side write at the same time, and one reader compares them
exactly, with nothing on the disk. Whatever has to last, or is used by several configs, is kept as
a compact reference (``quality/reference.py``).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import BinaryIO, TypeVar

from pytest_llmperf.build.build import Build
from pytest_llmperf.build.tools import PERPLEXITY, tool_of
from pytest_llmperf.errors import (
    BaselineError,
    LlmperfError,
    ModelError,
    RunError,
)
from pytest_llmperf.files import expanded
from pytest_llmperf.leases import Leases
from pytest_llmperf.measure.logfacts import read_log
from pytest_llmperf.measure.on_gpu import OnGpu, require_gpu
from pytest_llmperf.metrics import FEWEST_CHUNKS
from pytest_llmperf.models.locate import sha256
from pytest_llmperf.plan.config import REFERENCE_SUFFIX, Case, Config, CorpusPass
from pytest_llmperf.preflight import available_mib, fits_twice, require_disk, weights_mib
from pytest_llmperf.quality.compare import compare_passes
from pytest_llmperf.quality.divergence import TokenDivergences, compare
from pytest_llmperf.quality.logits import LogitsReader
from pytest_llmperf.quality.perplexity import PassPlan, Perplexity
from pytest_llmperf.quality.reference import (
    Reference,
    build_reference,
    compare_reference,
    own_divergences,
)
from pytest_llmperf.quality.side import Side, Way, has_tool
from pytest_llmperf.quality.values import Chunks, all_figures, base_values, chunk_values
from pytest_llmperf.serve.launch import ServePlan, needs

_T = TypeVar("_T")

PROTOCOL = 1
"""Raised when the way of passing changes so that older results no longer compare."""

_MIB = 1024 * 1024
# Weights, then the KV cache and buffers of a context of a few thousand tokens.
_OVERHEAD = 1.1
# Reading two streams takes 250 MiB at a vocabulary of 248 K (docs/measurements.md).
_READER_MIB = 300.0
# Of natural text a reference keeps half of this a token; random text takes more.
_REFERENCE_BYTES = 2048
_SPARE_DISK_MIB = 64.0
# A token of text has several bytes; two are the fewest that a whole text was seen to have.
_TOKEN_BYTES = 2
# Given by the pass, whatever a config says of them.
_PINNED = ("ctx-size", "batch-size", "ubatch-size", "parallel", "chunks")
# All of a small vocabulary; of a large one, what leaves a tail of next to nothing.
_ALL_LISTED = 8192


@dataclass(frozen=True, slots=True)
class Passed:
    """What one pass said of one config.

    Attributes:
        build: Label of the build.
        command: As one would type it.
        log: Its log.
        values: Metric name to one list a chunk.
        tokens: Scored tokens of a chunk.
        way: Which program computed the log-probabilities.
        reference: The file that it diverges from; None where the baseline's own pass, made at
            the same time, was the reference.
        model: Name of the model file as a server tells it, ``""`` by the tool.
        summary: All that ``llama-perplexity --kl-divergence`` prints; empty where the pass is the
            reference itself.
        doubt: What the reference adds to the mean KLD: its standard error, and the bounds that
            hold for certain, nats; empty where nothing.
        gpu: What its GPUs did meanwhile, as JSON values; empty where there are none. Of two passes
            at once it is what they did under both.
    """

    build: str
    command: str
    log: str
    values: Chunks
    tokens: int
    way: Way
    reference: Path | None = None
    model: str = ""
    summary: Mapping[str, object] = field(default_factory=dict)
    doubt: Mapping[str, float] = field(default_factory=dict)
    gpu: Mapping[str, object] = field(default_factory=dict)


@dataclass(slots=True)
class Passes:
    """The passes of one run.

    Attributes:
        new: The build under test.
        base: The build measured side by side, or None.
        configs: All configs of the suite file, by name.
        model: Finds a config's model file.
        corpus: Finds a pass's text.
        serve: Run folder, limits and progress; while a corpus is passed, also the GPUs.
        cache: Cache folder: references and hashes.
        leases: Keeps other measuring away from its GPUs, or from the whole machine.
        suite_folder: Folder that relative names of references start from.
        limit: Most seconds that a pass may be expected to take.
        machine: What its numbers may depend on of this machine, in words.
        before: Called before the first program of a pass starts.
    """

    new: Build
    base: Build | None
    configs: Mapping[str, Config]
    model: Callable[[Config], Path]
    corpus: Callable[[CorpusPass], Path]
    serve: ServePlan
    cache: Path
    leases: Leases
    suite_folder: Path
    limit: float
    machine: str = ""
    before: Callable[[], None] = lambda: None
    _made: dict[tuple[object, ...], object] = field(default_factory=dict)
    _saying: Lock = field(default_factory=Lock)

    def side_by_side(self, case: Case) -> tuple[Passed, Passed]:
        """Return what the baseline's build and the build under test say of a case.

        Raises:
            LlmperfError: If a pass cannot be made, or breaks off.
        """
        config, one = _parts(case)
        base = self.base
        if base is None:
            raise RunError("there is no second build to measure side by side")
        if not config.against and self._fits(config, 2):
            return self._once((case.key, config.gpu, "both"), lambda: self._both(base, config, one))
        first = self._alone(base, case)
        return first, self._against(self.new, case, _file_of(first))

    def alone(self, case: Case) -> Passed:
        """Return what the build under test says of a case, with a reference of its own making.

        Raises:
            LlmperfError: If a pass cannot be made, or breaks off.
        """
        return self._alone(self.new, case)

    def against(self, case: Case, recorded: Path) -> Passed:
        """Return what the build under test says of a case, against a recorded reference.

        Raises:
            LlmperfError: If a pass cannot be made, breaks off, or is about other tokens.
        """
        return self._against(self.new, case, recorded)

    def names_file(self, config: Config) -> bool:
        """Return whether a config names a file as its reference."""
        return bool(config.against) and config.against not in self.configs

    def given_reference(self, case: Case) -> Path | None:
        """Return the file that a config names as its reference, None if it names none.

        Raises:
            ModelError: If there is no such file.
        """
        against = case.config.against
        if not self.names_file(case.config):
            return None
        path = self.suite_folder / expanded(against)
        if not path.is_file():
            raise ModelError(
                f"config {case.config.name}: against = {against!r}: no such file ({path}): put it "
                "there, or name a config instead"
            )
        return path

    def conditions(self, case: Case) -> dict[str, str | int | float | bool]:
        """Return what is known before a pass of all that must be equal to compare it."""
        config, one = _parts(case)
        found: dict[str, str | int | float | bool] = {
            "protocol": f"quality {PROTOCOL}",
            "corpus": self._sha(self.corpus(one))[:16],
            "pass": one.digest(),
            "path": self._way(one),
            "against": self._against_what(config),
        }
        if self.new.url is None:
            found |= {"model": self._model_sha(config), "options": self._options(config)}
            found |= self.new.conditions
            if config.cards > 1:
                # Unsaid where it is one: what was recorded before there was a choice stays valid.
                found["gpus"] = config.cards
        return found

    def fingerprint(self, case: Case, passed: Passed) -> dict[str, str | int | float | bool]:
        """Return what must be equal for two results of a case to be comparable."""
        found = self.conditions(case)
        if self.new.url is not None:
            found |= {"model": passed.model, "options": "of the running server"}
        return {
            **found,
            "reference": "" if passed.reference is None else self.digest(passed.reference),
            "tokens": passed.tokens,
        }

    def digest(self, reference: Path) -> str:
        """Return a short hash of a reference, as fingerprints hold it."""
        return self._sha(reference)[:16]

    # -- inside ----------------------------------------------------------------------------

    def _options(self, config: Config) -> str:
        options = {**config.options, **self.new.options}
        kept = sorted((name, value) for name, value in options.items() if name not in _PINNED)
        return " ".join(f"{name}={value}" for name, value in kept)

    def _against_what(self, config: Config) -> str:
        if not config.against:
            return "itself"
        if self.names_file(config):
            return "a file"
        other = self.configs[config.against]
        if self.new.url is not None:
            return other.name
        return f"{self._model_sha(other)[:16]} {self._options(other)}".rstrip()

    def _once(self, key: tuple[object, ...], make: Callable[[], _T]) -> _T:
        """Make a thing once; what failed is not tried again by every metric and test."""
        if key not in self._made:
            try:
                self._made[key] = make()
            except LlmperfError as error:
                self._made[key] = error
        found = self._made[key]
        if isinstance(found, LlmperfError):
            raise found
        return found  # type: ignore[return-value]  # what was made under this key

    def _alone(self, build: Build, case: Case) -> Passed:
        config, one = _parts(case)
        given = self.given_reference(case)
        if given is not None:
            return self._against(build, case, given)
        if config.against:
            other = self._other(config)
            if build.url is not None:
                raise RunError(
                    f"config {config.name}: {build.label} is a running server and has one config, "
                    f"so {other.name} cannot be asked of it: name a file with `against`, or have "
                    "the build started here"
                )
            reference = self._once(
                (build.identity, other.name, other.gpu, one.name, "reference"),
                lambda: self._kept_reference(build, other, one),
            )
            return self._against(build, case, reference)
        return self._once(
            (build is self.new, case.key, config.gpu, "own"), lambda: self._own(build, config, one)
        )

    def _against(self, build: Build, case: Case, reference: Path) -> Passed:
        config, one = _parts(case)
        # Two builds that are equal are passed twice all the same: what differs is noise, and seen.
        return self._once(
            (build is self.new, case.key, config.gpu, str(reference)),
            lambda: self._diverge(build, config, one, reference),
        )

    def _both(self, base: Build, config: Config, one: CorpusPass) -> tuple[Passed, Passed]:
        what = f"{base.label} and {self.new.label} {one.name}"
        with self._passing(config, what) as on_gpu:
            sides = self._side(base, config, one), self._side(self.new, config, one)
            found = compare_passes(*sides, self.corpus(one), self._plan(one))
            gpu = on_gpu.facts()
        tokens = found.tokens
        # Perplexities of both by the same means, or what one stream clips would count as a change.
        known = min(len(found.base.running), len(found.new.running))
        first, second = (
            replace(one_pass, running=one_pass.running[:known])
            for one_pass in (found.base, found.new)
        )
        its_base = _passed(sides[0], found.base, base_values(first, tokens), tokens)
        its_new = _passed(sides[1], found.new, chunk_values(second, tokens), tokens)
        summary = all_figures(tokens)
        return replace(its_base, gpu=gpu), replace(its_new, gpu=gpu, summary=summary)

    def _own(self, build: Build, config: Config, one: CorpusPass) -> Passed:
        """Record a config's own answers as a reference of the run folder."""
        name = re.sub(r"[^\w.+-]", "_", f"{build.label}-{config.name}-{one.name}")
        path = self.serve.folder / f"{name}{REFERENCE_SUFFIX}"
        what = f"{build.label} {one.name}, recording a reference"
        with self._passing(config, what) as on_gpu:
            side = self._side(build, config, one)
            found, reference = self._record(side, one, path)
            gpu = on_gpu.facts()
        tokens = own_divergences(reference)
        passed = _passed(side, found, base_values(found, tokens), tokens, path)
        return replace(passed, gpu=gpu)

    def _kept_reference(self, build: Build, config: Config, one: CorpusPass) -> Path:
        """Return the reference of another config's answers; it is kept, and never changed."""
        way = self._way(one)
        what = [
            *(PROTOCOL, self.machine, way, one.digest()),
            *(self._model_sha(config), self._sha(self.corpus(one))),
            # The hash of a build is that of its server.
            *(build.sha256, self._sha(tool_of(build, PERPLEXITY)) if way == "tool" else ""),
            sorted(map(str, build.env.items())),
            *([build.container.program] if build.container is not None else []),
            *([config.cards] if config.cards > 1 else []),
            sorted(map(str, {**config.options, **build.options}.items())),
        ]
        digest = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
        path = self.cache / "references" / f"{config.name}-{one.name}-{digest}{REFERENCE_SUFFIX}"
        if not self._usable(path):
            with self._passing(config, f"{build.label} {one.name}, recording a reference"):
                # Another run may have made it while this one waited.
                if not self._usable(path):
                    self._record(self._side(build, config, one), one, path)
        return path

    def _usable(self, path: Path) -> bool:
        try:
            Reference.load(path)
        except BaselineError:
            return False
        return True

    def _record(self, side: Side, one: CorpusPass, path: Path) -> tuple[Perplexity, Reference]:
        build, config = side.build, side.config
        corpus = self.corpus(one)
        self._check_disk(corpus, one, path.parent)
        made: list[Reference] = []

        def consume(stream: BinaryIO) -> None:
            made.append(
                build_reference(
                    LogitsReader(stream, f"the log-probabilities of {build.label}"),
                    path,
                    model_sha256=self._model_sha(config) if build.url is None else "0" * 64,
                    corpus_sha256=self._sha(corpus),
                )
            )

        found = side.run(corpus, self._plan(one), consume)
        return found, made[0]

    def _diverge(self, build: Build, config: Config, one: CorpusPass, reference: Path) -> Passed:
        doubt: dict[str, float] = {}
        made: list[TokenDivergences] = []

        def consume(stream: BinaryIO) -> None:
            candidate = LogitsReader(stream, f"the log-probabilities of {build.label}")
            if reference.suffix != REFERENCE_SUFFIX:
                with _opened(reference) as file:
                    made.append(compare(LogitsReader(file, str(reference)), candidate))
                return
            known = Reference.load(reference)
            if build.url is None and not self.names_file(config):
                known.check_base(
                    model_sha256=self._model_sha(self.configs.get(config.against, config)),
                    corpus_sha256=self._sha(self.corpus(one)),
                )
            found = compare_reference(known, candidate)
            low, high = found.kld_bounds
            doubt.update(kld_error=found.kld_error, kld_least=low, kld_most=high)
            made.append(found.tokens)

        with self._passing(config, f"{build.label} {one.name}") as on_gpu:
            side = self._side(build, config, one)
            if self.names_file(config):
                # Whoever recorded it, and by which program: it has no tail shared evenly.
                side = replace(side, listed=_ALL_LISTED)
            found = side.run(self.corpus(one), self._plan(one), consume)
            gpu = on_gpu.facts()
        passed = _passed(side, found, chunk_values(found, made[0]), made[0], reference)
        return replace(passed, doubt=doubt, summary=all_figures(made[0]), gpu=gpu)

    @contextlib.contextmanager
    def _passing(self, config: Config, what: str) -> Iterator[OnGpu]:
        """Have the machine for a pass, and see to it that its GPUs' memory is free afterwards.

        Raises:
            LeakError: If it is not.
        """
        self.before()
        gpus, exclusive = needs(config, (self.base, self.new))
        about = f"config {config.name}"
        try:
            with self.leases.hold(gpus, exclusive=exclusive, what=about) as cards:
                self.serve = replace(self.serve, cards=cards)
                on_gpu = OnGpu(cards if config.gpu else (), self._say)
                self._say(f"{config.name}: {what}")
                try:
                    yield on_gpu
                except BaseException:
                    on_gpu.end((), about, check=False)
                    raise
                on_gpu.end((), f"{about}: {what}")
        finally:
            self.serve = replace(self.serve, cards=())

    def needs(self, case: Case) -> tuple[int, bool]:
        """Return the cards that a case takes, and whether nothing else may run on the machine.

        That of all its passes: its reference may be answers of another config.
        """
        configs = [case.config]
        if case.config.against in self.configs:
            configs.append(self._other(case.config))
        each = [needs(config, (self.base, self.new)) for config in configs]
        return max(gpus for gpus, _ in each), any(exclusive for _, exclusive in each)

    def _other(self, config: Config) -> Config:
        """Return the config whose answers are the reference of this one's."""
        other = self.configs[config.against]
        # Whose test is marked `gpu` is compared with what a GPU answers.
        return replace(other, gpu=other.gpu or config.gpu)

    def _say(self, text: str) -> None:
        with self._saying:
            self.serve.progress(text)

    def _side(self, build: Build, config: Config, one: CorpusPass) -> Side:
        model = self.model(config) if build.url is None else Path()
        if build.url is None and not self._fits(config, 1):
            raise RunError(
                f"config {config.name}: a pass needs about {self._need(config, 1):.0f} MiB of "
                f"memory, {available_mib():.0f} MiB are available: end other programs, or take a "
                "smaller model"
            )

        def progress(text: str) -> None:
            self._say(f"{config.name}: {build.label}: {text}")

        def check(log: Path) -> None:
            facts = read_log(log.read_text("utf-8", errors="replace"))
            require_gpu(build, config, facts, log)

        serve = replace(self.serve, progress=progress)
        return Side(build, config, model, self._way(one), serve, progress=progress, check=check)

    def _way(self, one: CorpusPass) -> Way:
        if one.path != "auto":
            return one.path
        builds = [build for build in (self.new, self.base) if build is not None]
        return "tool" if all(map(has_tool, builds)) else "server"

    def _plan(self, one: CorpusPass) -> PassPlan:
        return PassPlan(
            context=one.context,
            batch=one.batch,
            ubatch=one.ubatch,
            chunks=one.chunks,
            folder=self.serve.folder,
            start=self.serve.timeout,
            limit=self.limit,
        )

    def _fits(self, config: Config, times: int) -> bool:
        # How much of one goes to the GPU only the build knows; two should have ample room.
        if times == 1:
            return config.gpu or available_mib() >= self._need(config, 1)
        cards = self.leases.held[: config.cards]
        return fits_twice(self._need(config, times), gpu=config.gpu, cards=cards or None)

    def _need(self, config: Config, times: int) -> float:
        """Return the memory of so many passes at once, MiB."""
        if any(build is not None and build.url is not None for build in (self.new, self.base)):
            return _READER_MIB
        return times * weights_mib([self.model(config)]) * _OVERHEAD + _READER_MIB

    def _check_disk(self, corpus: Path, one: CorpusPass, folder: Path) -> None:
        most = corpus.stat().st_size // _TOKEN_BYTES // one.context
        chunks = most if one.chunks is None else min(one.chunks, most)
        need = chunks * one.context / 2 * _REFERENCE_BYTES / _MIB + _SPARE_DISK_MIB
        mend = "make room, or pass fewer `chunks`"
        require_disk(folder, need, what=f"pass {one.name}: its reference", mend=mend)

    def _model_sha(self, config: Config) -> str:
        return self._sha(self.model(config))

    def _sha(self, path: Path) -> str:
        return sha256(path, self.cache)


def _parts(case: Case) -> tuple[Config, CorpusPass]:
    if case.corpus_pass is None:
        raise RunError(f"{case.key} passes no corpus")
    return case.config, case.corpus_pass


def _file_of(passed: Passed) -> Path:
    if passed.reference is None:  # pragma: no cover - a pass alone always has one
        raise RunError(f"the pass of {passed.build} left no reference")
    return passed.reference


def _passed(
    side: Side,
    found: Perplexity,
    values: Chunks,
    tokens: TokenDivergences,
    reference: Path | None = None,
) -> Passed:
    if tokens.n_chunk < FEWEST_CHUNKS:
        raise RunError(
            f"the text makes {tokens.n_chunk} chunks, and fewer than {FEWEST_CHUNKS} tell nothing "
            "of how chunks differ: take a longer text or a shorter `context`"
        )
    return Passed(
        side.build.label,
        found.command,
        found.log,
        values,
        tokens.n_scored,
        side.way,
        reference,
        found.model,
    )


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
