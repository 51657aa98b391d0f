"""A ``llama-server`` made of an ``xllamacpp`` wheel: one process, the same options.

An ``xllamacpp`` wheel holds the real server of llama.cpp as a library. This program hosts that
library in a process of its own, so that a wheel can be started, measured and stopped like any
``llama-server`` binary::

    python -I embedded_server.py [--llmperf-wheel DIR] <llama-server options...>

It is run by path, under the wheel's interpreter, and therefore stands alone: it imports the
standard library and ``xllamacpp`` and nothing else, and ``xllamacpp`` only when asked to work.

What an option maps to is decided by looking at the wheel: an option whose parameter the wheel
does not have is neither listed by ``--help`` nor accepted. Where ``CommonParams`` and
``llama-server`` have different defaults, those of ``llama-server`` hold: port 8080, slots chosen
by the server (``-np -1``: four slots with a unified cache), as many threads as physical cores
(hybrid processors too, where ``llama-server`` leaves out the efficiency cores). Neither the
environment (``LLAMA_ARG_*``, ``LLAMA_API_KEY``) nor a ``config.ini`` is read.

Exit status: 0 after SIGTERM or SIGINT, 1 when the options are wrong or the model does not load.
A signal that arrives while the model is loading ends the process at once and by that signal, as
it does with ``llama-server``: the wheel holds the interpreter lock until it is loaded.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

MIB = 1024 * 1024
INT_MAX = 2**31 - 1
SEED_MASK = 0xFFFFFFFF
"""Seeds are unsigned 32-bit; -1 stands for "random"."""

DEFAULT_PORT = 8080
AUTO_SLOTS = -1

_HELP_COLUMN = 40

_TRUE = ("on", "enabled", "true", "1")
_FALSE = ("off", "disabled", "false", "0")
_AUTO = ("auto", "-1")

_EXPERTS = r"\.ffn_(up|down|gate|gate_up)_(ch|)exps"
_DENSE_FFN = r"\.ffn_(up|down|gate)\."


class OptionError(Exception):
    """Options that cannot be carried out; the text is what the user reads."""


class Wheel:
    """An imported wheel and the parameters that its server will be started with.

    Args:
        module: The imported ``xllamacpp``.
    """

    def __init__(self, module: ModuleType) -> None:
        self.module = module
        self.params: object = module.CommonParams()
        self.overrides: list[str] = []
        """Tensor placements, ``pattern=buffer type``: several options add to them."""

    @property
    def version(self) -> str:
        """The wheel's version, such as ``2026.10.11549``."""
        return str(getattr(self.module, "__version__", "unknown"))

    def has(self, path: str) -> bool:
        """Tell whether the wheel has a parameter, such as ``speculative.draft.n_max``."""
        try:
            self.get(path)
        except AttributeError:
            return False
        return True

    def get(self, path: str) -> object:
        """Return a parameter; raises ``AttributeError`` where the wheel has none of that name."""
        value = self.params
        for name in path.split("."):
            value = getattr(value, name)
        return value

    def set(self, path: str, value: object) -> None:
        """Set a parameter; raises what the wheel raises for a value it does not take."""
        owner, _, name = path.rpartition(".")
        setattr(self.get(owner) if owner else self.params, name, value)

    def listed(self, path: str) -> list[Any]:
        """Return a copy of a parameter that is a list."""
        value: Any = self.get(path)
        return list(value)

    def members(self, enum: str, prefix: str) -> dict[str, Any]:
        """Return the members of one of the wheel's enums, without ``prefix``, in lower case."""
        found: dict[str, Any] = getattr(getattr(self.module, enum, None), "__members__", {})
        return {
            name.removeprefix(prefix).lower(): member
            for name, member in found.items()
            if not name.endswith(("_COUNT", "_MAX_VALUE", "_UNSPECIFIED"))
        }


Put = Callable[[Wheel, str], None]


@dataclass(frozen=True, slots=True)
class Option:
    """One option of ``llama-server`` and what it sets.

    Args:
        names: Every spelling, the short ones first.
        needs: Parameters that the wheel must have for the option to exist.
        put: Sets the parameters from the option's value, ``""`` for an option without one.
            Raises ``ValueError`` with what was expected.
        text: One line of help.
        metavar: What the value is called; empty for an option that takes none.
        choices: Returns the values that the wheel knows, for an option that names one.
    """

    names: tuple[str, ...]
    needs: tuple[str, ...]
    put: Put
    text: str
    metavar: str = ""
    choices: Callable[[Wheel], Iterable[str]] | None = None


# --- how values are read ------------------------------------------------------------------


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError("expected an integer") from None


