"""What a config's options are to ``llama-bench``, which takes fewer and spells some differently.

What shapes the computation is passed on in the spelling of the build's own ``--help``. What is the
server's alone, such as its slots or its chat template, is left out. What shapes the computation
but is beyond ``llama-bench``, such as drafting, is an error: its figures would be another config's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from pytest_llmperf.build.ask import ask_program
from pytest_llmperf.build.build import Build
from pytest_llmperf.build.tools import BENCH, tool_of
from pytest_llmperf.errors import BuildError
from pytest_llmperf.plan.options import OptionNames, OptionValue, from_flag

_ENTRY = re.compile(r"^ {2}(-{1,2}\w[\w-]*(?:,? -{1,2}\w[\w-]*)*)(?: +<(.+?)>(?= {2}| \(|$))?")

_SERVERS_OWN = {
    *("agent", "alias", "backend-sampling", "check-tensors", "cont-batching", "context-shift"),
    *("ctx-size", "defrag-thold", "escape", "frequency-penalty", "grammar", "grammar-file"),
    *("ignore-eos", "jinja", "keep", "logit-bias", "media-path", "metrics", "min-p", "mlock"),
    *("offline", "parallel", "path", "perf", "pooling", "predict", "prefill-assistant"),
    *("presence-penalty", "props", "reverse-prompt", "seed", "skip-chat-parsing", "special"),
    *("spm-infill", "tags", "temp", "threads-http", "timeout", "typical", "ui", "verbose"),
    *("verbose-prompt", "verbosity", "warmup", "webui"),
}
_SERVERS_OWN_STARTS = (
    *("adaptive-", "api-", "cache-idle", "cache-list", "cache-prompt", "cache-ram", "cache-reuse"),
    *("chat-template", "checkpoint-", "cors-", "ctx-checkpoints", "dry-", "dynatemp-", "embd-"),
    *("image-", "json-schema", "kv-unified", "log-", "lookup-cache", "mcp-", "mirostat", "mmproj"),
    *("mtmd-", "reasoning", "repeat-", "sampl", "sleep-idle", "slot", "sse-", "ssl-", "tools"),
    *("top-", "tts-", "ui-", "video-", "xtc-"),
)
# How drafting is set up; where it is off, as the values below say, they change nothing.
_DRAFTING = ("spec-", "draft", "model-draft", "gpu-layers-draft", "ctx-size-draft")
_DRAFTING_ON = {"spec-type": "none", "spec-default": "False"}
_SAME_NAME = (
    *("cache-type-k", "cache-type-v", "threads", "batch-size", "ubatch-size", "main-gpu"),
    *("split-mode", "n-cpu-moe", "numa", "prio", "poll", "cpu-mask", "cpu-strict", "lazy-mode"),
    "rpc",
)
# Several of them make one argument.
_TOGETHER = {
    *("load-mode", "mmap", "direct-io", "fit", "fit-target", "fit-ctx", "override-tensor"),
    "cpu-moe",
}
# Experts of every layer, as llama-server's --cpu-moe takes them.
_ALL_EXPERTS = r"\.ffn_(up|down|gate_up|gate)_(ch|)exps=CPU"
_SERVERS_FIT_TARGET = 1024


def computing(options: Mapping[str, OptionValue]) -> dict[str, OptionValue]:
    """Return the options that shape what is computed: those that are not the server's alone.

    Args:
        options: As a config has them; returned under their first long names.
    """
    named = {_canonical(name): value for name, value in options.items()}
    return {name: value for name, value in named.items() if not _is_servers_own(name)}


def _canonical(name: str) -> str:
    found = from_flag(f"--{name}")
    return found[0] if found else name


def _is_servers_own(name: str) -> bool:
    if name in _DRAFTING_ON:
        return False
    return name in _SERVERS_OWN or name.startswith((*_SERVERS_OWN_STARTS, *_DRAFTING))


@dataclass(frozen=True, slots=True)
class BenchDialect:
    """The options of one build's ``llama-bench``.

    Attributes:
        build: Label of the build, for error texts.
        options: As its help lists them; ``about`` is what stands for the value, ``0|1``.
    """

    build: str
    options: tuple[OptionNames, ...]

    def arguments(self, options: Mapping[str, OptionValue], *, drafts: bool = False) -> list[str]:
        """Return command-line arguments for a config's options.

        Args:
            options: Long names of llama-server's options without dashes.
            drafts: Whether the config names a model that drafts.

        Raises:
            BuildError: If an option shapes the computation and this ``llama-bench`` cannot take
                it; the text names both.
        """
        if drafts:
            raise self.beyond("a model that drafts")
        wanted = computing(options)
        found: list[str] = []
        for name, value in wanted.items():
            if name in _SAME_NAME:
                found += self.flag(name, _one(value))
            elif name in _SPELLED:
                found += _SPELLED[name](self, value)
            elif name not in _TOGETHER and not _is_default(name, value, wanted):
                raise self.beyond(f"--{name} {_one(value)}")
        if placed := _placed(wanted):
            found += self.flag("override-tensor", placed)
        return [*found, *_loading(self, wanted), *_fitting(self, wanted)]

    def about(self, name: str) -> str | None:
        """Return what stands for the value of the option of this long name, None without one."""
        return next((o.about for o in self.options if f"--{name}" in o.names), None)

    def beyond(self, what: str) -> BuildError:
        """Return the error that says what this tool cannot do."""
        return BuildError(
            f"build {self.build}: {BENCH} cannot take {what}, which changes what is computed: "
            "measure this config by llama-server, and leave it out of workloads of llama-bench"
        )

    def flag(self, name: str, value: str) -> list[str]:
        """Return an option with its value.

        Raises:
            BuildError: If there is no such option, or the value would be taken for several.
        """
        if self.about(name) is None:
            raise self.beyond(f"--{name} {value}")
        if "," in value:
            # To llama-bench that is several values, to be measured one after the other.
            raise self.beyond(f"--{name} {value} (a comma)")
        return [f"--{name}", value]


_Spell = Callable[[BenchDialect, OptionValue], list[str]]


def _one(value: OptionValue) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)


def _is_default(name: str, value: OptionValue, wanted: Mapping[str, OptionValue]) -> bool:
    """Return whether an option asks for what the tool does anyway."""
    if name == "threads-batch":
        return value == wanted.get("threads")
    return _one(value) == _DRAFTING_ON.get(name)


def _on(value: OptionValue) -> bool:
    return _one(value).lower() in {"true", "on", "1", "enabled"}


def _flash_attention(dialect: BenchDialect, value: OptionValue) -> list[str]:
    name, asked = "flash-attn", _one(value)
    if asked not in {"auto", "-1"}:
        asked = "on" if _on(value) else "off"
    about = dialect.about(name)
    if about is None or "on" in about.split("|"):
        return dialect.flag(name, "auto" if asked == "-1" else asked)
    if asked not in {"on", "off"}:
        raise dialect.beyond(f"--{name} {asked} (it takes {about})")
    return dialect.flag(name, str(int(asked == "on")))


def _layers(dialect: BenchDialect, value: OptionValue) -> list[str]:
    asked = _one(value)
    # By itself it puts all layers on the GPU.
    return [] if asked in {"auto", "all"} else dialect.flag("n-gpu-layers", asked)


def _slashed(name: str) -> _Spell:
    return lambda dialect, value: dialect.flag(name, _one(value).replace(",", "/"))


def _switched(name: str, *, inverted: bool = False, default: bool = False) -> _Spell:
    def spell(dialect: BenchDialect, value: OptionValue) -> list[str]:
        on = _on(value) != inverted
        if on == default and dialect.about(name) is None:
            return []
        return dialect.flag(name, str(int(on)))

    return spell


_SPELLED: Mapping[str, _Spell] = {
    "flash-attn": _flash_attention,
    "gpu-layers": _layers,
    "device": _slashed("device"),
    "tensor-split": _slashed("tensor-split"),
    "kv-offload": _switched("no-kv-offload", inverted=True),
    "op-offload": _switched("no-op-offload", inverted=True),
    "no-host": _switched("no-host"),
    "repack": _switched("repack", default=True),
}


def _loading(dialect: BenchDialect, wanted: Mapping[str, OptionValue]) -> list[str]:
    mode = _load_mode(wanted)
    if dialect.about("load-mode") is not None:
        return dialect.flag("load-mode", mode) if mode else []
    if mode == "dio":
        return dialect.flag("direct-io", "1")
    if mode in {"none", "mmap"}:
        return dialect.flag("mmap", str(int(mode == "mmap")))
    return []


def _fitting(dialect: BenchDialect, wanted: Mapping[str, OptionValue]) -> list[str]:
    if not _on(wanted.get("fit", "off")):
        return []
    if dialect.about("fit-target") is None:
        raise dialect.beyond("--fit on")
    return dialect.flag("fit-target", _one(wanted.get("fit-target", _SERVERS_FIT_TARGET)))


def _placed(wanted: Mapping[str, OptionValue]) -> str:
    """Return where tensors are put by hand, in the spelling of ``--override-tensor``."""
    found = _one(wanted.get("override-tensor", "")).replace(",", ";")
    experts = _ALL_EXPERTS if wanted.get("cpu-moe") is True else ""
    return ";".join(part for part in (found, experts) if part)


def _load_mode(wanted: Mapping[str, OptionValue]) -> str:
    """Return how the weights are loaded, in the newest words; ``""`` for the tool's default.

    Locked in memory or not, the same is computed, so locking is left out.
    """
    mode = _one(wanted.get("load-mode", ""))
    if mode:
        return {"auto": "", "mmap+mlock": "mmap", "mlock": ""}.get(mode, mode)
    if wanted.get("direct-io") is True:
        return "dio"
    return {"True": "mmap", "False": "none"}.get(str(wanted.get("mmap")), "")


def parse_bench_help(text: str) -> tuple[OptionNames, ...]:
    """Read the options out of what ``llama-bench --help`` prints.

    Args:
        text: The whole help text.

    Returns:
        One entry an option, in the order of the text; ``about`` is what stands for its value.
    """
    found = []
    for line in text.splitlines():
        if match := _ENTRY.match(line):
            names, value = match.groups()
            found.append(
                OptionNames(
                    names=tuple(re.split(r",? ", names)),
                    takes_value=value is not None,
                    about=value or "",
                )
            )
    return tuple(found)


def bench_dialect_of(build: Build) -> BenchDialect:
    """Return the dialect of a build's ``llama-bench``, by asking it for help.

    Raises:
        BuildError: If the build has none, or its help cannot be read.
    """
    program = str(tool_of(build, BENCH))
    env = tuple(sorted(build.host_env.items()))
    return BenchDialect(build.label, _ask_help(program, env, build.label))


@lru_cache(maxsize=32)
def _ask_help(program: str, env: Sequence[tuple[str, str]], label: str) -> tuple[OptionNames, ...]:
    text, more, _ = ask_program((program,), "--help", dict(env), f"build {label}: {BENCH}")
    options = parse_bench_help(text + more)
    if not any("--n-depth" in option.names for option in options):
        told = (more or text).strip().splitlines()
        raise BuildError(
            f"build {label}: `{BENCH} --help` lists no --n-depth, which came in April 2025"
            + (f"; it says: {told[-1]}" if told and not options else "")
        )
    return options