def _real(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError("expected a number") from None


def _gpu_layers(text: str) -> int:
    words = {"auto": -1, "all": -2}
    if text in words:
        return words[text]
    try:
        return int(text)
    except ValueError:
        raise ValueError("expected a number of layers, auto or all") from None


def _truth(text: str) -> bool:
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    raise ValueError("expected on or off")


def _names(text: str) -> list[str]:
    return [name for name in (part.strip() for part in text.split(",")) if name]


def _reals(text: str) -> list[float]:
    return [_real(part) for part in re.split(r"[,/]+", text)]


def _file(text: str) -> str:
    try:
        return Path(text).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot read the file: {error.strerror}") from None


def _one_of(text: str, known: dict[str, Any]) -> object:
    if text not in known:
        raise ValueError(f"expected one of {', '.join(known)}")
    return known[text]


# --- kinds of values ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Enum:
    """One of the wheel's enums, as the value of an option.

    Args:
        name: The enum's name in the wheel.
        prefix: What its members' names begin with.
        spelt: How ``llama-server`` spells a member, where not by its name in lower case.
        without: Members that ``llama-server`` refuses.
    """

    name: str
    prefix: str
    spelt: tuple[tuple[str, str], ...] = ()
    without: tuple[str, ...] = ()

    def known(self, wheel: Wheel) -> dict[str, Any]:
        """Return the wheel's members by their spelling on the command line."""
        spelt = dict(self.spelt)
        members = wheel.members(self.name, self.prefix)
        return {
            spelt.get(name, name): member
            for name, member in members.items()
            if name not in self.without
        }


Read = Callable[[str], object]

_READERS: dict[str, tuple[str, Read]] = {
    "int": ("N", _integer),
    "real": ("N", _real),
    "reals": ("N0,N1,...", _reals),
    "seed": ("N", lambda text: _integer(text) & SEED_MASK),
    "temp": ("N", lambda text: max(_real(text), 0.0)),
    "layers": ("N|auto|all", _gpu_layers),
    "onoff": ("on|off", _truth),
    "bit": ("0|1", _truth),
    "text": ("TEXT", str),
    "file": ("FILE", str),
    "content": ("FILE", _file),
}

# Types that cannot hold a cache: the library crashes on them. Those of forks are not among them.
_NO_CACHE = """
q8_1 q2_k q3_k q4_k q5_k q6_k q8_k iq2_xxs iq2_xs iq3_xxs iq1_s iq3_s iq2_s iq4_xs iq1_m
i8 i16 i32 i64 f64 tq1_0 tq2_0 mxfp4 nvfp4 q1_0 q2_0
"""

_ENUMS: dict[str, Enum] = {
    "cache": Enum("ggml_type", "GGML_TYPE_", without=tuple(_NO_CACHE.split())),
    "numa": Enum("ggml_numa_strategy", "GGML_NUMA_STRATEGY_"),
    "split": Enum("llama_split_mode", "LLAMA_SPLIT_MODE_"),
    "rope": Enum("llama_rope_scaling_type", "LLAMA_ROPE_SCALING_TYPE_"),
    "pooling": Enum("llama_pooling_type", "LLAMA_POOLING_TYPE_"),
    "lazy": Enum("llama_lazy_mode", "LLAMA_LAZY_MODE_"),
    "load": Enum(
        "llama_load_mode",
        "LLAMA_LOAD_MODE_",
        (("mmap_mlock", "mmap+mlock"), ("direct_io", "dio")),
    ),
    "reasoning": Enum(
        "common_reasoning_format",
        "COMMON_REASONING_FORMAT_",
        (("deepseek_legacy", "deepseek-legacy"),),
    ),
}


def _row(line: str) -> Option:
    """Return the option that a line of a table below describes."""
    spelt, to, kind, text = re.split(r"\s{2,}", line.strip(), maxsplit=3)
    names = tuple(spelt.split())
    if kind in ("yes", "no"):
        return Option(names, (to,), lambda wheel, _value: wheel.set(to, value=kind == "yes"), text)
    if kind in _ENUMS:
        enum = _ENUMS[kind]

        def put(wheel: Wheel, value: str) -> None:
            wheel.set(to, _one_of(value, enum.known(wheel)))

        return Option(names, (to,), put, text, "NAME", enum.known)
    metavar, read = _READERS[kind]
    return Option(names, (to,), lambda wheel, value: _assign(wheel, to, read(value)), text, metavar)


def _assign(wheel: Wheel, to: str, value: object) -> None:
    wheel.set(to, value)
    room, _, name = to.partition(".")
    if room == "sampling":
        # The server lets the model's metadata replace defaults, save those marked as chosen.
        flags = wheel.members("common_params_sampling_config", "COMMON_PARAMS_SAMPLING_CONFIG_")
        chosen: Any = wheel.get("sampling.user_sampling_config")
        wheel.set("sampling.user_sampling_config", int(chosen) | int(flags.get(name, 0)))


# --- options that are more than one assignment --------------------------------------------


def _put_flash(wheel: Wheel, value: str) -> None:
    words = (*((w, "enabled") for w in _TRUE), *((w, "disabled") for w in _FALSE))
    names = {**dict(words), **dict.fromkeys(_AUTO, "auto")}
    if value not in names:
        raise ValueError("expected on, off or auto")
    members = wheel.members("llama_flash_attn_type", "LLAMA_FLASH_ATTN_TYPE_")
    wheel.set("flash_attn_type", members[names[value]])


def _put_mmap(wheel: Wheel, _value: str) -> None:
    wheel.set("use_mmap", value=True)
    # Wheels up to 0.2.10 read files directly unless told otherwise, and that goes before mmap.
    wheel.set("use_direct_io", value=False)


def _put_fit_target(wheel: Wheel, value: str) -> None:
    margins = [_integer(part) * MIB for part in re.split(r"[,/]+", value)]
    known = wheel.listed("fit_params_target")
    if len(margins) > len(known):
        raise ValueError(f"expected at most {len(known)} values, one for each device")
    rest = margins * len(known) if len(margins) == 1 else known
    wheel.set("fit_params_target", margins + rest[len(margins) :])


def _put_tensor_split(wheel: Wheel, value: str) -> None:
    parts = _reals(value)
    known = wheel.listed("tensor_split")
    if len(parts) > len(known):
        raise ValueError(f"expected at most {len(known)} values, one for each device")
    wheel.set("tensor_split", parts + [0.0] * (len(known) - len(parts)))


def _put_override(wheel: Wheel, value: str) -> None:
    parts = _names(value)
    if not parts or not all("=" in part for part in parts):
        raise ValueError("expected PATTERN=BUFFER,...")
    wheel.overrides += parts


def _put_cpu_moe(wheel: Wheel, _value: str) -> None:
    wheel.overrides.append(f"{_EXPERTS}=CPU")


def _on_cpu(pattern: str) -> Put:
    def put(wheel: Wheel, value: str) -> None:
        count = _integer(value)
        if count < 0:
            raise ValueError("expected a number of layers, 0 or more")
        wheel.overrides += [rf"blk\.{layer}{pattern}=CPU" for layer in range(count)]

    return put


def _put_rope_scale(wheel: Wheel, value: str) -> None:
    scale = _real(value)
    if scale == 0.0:
        raise ValueError("expected a number other than 0")
    wheel.set("rope_freq_scale", 1.0 / scale)


def _put_perf(*, state: bool) -> Put:
    def put(wheel: Wheel, _value: str) -> None:
        wheel.set("no_perf", not state)
        wheel.set("sampling.no_perf", not state)

    return put


def _put_timeout(wheel: Wheel, value: str) -> None:
    wheel.set("timeout_read", _integer(value))
    wheel.set("timeout_write", _integer(value))


def _put_repeat_last_n(wheel: Wheel, value: str) -> None:
    count = _integer(value)
    if count < -1:
        raise ValueError("expected a number of tokens, or -1 for the context size")
    kept: Any = wheel.get("sampling.n_prev")
    _assign(wheel, "sampling.penalty_last_n", count)
    wheel.set("sampling.n_prev", max(count, int(kept)))


def _put_reasoning(wheel: Wheel, value: str) -> None:
    if value in _AUTO:
        wheel.set("enable_reasoning", -1)
        return
    thinking = _truth(value)
    wheel.set("enable_reasoning", int(thinking))
    _add_template_arguments(wheel, {"enable_thinking": thinking})


def _put_arguments(wheel: Wheel, value: str) -> None:
    try:
        found = json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"expected a JSON object: {error}") from None
    if not isinstance(found, dict):
        raise ValueError("expected a JSON object")  # noqa: TRY004 - all bad values are ValueError
    _add_template_arguments(wheel, found)


def _add_template_arguments(wheel: Wheel, found: dict[str, object]) -> None:
    known: Any = wheel.get("default_template_kwargs")
    # The wheel hands out a copy, so it must be set as a whole.
    texts = {name: json.dumps(value) for name, value in found.items()}
    wheel.set("default_template_kwargs", {**known, **texts})


def _put_rerank(wheel: Wheel, _value: str) -> None:
    wheel.set("embedding", value=True)
    members = wheel.members("llama_pooling_type", "LLAMA_POOLING_TYPE_")
    wheel.set("pooling_type", members["rank"])


def _put_host(wheel: Wheel, value: str) -> None:
    wheel.set("hostnames", _names(value))


def _put_alias(wheel: Wheel, value: str) -> None:
    # A name in wheels up to 0.2.12, a set of names from then on.
    names = _names(value)
    wheel.set("model_alias", value if isinstance(wheel.get("model_alias"), str) else set(names))


def _put_tags(wheel: Wheel, value: str) -> None:
    wheel.set("model_tags", set(_names(value)))


def _put_api_key(wheel: Wheel, value: str) -> None:
    _add_keys(wheel, _names(value))


def _put_api_key_file(wheel: Wheel, value: str) -> None:
    lines = (line.strip() for line in _file(value).splitlines())
    _add_keys(wheel, [line for line in lines if line and not line.startswith("#")])


def _add_keys(wheel: Wheel, keys: list[str]) -> None:
    known = wheel.listed("api_keys")
    wheel.set("api_keys", known + keys)


def _put_lora(wheel: Wheel, value: str) -> None:
    _add_loras(wheel, [(path, 1.0) for path in _names(value)])


def _put_lora_scaled(wheel: Wheel, value: str) -> None:
    found = []
    for part in _names(value):
        path, colon, scale = part.rpartition(":")
        if not colon:
            raise ValueError("expected FILE:SCALE,...")
        found.append((path, _real(scale)))
    _add_loras(wheel, found)


def _add_loras(wheel: Wheel, found: list[tuple[str, float]]) -> None:
    known = wheel.listed("lora_adapters")
    made = [wheel.module.CommonAdapterLoraInfo(path, scale) for path, scale in found]
    wheel.set("lora_adapters", known + made)


def _put_slot_folder(wheel: Wheel, value: str) -> None:
    # The server appends file names to this text.
    wheel.set("slot_save_path", value if value.endswith("/") else f"{value}/")


def _put_spec_types(wheel: Wheel, value: str) -> None:
    types = _spec_types(wheel)
    wheel.set("speculative.types", [_one_of(name, types) for name in _names(value)])


def _put_spec_type(wheel: Wheel, value: str) -> None:
    wheel.set("speculative.type", _one_of(value, _spec_types(wheel)))


def _levels(wheel: Wheel) -> list[str]:
    # Trace came between the builds 9093 and 9294, and so did lists of speculative types.
    last = ["4: trace", "5: debug"] if wheel.has("speculative.types") else ["4: debug"]
    return ["0: output", "1: error", "2: warning", "3: info", *last]


def _put_verbosity(wheel: Wheel, value: str) -> None:
    wheel.set("verbosity", _integer(value))


def _put_verbose(wheel: Wheel, _value: str) -> None:
    wheel.set("verbosity", INT_MAX)


def _spec_types(wheel: Wheel) -> dict[str, object]:
    members = wheel.members("common_speculative_type", "COMMON_SPECULATIVE_TYPE_")
    return {name.replace("_", "-"): member for name, member in members.items()}


def _put_draft_sampling(wheel: Wheel, value: str) -> None:
    chosen = _one_of(value, {"greedy": False, "probabilistic": True})
    wheel.set("speculative.draft.probabilistic", chosen)


def _put_cpu_mask(to: str) -> Put:
    def put(wheel: Wheel, value: str) -> None:
        try:
            bits = int(value, 16)
        except ValueError:
            raise ValueError("expected a hexadecimal mask") from None
        _pin(wheel, to, [place for place in range(bits.bit_length()) if bits >> place & 1])

    return put


def _put_cpu_range(to: str) -> Put:
    def put(wheel: Wheel, value: str) -> None:
        first, dash, last = value.partition("-")
        if not dash or not (first or last):
            raise ValueError("expected LO-HI")
        mask = wheel.listed(f"{to}.cpumask")
        end = _integer(last) if last else len(mask) - 1
        _pin(wheel, to, range(_integer(first) if first else 0, end + 1))

    return put


def _pin(wheel: Wheel, to: str, cpus: Sequence[int]) -> None:
    mask = wheel.listed(f"{to}.cpumask")
    for cpu in cpus:
        if cpu >= len(mask):
            raise ValueError(f"expected processors below {len(mask)}")
        mask[cpu] = True
    wheel.set(f"{to}.cpumask", mask)
    wheel.set(f"{to}.mask_valid", value=True)


def _put_priority(to: str) -> Put:
    def put(wheel: Wheel, value: str) -> None:
        members = wheel.members("ggml_sched_priority", "GGML_SCHED_PRIO_")
        known = {str(int(member)): member for member in members.values()}
        wheel.set(f"{to}.priority", _one_of(value, known))

    return put


# --- the options ---------------------------------------------------------------------------

# Names, the parameter, the kind of value, help. A name may come twice: the wheel decides.

_COMMON = """
-m --model                   model.path                  file    the model, a GGUF file
-mm --mmproj                 mmproj.path                 file    the multimodal projector
--mmproj-auto                no_mmproj                   no      use the multimodal projector
--no-mmproj --no-mmproj-auto  no_mmproj                  yes     use no multimodal projector
--mmproj-offload             mmproj_use_gpu              yes     put the projector on the GPU
--no-mmproj-offload          mmproj_use_gpu              no      keep the projector on the CPU
--lora-init-without-apply    lora_init_without_apply     yes     load adapters, apply none
--check-tensors              check_tensors               yes     look for invalid values
--no-mmap                    use_mmap                    no      do not map the model into memory
--mlock                      use_mlock                   yes     keep the model in memory
-dio --direct-io             use_direct_io               yes     read past the page cache
-ndio --no-direct-io         use_direct_io               no      read through the page cache
-lm --load-mode              load_mode                   load    how the model is read
-lzm --lazy-mode             lazy_mode                   lazy    reading tensors on demand
--offline                    offline                     yes     never reach for the network
-c --ctx-size                n_ctx                       int     context in tokens (0: the model's)
-b --batch-size              n_batch                     int     logical batch in tokens
-ub --ubatch-size            n_ubatch                    int     physical batch in tokens
-n --predict --n-predict     n_predict                   int     tokens to generate (-1: no limit)
--keep                       n_keep                      int     tokens that a context shift keeps
-np --parallel               n_parallel                  int     slots (-1: four, unified cache)
-ctk --cache-type-k          cache_type_k                cache   data type of the cache of K
-ctv --cache-type-v          cache_type_v                cache   data type of the cache of V
-kvo --kv-offload            no_kv_offload               no      keep the cache on the GPU
-nkvo --no-kv-offload        no_kv_offload               yes     keep the cache on the CPU
-kvu --kv-unified            kv_unified                  yes     one cache for all slots
-no-kvu --no-kv-unified      kv_unified                  no      a cache for each slot
--kv-unified-per-slot        kv_unified_per_slot         int     context of each slot in tokens
--swa-full                   swa_full                    yes     full sliding-window cache
-cram --cache-ram            cache_ram_mib               int     MiB of prompts kept (0: none)
--cache-idle-slots           cache_idle_slots            yes     keep the prompts of idle slots
--no-cache-idle-slots        cache_idle_slots            no      drop the prompts of idle slots
-ctxcp --ctx-checkpoints --swa-checkpoints  n_ctx_checkpoints  int  checkpoints kept for a slot
-cpent --checkpoint-every-n-tokens  checkpoint_every_nt  int     tokens between checkpoints
-cms --checkpoint-min-step   checkpoint_min_step         int     least tokens between checkpoints
--context-shift              ctx_shift                   yes     drop old tokens when full
--no-context-shift           ctx_shift                   no      stop when the context is full
--cache-prompt               cache_prompt                yes     reuse what the slot holds
--no-cache-prompt            cache_prompt                no      read every prompt afresh
--cache-reuse                n_cache_reuse               int     least tokens of a reused chunk
-cb --cont-batching          cont_batching               yes     batch requests as they come
-nocb --no-cont-batching     cont_batching               no      finish a batch before the next
--rope-scaling               rope_scaling_type           rope    how RoPE is scaled
--rope-freq-base             rope_freq_base              real    RoPE base frequency
--rope-freq-scale            rope_freq_scale             real    RoPE frequency factor
--yarn-orig-ctx              yarn_orig_ctx               int     YaRN: context in training
--yarn-ext-factor            yarn_ext_factor             real    YaRN: extrapolation
--yarn-attn-factor           yarn_attn_factor            real    YaRN: attention magnitude
--yarn-beta-slow             yarn_beta_slow              real    YaRN: high correction
--yarn-beta-fast             yarn_beta_fast              real    YaRN: low correction
--warmup                     warmup                      yes     run once before being ready
--no-warmup                  warmup                      no      be ready without a run
-ngl --gpu-layers --n-gpu-layers  n_gpu_layers           layers  layers on the GPU
-sm --split-mode             split_mode                  split   how GPUs share the model
-mg --main-gpu               main_gpu                    int     the GPU where one is used
-fit --fit                   fit_params                  onoff   fit what is unset to the memory
-fitc --fit-ctx              fit_params_min_ctx          int     least context that fitting sets
--no-host                    no_host                     yes     bypass the host buffer
--repack                     no_extra_bufts              no      repack weights for the CPU
-nr --no-repack              no_extra_bufts              yes     leave weights as they are
--op-offload                 no_op_offload               no      host tensors are used on the GPU
--no-op-offload              no_op_offload               yes     host tensors are used on the CPU
-t --threads                 cpuparams.n_threads         int     threads (-1: physical cores)
-tb --threads-batch          cpuparams_batch.n_threads   int     prompt threads (-1: as -t)
--cpu-strict                 cpuparams.strict_cpu        bit     pin each thread
--cpu-strict-batch           cpuparams_batch.strict_cpu  bit     pin each prompt thread
--poll                       cpuparams.poll              int     how much threads poll, 0 to 100
--poll-batch                 cpuparams_batch.poll        int     how much prompt threads poll
--threads-http               n_threads_http              int     threads that answer HTTP
--numa                       numa                        numa    placement on NUMA machines
"""

_SAMPLING = """
--samplers                   sampling.samplers           text    samplers in order, parted by a ;
-s --seed                    sampling.seed               seed    seed (-1: random)
--ignore-eos                 sampling.ignore_eos         yes     go on after the end of the text
--temp --temperature         sampling.temp               temp    temperature
--top-k                      sampling.top_k              int     top-k (0: off)
--top-p                      sampling.top_p              real    top-p (1: off)
--min-p                      sampling.min_p              real    min-p (0: off)
--xtc-probability            sampling.xtc_probability    real    XTC: probability (0: off)
--xtc-threshold              sampling.xtc_threshold      real    XTC: threshold
--typical --typical-p        sampling.typ_p              real    locally typical (1: off)
--repeat-penalty             sampling.penalty_repeat     real    repetition (1: off)
--presence-penalty           sampling.penalty_present    real    presence (0: off)
--frequency-penalty          sampling.penalty_freq       real    frequency (0: off)
--dry-multiplier             sampling.dry_multiplier     real    DRY: multiplier (0: off)
--dry-base                   sampling.dry_base           real    DRY: base
--dry-allowed-length         sampling.dry_allowed_length  int    DRY: allowed length
--dry-penalty-last-n         sampling.dry_penalty_last_n  int    DRY: tokens looked back on
--adaptive-target            sampling.adaptive_target    real    adaptive-p: aim (below 0: off)
--adaptive-decay             sampling.adaptive_decay     real    adaptive-p: decay
--dynatemp-range             sampling.dynatemp_range     real    dynamic temperature (0: off)
--dynatemp-exp               sampling.dynatemp_exponent  real    dynamic temperature: exponent
--mirostat                   sampling.mirostat           int     Mirostat version (0: off)
--mirostat-lr                sampling.mirostat_eta       real    Mirostat: learning rate
--mirostat-ent               sampling.mirostat_tau       real    Mirostat: entropy
-bs --backend-sampling       sampling.backend_sampling   yes     sample on the backend
"""

_SERVER = """
--host                       hostname                    text    address to listen on
--port                       port                        int     port (0: any free one)
--reuse-port                 reuse_port                  yes     share the port
--api-prefix                 api_prefix                  text    prefix of all routes
--path                       public_path                 file    folder of static files
--ssl-key-file               ssl_file_key                file    TLS key
--ssl-cert-file              ssl_file_cert               file    TLS certificate
--sse-ping-interval          sse_ping_interval           int     seconds between pings (-1: none)
--metrics                    endpoint_metrics            yes     serve /metrics
--props                      endpoint_props              yes     let POST /props change things
--slots                      endpoint_slots              yes     serve /slots
--no-slots                   endpoint_slots              no      do not serve /slots
-sps --slot-prompt-similarity  slot_prompt_similarity    real    likeness that shares a slot
--sleep-idle-seconds         sleep_idle_seconds          int     idle seconds before unloading
--webui                      webui                       yes     serve the web page
--no-webui                   webui                       no      serve no web page
--ui --webui                 ui                          yes     serve the web page
--no-ui --no-webui           ui                          no      serve no web page
--embedding --embeddings     embedding                   yes     serve embeddings only
--pooling                    pooling_type                pooling  how embeddings are pooled
--image-min-tokens           image_min_tokens            int     least tokens of an image
--image-max-tokens           image_max_tokens            int     most tokens of an image
--mtmd-batch-max-tokens      mtmd_batch_max_tokens       int     most image tokens of a batch
--jinja                      use_jinja                   yes     use the Jinja engine for chats
--no-jinja                   use_jinja                   no      use the built-in templates
--chat-template              chat_template               text    the chat template
--chat-template-file         chat_template               content  file of the chat template
--prefill-assistant          prefill_assistant           yes     go on with the last message
--no-prefill-assistant       prefill_assistant           no      take the last message as whole
--skip-chat-parsing          force_pure_content_parser   yes     leave answers unparsed
--no-skip-chat-parsing       force_pure_content_parser   no      parse answers
--reasoning-format           reasoning_format            reasoning  where thoughts go
--reasoning-budget           reasoning_budget            int     tokens for thought (-1: no limit)
--reasoning-budget           sampling.reasoning_budget_tokens  int  tokens for thought
-sp --special                special                     yes     write special tokens
"""

# Up to April 2026: one set of n-gram sizes for all types. The first wheel of these keeps the
# draft model and the lookup caches in other places than the rest.
_OLD_SPECULATIVE = """
-md --model-draft            speculative.model.path      file    the draft model
-md --model-draft            speculative.mparams_dft.path  file  the draft model
--draft --draft-n --draft-max  speculative.n_max         int     most tokens of a draft
--draft-min --draft-n-min    speculative.n_min           int     least tokens of a draft
--draft-p-min                speculative.p_min           real    least probability of a token
--draft-p-split              speculative.p_split         real    probability that splits
-cd --ctx-size-draft         speculative.n_ctx           int     context of the draft model
-devd --device-draft         speculative.devices         text    devices of the draft model
-ngld --gpu-layers-draft --n-gpu-layers-draft  speculative.n_gpu_layers  layers  as -ngl, draft
-ctkd --cache-type-k-draft   speculative.cache_type_k    cache   as -ctk, draft model
-ctvd --cache-type-v-draft   speculative.cache_type_v    cache   as -ctv, draft model
-td --threads-draft          speculative.cpuparams.n_threads  int  as -t, draft model
-tbd --threads-batch-draft   speculative.cpuparams_batch.n_threads  int  as -tb, draft model
--spec-ngram-size-n          speculative.ngram_size_n    int     tokens that are looked up
--spec-ngram-size-m          speculative.ngram_size_m    int     tokens that are drafted
--spec-ngram-min-hits        speculative.ngram_min_hits  int     least hits of a draft
-lcs --lookup-cache-static   lookup_cache_static         file    lookup cache, read
-lcd --lookup-cache-dynamic  lookup_cache_dynamic        file    lookup cache, read and written
-lcs --lookup-cache-static   speculative.lookup_cache_static  file  lookup cache, read
-lcd --lookup-cache-dynamic  speculative.lookup_cache_dynamic  file  lookup cache, written too
"""

_SPECULATIVE = """
-md --spec-draft-model --model-draft  speculative.draft.mparams.path  file  the draft model
--spec-draft-n-max           speculative.draft.n_max     int     most tokens of a draft
--spec-draft-n-min           speculative.draft.n_min     int     least tokens of a draft
--spec-draft-p-min --draft-p-min  speculative.draft.p_min  real  least probability of a token
--spec-draft-p-split --draft-p-split  speculative.draft.p_split  real  probability that splits
--spec-draft-backend-sampling  speculative.draft.backend_sampling  yes  draft on the backend
--no-spec-draft-backend-sampling  speculative.draft.backend_sampling  no  draft on the CPU
-devd --spec-draft-device --device-draft  speculative.draft.devices  text  devices of the draft
-ngld --spec-draft-ngl --gpu-layers-draft --n-gpu-layers-draft  speculative.draft.n_gpu_layers  \
layers  as -ngl, draft model
-ctkd --spec-draft-type-k --cache-type-k-draft  speculative.draft.cache_type_k  cache  as -ctk
-ctvd --spec-draft-type-v --cache-type-v-draft  speculative.draft.cache_type_v  cache  as -ctv
-td --spec-draft-threads --threads-draft  speculative.draft.cpuparams.n_threads  int  as -t
-tbd --spec-draft-threads-batch --threads-batch-draft  \
speculative.draft.cpuparams_batch.n_threads  int  as -tb, draft model
--spec-synth-len             speculative.synth_len       real    mean of a made-up acceptance
--spec-synth-rates           speculative.synth_rates     reals   made-up acceptance by position
--spec-ngram-mod-n-min       speculative.ngram_mod.n_min  int    least tokens of a draft
--spec-ngram-mod-n-max       speculative.ngram_mod.n_max  int    most tokens of a draft
--spec-ngram-mod-n-match     speculative.ngram_mod.n_match  int  tokens that are looked up
--spec-ngram-simple-size-n   speculative.ngram_simple.size_n  int  tokens that are looked up
--spec-ngram-simple-size-m   speculative.ngram_simple.size_m  int  tokens that are drafted
--spec-ngram-simple-min-hits  speculative.ngram_simple.min_hits  int  least hits of a draft
--spec-ngram-map-k-size-n    speculative.ngram_map_k.size_n  int  tokens that are looked up
--spec-ngram-map-k-size-m    speculative.ngram_map_k.size_m  int  tokens that are drafted
--spec-ngram-map-k-min-hits  speculative.ngram_map_k.min_hits  int  least hits of a draft
--spec-ngram-map-k4v-size-n  speculative.ngram_map_k4v.size_n  int  tokens that are looked up
--spec-ngram-map-k4v-size-m  speculative.ngram_map_k4v.size_m  int  tokens that are drafted
--spec-ngram-map-k4v-min-hits  speculative.ngram_map_k4v.min_hits  int  least hits of a draft
-lcs --lookup-cache-static   speculative.ngram_cache.lookup_cache_static  file  cache read
-lcd --lookup-cache-dynamic  speculative.ngram_cache.lookup_cache_dynamic  file  and written
"""

# Options of llama-server that no wheel so far has parameters for, or that a measured server
# has no use for.
_ELSEWHERE = """
-cl --cache-list --completion-bash --license --verbose-prompt -e --escape --no-escape -dt
--defrag-thold --rpc -dev --device --override-kv --control-vector --control-vector-scaled
--control-vector-layer-range -mu --model-url -dr --docker-repo -hf -hfr --hf-repo -hff --hf-file
-hft --hf-token -hfd -hfrd --hf-repo-draft --spec-draft-hf -hfv -hfrv --hf-repo-v -hffv --hf-file-v
--log-disable --log-file --log-jsonl --no-log-jsonl --log-colors --log-prefix --no-log-prefix
--log-timestamps --no-log-timestamps --log-prompts-dir --sampler-seq --sampling-seq --top-nsigma
--top-n-sigma --dry-sequence-breaker -l --logit-bias --grammar --grammar-file -j --json-schema -jf
--json-schema-file -r --reverse-prompt --spm-infill -mmu --mmproj-url -mmdev
--mmproj-device --video-fps --video-timestamp-interval --video-ffmpeg-dir
--embd-normalize --cors-origins --cors-methods --cors-headers --cors-credentials
--no-cors-credentials --ui-config --webui-config --ui-config-file --webui-config-file
--ui-mcp-proxy --no-ui-mcp-proxy --webui-mcp-proxy --no-webui-mcp-proxy --tools --tools-runtime
--mcp-servers-config --mcp-servers-json -ag --agent -no-ag --no-agent --media-path --models-dir
--models-preset --models-max --models-autoload --no-models-autoload --reasoning-effort
--reasoning-budget-message --reasoning-preserve --no-reasoning-preserve -otd
--override-tensor-draft --spec-draft-override-tensor -cmoed --cpu-moe-draft --spec-draft-cpu-moe
-ncmoed --n-cpu-moe-draft --spec-draft-n-cpu-moe --spec-draft-ncmoe -Cd --cpu-mask-draft
--spec-draft-cpu-mask -Crd --cpu-range-draft --spec-draft-cpu-range --cpu-strict-draft
--spec-draft-cpu-strict --prio-draft --spec-draft-prio --poll-draft --spec-draft-poll -Cbd
--cpu-mask-batch-draft --spec-draft-cpu-mask-batch --cpu-strict-batch-draft
--spec-draft-cpu-strict-batch --prio-batch-draft --spec-draft-prio-batch --poll-batch-draft
--spec-draft-poll-batch --spec-replace --spec-default -mv --model-vocoder --tts-use-guide-tokens
--embd-gemma-default --fim-qwen-1.5b-default --fim-qwen-3b-default --fim-qwen-7b-default
--fim-qwen-7b-spec --fim-qwen-14b-spec --fim-qwen-30b-default --gpt-oss-20b-default
--gpt-oss-120b-default --vision-gemma-4b-default --vision-gemma-12b-default
"""


def _special_options() -> list[Option]:
    """Return the options that are more than one assignment."""
    # A wheel without load_mode does not end its list of placements, and the server aborts on it.
    placed = ("tensor_buft_overrides", "load_mode")
    perf = ("no_perf", "sampling.no_perf")
    spec = ("--spec-type",)
    return [
        _opt("-a --alias", "model_alias", _put_alias, "names in the API", "NAME,..."),
        _opt("--tags", "model_tags", _put_tags, "tags in the API", "TAG,..."),
        _opt("--lora", "lora_adapters", _put_lora, "LoRA adapters", "FILE,..."),
        _opt(
            "--lora-scaled",
            "lora_adapters",
            _put_lora_scaled,
            "the same with their scale",
            "FILE:SCALE,...",
        ),
        Option(("--mmap",), ("use_mmap", "use_direct_io"), _put_mmap, "map the model into memory"),
        _opt("-fa --flash-attn", "flash_attn_type", _put_flash, "flash attention", "on|off|auto"),
        _opt("--rope-scale", "rope_freq_scale", _put_rope_scale, "RoPE context factor", "N"),
        Option(("--perf",), perf, _put_perf(state=True), "keep the library's own timings"),
        Option(("--no-perf",), perf, _put_perf(state=False), "do not keep them"),
        _opt(
            "-ts --tensor-split",
            "tensor_split",
            _put_tensor_split,
            "share of each GPU",
            "N0,N1,...",
        ),
        _opt(
            "-fitt --fit-target",
            "fit_params_target",
            _put_fit_target,
            "MiB that fitting leaves on each device",
            "N0,N1,...",
        ),
        Option(
            ("-ot", "--override-tensor"),
            placed,
            _put_override,
            "which tensors go where",
            "REGEX=BUFFER,...",
        ),
        Option(("-cmoe", "--cpu-moe"), placed, _put_cpu_moe, "all experts on the CPU"),
        Option(
            ("-ncmoe", "--n-cpu-moe"),
            placed,
            _on_cpu(_EXPERTS),
            "experts of the first N layers on the CPU",
            "N",
        ),
        Option(
            ("-ncffn", "--n-cpu-ffn"),
            placed,
            _on_cpu(_DENSE_FFN),
            "dense FFN of the first N layers on the CPU",
            "N",
        ),
        _opt(
            "-C --cpu-mask",
            "cpuparams.cpumask",
            _put_cpu_mask("cpuparams"),
            "CPUs of threads",
            "HEX",
        ),
        _opt(
            "-Cr --cpu-range",
            "cpuparams.cpumask",
            _put_cpu_range("cpuparams"),
            "CPUs of threads",
            "LO-HI",
        ),
        _opt(
            "--prio",
            "cpuparams.priority",
            _put_priority("cpuparams"),
            "priority of threads, -1 to 3",
            "N",
        ),
        *(
            _opt(
                names,
                "cpuparams_batch.cpumask",
                put("cpuparams_batch"),
                "the same for prompts",
                metavar,
            )
            for names, put, metavar in (
                ("-Cb --cpu-mask-batch", _put_cpu_mask, "HEX"),
                ("-Crb --cpu-range-batch", _put_cpu_range, "LO-HI"),
                ("--prio-batch", _put_priority, "N"),
            )
        ),
        _opt(
            "--repeat-last-n",
            "sampling.penalty_last_n",
            _put_repeat_last_n,
            "tokens that penalties look at",
            "N",
        ),
        _opt("--host", "hostnames", _put_host, "addresses to listen on", "ADDRESS,..."),
        _opt("--api-key", "api_keys", _put_api_key, "keys that requests must show", "KEY,..."),
        _opt("--api-key-file", "api_keys", _put_api_key_file, "file of keys, one a line", "FILE"),
        Option(
            ("-to", "--timeout"),
            ("timeout_read", "timeout_write"),
            _put_timeout,
            "seconds to wait for a client",
            "N",
        ),
        _opt(
            "--slot-save-path",
            "slot_save_path",
            _put_slot_folder,
            "folder that slots are saved in",
            "DIR",
        ),
        Option(
            ("--rerank", "--reranking"),
            ("pooling_type", "embedding"),
            _put_rerank,
            "serve reranking",
        ),
        _opt(
            "-rea --reasoning",
            "enable_reasoning",
            _put_reasoning,
            "let the model think",
            "on|off|auto",
        ),
        _opt(
            "--chat-template-kwargs",
            "default_template_kwargs",
            _put_arguments,
            "arguments of the chat template",
            "JSON",
        ),
        Option(spec, ("speculative.type",), _put_spec_type, "how to draft", "NAME", _spec_types),
        Option(
            spec, ("speculative.types",), _put_spec_types, "how to draft", "NAME,...", _spec_types
        ),
        _opt(
            "--spec-draft-sampling",
            "speculative.draft.probabilistic",
            _put_draft_sampling,
            "how drafts are sampled",
            "greedy|probabilistic",
        ),
        Option(
            ("-lv", "--verbosity", "--log-verbosity"),
            ("verbosity",),
            _put_verbosity,
            "what is logged",
            "N",
            _levels,
        ),
        _opt("-v --verbose --log-verbose", "verbosity", _put_verbose, "log everything", ""),
    ]


def _opt(names: str, need: str, put: Put, text: str, metavar: str) -> Option:
    return Option(tuple(names.split()), (need,), put, text, metavar)


def all_options() -> list[Option]:
    """Return every option of every generation; the first of a name that the wheel has counts."""
    tables = (_COMMON, _SAMPLING, _SERVER, _OLD_SPECULATIVE, _SPECULATIVE)
    rows = [_row(line) for table in tables for line in table.strip().splitlines()]
    return rows + _special_options()


def supported(wheel: Wheel) -> dict[str, Option]:
    """Return the options that ``wheel`` can carry out, by each of their names."""
    found: dict[str, Option] = {}
    for option in all_options():
        if all(wheel.has(path) for path in option.needs):
            for name in option.names:
                found.setdefault(name, option)
    return found


# --- carrying the options out -------------------------------------------------------------


def apply(wheel: Wheel, arguments: Sequence[str]) -> None:
    """Set the wheel's parameters from ``llama-server`` options.

    Args:
        wheel: The wheel; its parameters are changed in place.
        arguments: The command line, as ``--name value``, ``--name=value`` or ``-n value``.

    Raises:
        OptionError: For an option that is unknown or that the wheel cannot express, a value that
            is missing or wrong, or no model.
    """
    wheel.set("port", DEFAULT_PORT)
    wheel.set("n_parallel", AUTO_SLOTS)
    options = supported(wheel)
    rest = list(arguments)
    while rest:
        name, equals, value = _split(rest.pop(0))
        option = options.get(name)
        if option is None:
            raise OptionError(_unknown(name, wheel))
        if not option.metavar and equals:
            raise OptionError(f"error: {name} takes no value")
        if option.metavar and not equals:
            # A negative number is a value, another option is not.
            if not rest or _split(rest[0])[0] in options:
                raise OptionError(f"error: {name} needs a value: {name} {option.metavar}")
            value = rest.pop(0)
        try:
            option.put(wheel, value)
        except (ValueError, TypeError, OverflowError) as error:
            shown = "the value" if "api-key" in name else f"{value!r}"
            raise OptionError(f"error: {name} does not take {shown}: {error}") from None
    if not wheel.get("model.path"):
        raise OptionError("error: --model is missing: this server holds one model, named at start")
    _place_tensors(wheel)
    _settle_threads(wheel)


def _split(argument: str) -> tuple[str, str, str]:
    name, equals, value = (
        argument.partition("=") if argument.startswith("--") else (argument, "", "")
    )
    return (name.replace("_", "-") if name.startswith("--") else name), equals, value


def _unknown(name: str, wheel: Wheel) -> str:
    exists = name in _ELSEWHERE.split() or any(name in option.names for option in all_options())
    why = (
        f"llama-server has {name} in some of its builds, but it cannot be expressed with the wheel"
        f" xllamacpp {wheel.version}"
        if exists
        else f"{name} is no option of llama-server that this program knows"
    )
    return f"error: invalid argument: {name}\n{why}"


def _place_tensors(wheel: Wheel) -> None:
    if not wheel.overrides:
        return
    try:
        wheel.set("tensor_buft_overrides", ",".join(wheel.overrides))
    except (ValueError, RuntimeError) as error:
        shown = ",".join(wheel.overrides)
        raise OptionError(f"error: the tensors cannot be placed: {error} in {shown}") from None


def _settle_threads(wheel: Wheel) -> None:
    """Resolve thread counts that were left open, as ``llama-server`` does after its options.

    The library does not: the wheels up to 0.2.13 then ask for -1 threads.
    """
    if _threads(wheel, "cpuparams") < 0:
        wheel.set("cpuparams.n_threads", physical_cores())
    elif _threads(wheel, "cpuparams") == 0:
        wheel.set("cpuparams.n_threads", os.cpu_count() or 1)
    heirs = [("cpuparams_batch", "cpuparams")]
    for draft in ("speculative", "speculative.draft"):
        heirs.append((f"{draft}.cpuparams", "cpuparams"))
        heirs.append((f"{draft}.cpuparams_batch", "cpuparams_batch"))
    for heir, source in heirs:
        if wheel.has(heir) and _threads(wheel, heir) < 0:
            wheel.set(heir, wheel.get(source))


def _threads(wheel: Wheel, path: str) -> int:
    count: Any = wheel.get(f"{path}.n_threads")
    return int(count)


def physical_cores(folder: Path = Path("/sys/devices/system/cpu")) -> int:
    """Return the number of physical cores, as ``llama-server`` counts them on Linux.

    Args:
        folder: Where the kernel describes its processors.
    """
    siblings = set()
    for path in folder.glob("cpu[0-9]*/topology/thread_siblings"):
        try:
            siblings.add(path.read_text(encoding="ascii").strip())
        except OSError:
            continue
    if siblings:
        return len(siblings)
    logical = os.cpu_count() or 4
    few = 4
    return logical if logical <= few else logical // 2


# --- what is printed ----------------------------------------------------------------------


def version_text(module: ModuleType) -> str:
    """Return what ``--version`` prints: build number and commit, then the wheel.

    Wheels up to 0.2.13 know their build; later ones do not, but carry its number in their own
    version: 2026.10.11549 is build 11549.
    """
    wheel = str(getattr(module, "__version__", "unknown"))
    info = getattr(module, "BUILD_INFO", {})
    number, commit = int(info.get("build_number") or 0), str(info.get("commit") or "unknown")
    dated = re.match(r"20\d\d\.\d{1,2}\.(\d+)", wheel)
    if not number and dated:
        number = int(dated[1])
    return f"version: {number} ({commit})\nwheel: xllamacpp {wheel}\n"


def help_text(wheel: Wheel) -> str:
    """Return what ``--help`` prints: every option that this wheel can carry out.

    The shape is that of ``llama-server``: names, then what a value is called, then the text in
    column 40 or, where the names reach it, on a line of its own. Flags that switch the same
    thing on and off share an entry, those that switch it on first.
    """
    entries: dict[str, list[Option]] = {}
    names: dict[Option, list[str]] = {}
    for name, option in supported(wheel).items():
        if option not in names:
            entries.setdefault(name if option.metavar else option.needs[0], []).append(option)
        names.setdefault(option, []).append(name)
    rows = [
        ("-h, --help, --usage", "print this and exit"),
        ("--version", "print the build's number and commit, and the wheel's version"),
        ("--list-devices", "print the GPUs that the wheel sees"),
        ("--llmperf-wheel DIR", "folder that the wheel was installed into; must come first"),
    ]
    for options in entries.values():
        ordered = sorted(options, key=lambda option: "--no-" in "".join(option.names))
        spelt = ", ".join(name for option in ordered for name in names[option])
        values = ", ".join(ordered[0].choices(wheel)) if ordered[0].choices else ""
        text = "; or ".join(option.text for option in ordered) + (values and f" ({values})")
        rows.append((f"{spelt} {ordered[0].metavar}".rstrip(), text))
    # Two spaces part the names from the text, as one parts them from the value's name.
    gap = "\n" + " " * _HELP_COLUMN
    lines = [
        left.ljust(_HELP_COLUMN) + right if len(left) < _HELP_COLUMN - 1 else left + gap + right
        for left, right in rows
    ]
    return "\n".join(["----- llama-server options of this wheel -----", "", *lines, ""])


def devices_text(module: ModuleType) -> str:
    """Return what ``--list-devices`` prints: the GPUs that the wheel sees, memory in MiB."""
    lines = ["Available devices:"]
    for device in module.get_device_info():
        if "GPU" in str(getattr(device["type"], "name", device["type"])):
            total, free = device["memory_total"] // MIB, device["memory_free"] // MIB
            lines.append(
                f"  {device['name']}: {device['description']} ({total} MiB, {free} MiB free)"
            )
    return "\n".join(lines if len(lines) > 1 else [*lines, "  (none)"]) + "\n"


# --- the process --------------------------------------------------------------------------


def load_wheel(folder: str | None) -> ModuleType:
    """Import ``xllamacpp``, from ``folder`` if one is given.

    Raises:
        OptionError: When there is none, or none that this interpreter can load.
    """
    place = f"with {sys.executable}"
    if folder is not None:
        place = f"from {folder}"
        sys.path.insert(0, folder)
        if not Path(folder, "xllamacpp").is_dir():
            # Another one further down the path would be measured in its place.
            raise OptionError(f"error: no xllamacpp can be imported {place}: there is none")
    try:
        return importlib.import_module("xllamacpp")
    except ImportError as error:
        raise OptionError(f"error: no xllamacpp can be imported {place}: {error}") from None


_STOP = (signal.SIGTERM, signal.SIGINT)
# How long the last lines of the log are waited for, and how long it is quiet when they are there.
_LOG_S, _LOG_LOOK_S = 2.0, 0.15

_SIGNAL_SET = 128
"""Bytes of a set of signals on Linux, more than elsewhere; zeros are the empty one."""

_running: list[object] = []
"""The server, held to the end of the process: see :func:`serve`."""


def serve(wheel: Wheel) -> int:
    """Start the server, wait for SIGTERM or SIGINT, and return the exit status.

    The server is never destroyed, the process just ends: its destructor waits for the answers
    under way, and for ever if it runs before the server's own loop does.
    """
    woken = _watch_signals()
    try:
        server = wheel.module.Server(wheel.params)
        _running.append(server)
    except (RuntimeError, ValueError) as error:
        _let_log_end()
        _say(f"main: error: the server did not start, the log above says why: {error}\n")
        return 1
    for number in _STOP:
        signal.signal(number, lambda _number, _frame: None)
    # The library says so too, but not at every verbosity.
    _say(f"main: server is listening on {server.listening_address}\n")
    os.read(woken, 1)
    _say("main: told to stop, exiting\n")
    return 0


def _let_log_end() -> None:
    """Wait until nothing more is logged: the library writes from a thread that no end waits for.

    Its last lines are those that say why it failed.
    """
    deadline, seen = time.monotonic() + _LOG_S, -1
    while (size := os.fstat(sys.stderr.fileno()).st_size) != seen and time.monotonic() < deadline:
        seen = size
        time.sleep(_LOG_LOOK_S)


def _watch_signals() -> int:
    """Return a file descriptor that can be read once a signal to stop has been handled.

    While the server loads no Python code can run, as the wheel holds the interpreter lock. So
    the signals keep their default action, which ends the process. Older wheels then
    install handlers of their own, and a signal that reaches one before the server's loop runs
    is lost on the server. It is not lost here: all threads block the signals, and one lets them
    in while it waits for nothing else, so whichever handler it runs, the library's or ours, its
    waiting ends. A signal that comes before it waits is kept until it does.
    """
    for number in _STOP:
        signal.signal(number, signal.SIG_DFL)
    # Threads inherit it. Letting in and waiting is one step, or a signal might come in between.
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOP)
    woken, waker = os.pipe()
    suspend = ctypes.CDLL(None).sigsuspend
    let_in = ctypes.create_string_buffer(_SIGNAL_SET)
    ready = threading.Event()

    def watch() -> None:
        ready.set()
        suspend(let_in)
        os.write(waker, b".")

    # Long enough that the thread starts to wait before another one gets the lock.
    sys.setswitchinterval(10.0)
    threading.Thread(target=watch, daemon=True).start()
    ready.wait()
    return woken


def _say(text: str) -> None:
    # One write, so that the library's threads cannot write into the line.
    os.write(2, text.encode())


def main(arguments: Sequence[str]) -> int:
    """Run the program; see the module's text.

    Args:
        arguments: The command line without the program's name.

    Returns:
        The exit status.
    """
    try:
        return _run(*_wheel_folder(list(arguments)))
    except OptionError as error:
        sys.stderr.write(f"{error}\n")
        return 1


def _wheel_folder(arguments: list[str]) -> tuple[str | None, list[str]]:
    """Part ``--llmperf-wheel DIR``, which comes first, from the rest of the command line."""
    if not arguments or _split(arguments[0])[0] != "--llmperf-wheel":
        return None, arguments
    _, equals, folder = _split(arguments[0])
    if equals:
        return folder, arguments[1:]
    if len(arguments) == 1:
        raise OptionError("error: --llmperf-wheel needs a value: --llmperf-wheel DIR")
    return arguments[1], arguments[2:]


def _run(folder: str | None, arguments: list[str]) -> int:
    module = load_wheel(folder)
    if "--version" in arguments:
        sys.stderr.write(version_text(module))
    elif {"-h", "--help", "--usage"} & set(arguments):
        sys.stdout.write(help_text(Wheel(module)))
    elif "--list-devices" in arguments:
        sys.stdout.write(devices_text(module))
    else:
        wheel = Wheel(module)
        apply(wheel, arguments)
        return serve(wheel)
    return 0


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Past the wheel's destructors: its threads are still running.
    os._exit(status)
