"""The program that hosts an xllamacpp wheel: options, help and what it prints."""

from __future__ import annotations

import enum
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_llmperf.build import embedded_server
from pytest_llmperf.build.embedded_server import OptionError, Wheel, apply, help_text, supported
from pytest_llmperf.plan.options import OptionNames, parse_help

MODEL = ("--model", "model.gguf")


class CacheType(enum.IntEnum):
    """Some of the types of tensors, under the names that wheels give them."""

    GGML_TYPE_F16 = 1
    GGML_TYPE_Q8_0 = 8
    GGML_TYPE_I8 = 24
    GGML_TYPE_COUNT = 40


class SpeculativeType(enum.IntEnum):
    """Types of drafting in the wheels up to April 2026."""

    COMMON_SPECULATIVE_TYPE_NONE = 0
    COMMON_SPECULATIVE_TYPE_NGRAM_MAP_K4V = 5


class SamplingFlag(enum.IntEnum):
    """Defaults that the user chose."""

    COMMON_PARAMS_SAMPLING_CONFIG_TOP_K = 2
    COMMON_PARAMS_SAMPLING_CONFIG_TEMP = 64


def _threads() -> SimpleNamespace:
    return SimpleNamespace(n_threads=-1, cpumask=[False] * 512, mask_valid=False, poll=50)


def _old_params() -> SimpleNamespace:
    speculative = SimpleNamespace(
        type=SpeculativeType(0),
        n_max=16,
        n_min=0,
        ngram_size_n=12,
        mparams_dft=SimpleNamespace(path=""),
        cpuparams=_threads(),
        cpuparams_batch=_threads(),
    )
    return SimpleNamespace(
        model=SimpleNamespace(path=""),
        model_alias="",
        api_keys=[],
        port=0,
        hostname="127.0.0.1",
        n_parallel=1,
        n_ctx=0,
        verbosity=3,
        cache_type_k=CacheType.GGML_TYPE_F16,
        use_mmap=True,
        use_mlock=False,
        use_direct_io=True,
        webui=True,
        warmup=True,
        embedding=False,
        fit_params_target=[1024 * 1024 * 1024] * 16,
        tensor_split=[0.0] * 128,
        tensor_buft_overrides="",
        cpuparams=_threads(),
        cpuparams_batch=_threads(),
        sampling=SimpleNamespace(temp=0.8, top_p=0.95, seed=0, user_sampling_config=2),
        speculative=speculative,
    )


def _module(**changes: object) -> ModuleType:
    """Return a module of the shape of the wheel 0.2.12, as far as it matters here."""
    module = ModuleType("xllamacpp")
    parts: dict[str, object] = {
        "__version__": "0.2.12",
        "BUILD_INFO": {"build_number": 8156, "commit": "3769fe6eb"},
        "CommonParams": _old_params,
        "ggml_type": CacheType,
        "common_speculative_type": SpeculativeType,
        "common_params_sampling_config": SamplingFlag,
    }
    for name, value in {**parts, **changes}.items():
        setattr(module, name, value)
    return module


@pytest.fixture
def old() -> Wheel:
    """Return a wheel of early 2026."""
    return Wheel(_module())


@pytest.fixture
def new() -> Wheel:
    """Return the installed wheel."""
    return Wheel(pytest.importorskip("xllamacpp"))


def _entries(wheel: Wheel) -> dict[str, OptionNames]:
    return {name: entry for entry in parse_help(help_text(wheel)) for name in entry.names}


def test_importing_it_does_not_import_the_wheel() -> None:
    """The module can be imported where no wheel is installed."""
    code = f"import sys, runpy; runpy.run_path({embedded_server.__file__!r}, run_name='x'); "
    code += "raise SystemExit('xllamacpp' in sys.modules or 'pytest_llmperf' in sys.modules)"
    assert subprocess.run([sys.executable, "-I", "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "path", "expected"),
    [
        (["-c", "4096"], "n_ctx", 4096),
        (["--ctx-size=4096"], "n_ctx", 4096),
        (["--ctx_size", "4096"], "n_ctx", 4096),
        (["-c", "1", "-c", "2"], "n_ctx", 2),
        (["-np", "-1"], "n_parallel", -1),
        (["--parallel", "2"], "n_parallel", 2),
        (["--port", "0"], "port", 0),
        (["--host", "0.0.0.0"], "hostname", "0.0.0.0"),  # noqa: S104 - parsed, not listened on
        (["-ctk", "q8_0"], "cache_type_k", CacheType.GGML_TYPE_Q8_0),
        (["--no-mmap"], "use_mmap", False),
        (["--mmap"], "use_direct_io", False),
        (["--mlock"], "use_mlock", True),
        (["--no-warmup"], "warmup", False),
        (["--no-webui"], "webui", False),
        (["-a", "one,two"], "model_alias", "one,two"),
        (["-v"], "verbosity", 2**31 - 1),
        (["-lv", "4"], "verbosity", 4),
        (["--seed", "-1"], "sampling.seed", 2**32 - 1),
        (["--temp", "-3"], "sampling.temp", 0.0),
        (["--draft-max", "7"], "speculative.n_max", 7),
        (["--draft-min", "3"], "speculative.n_min", 3),
        (["-md", "draft.gguf"], "speculative.mparams_dft.path", "draft.gguf"),
        (["--spec-ngram-size-n", "9"], "speculative.ngram_size_n", 9),
        (["--spec-type", "ngram-map-k4v"], "speculative.type", SpeculativeType(5)),
        (["--api-key", "a,b", "--api-key", "c"], "api_keys", ["a", "b", "c"]),
    ],
)
def test_an_option_sets_its_parameter(
    old: Wheel, arguments: list[str], path: str, expected: object
) -> None:
    """Short and long names, ``--name=value`` and underscores all reach the parameter."""
    apply(old, [*MODEL, *arguments])
    assert expected == old.get(path)


def test_defaults_are_those_of_llama_server(old: Wheel) -> None:
    """Without options the port is 8080 and the server chooses the number of slots."""
    apply(old, MODEL)
    assert (old.get("port"), old.get("n_parallel")) == (8080, -1)


def test_open_thread_counts_are_settled(old: Wheel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads left at -1 become physical cores, and the others follow those they are named by."""
    monkeypatch.setattr(embedded_server, "physical_cores", lambda: 6)
    apply(old, [*MODEL, "-tb", "3", "--poll", "7"])
    counts = [
        old.get(f"{room}.n_threads")
        for room in (
            "cpuparams",
            "cpuparams_batch",
            "speculative.cpuparams",
            "speculative.cpuparams_batch",
        )
    ]
    assert counts == [6, 3, 6, 3]
    assert old.get("speculative.cpuparams.poll") == 7


@given(st.lists(st.integers(0, 1 << 20), min_size=2, max_size=16))
def test_fit_target_is_mib_for_each_device(margins: list[int]) -> None:
    """Several margins go to the first devices, in bytes; the others keep theirs."""
    wheel = Wheel(_module())
    apply(wheel, [*MODEL, "-fitt", ",".join(map(str, margins))])
    rest = [1024 * 1024 * 1024] * (16 - len(margins))
    assert [margin * 1024 * 1024 for margin in margins] + rest == wheel.get("fit_params_target")


def test_one_fit_target_is_for_all_devices(old: Wheel) -> None:
    """A single margin holds for every device."""
    apply(old, [*MODEL, "--fit-target", "512"])
    assert old.get("fit_params_target") == [512 * 1024 * 1024] * 16


@given(st.integers(1, 2**512 - 1))
def test_a_cpu_mask_pins_the_processors_of_its_bits(mask: int) -> None:
    """Bit N of the mask stands for processor N."""
    wheel = Wheel(_module())
    apply(wheel, [*MODEL, "--cpu-mask", hex(mask)])
    pinned = wheel.listed("cpuparams.cpumask")
    assert mask == sum(1 << place for place, chosen in enumerate(pinned) if chosen)
    assert wheel.get("cpuparams.mask_valid") is True


def test_a_cpu_range_adds_to_the_mask(old: Wheel) -> None:
    """A range is inclusive and complements the mask."""
    apply(old, [*MODEL, "-C", "1", "-Cr", "4-5"])
    pinned = old.listed("cpuparams.cpumask")
    assert [place for place, chosen in enumerate(pinned) if chosen] == [0, 4, 5]


def test_a_sampling_default_is_marked_as_chosen(old: Wheel) -> None:
    """What the user chose is marked, beside what was marked before; the rest is not."""
    apply(old, [*MODEL, "--temp", "0", "--top-p", "0.5"])
    assert old.get("sampling.user_sampling_config") == 64 | 2


def test_keys_are_read_from_a_file(old: Wheel, tmp_path: Path) -> None:
    """Each line of the file is a key, save comments and empty lines."""
    file = tmp_path / "keys"
    file.write_text("# mine\none\n\ntwo\n", encoding="utf-8")
    apply(old, [*MODEL, "--api-key-file", str(file)])
    assert old.get("api_keys") == ["one", "two"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--foo"], "error: invalid argument: --foo\n--foo is no option of llama-server"),
        (["--foo=1"], "error: invalid argument: --foo\n"),
        (["--device", "x"], "error: invalid argument: --device\nllama-server has --device in some"),
        (["--load-mode", "none"], "error: invalid argument: --load-mode\nllama-server has "),
        (["--spec-draft-n-max", "3"], "error: invalid argument: --spec-draft-n-max\nllama-server"),
        (["stray"], "error: invalid argument: stray\n"),
        (["-c"], "error: -c needs a value: -c N"),
        (["-c", "--port", "0"], "error: -c needs a value: -c N"),
        (["-c", "many"], "error: -c does not take 'many': expected an integer"),
        (["--mlock=1"], "error: --mlock takes no value"),
        (["-ctk", "turbo9"], "error: -ctk does not take 'turbo9': expected one of f16, q8_0"),
        (["-ctk", "i8"], "error: -ctk does not take 'i8': expected one of f16, q8_0"),
        (["-fitt", ",".join(["1"] * 17)], "error: -fitt does not take"),
        (["--cpu-range", "x"], "error: --cpu-range does not take 'x': expected LO-HI"),
        (["--api-key-file", "/no/such"], "error: --api-key-file does not take the value: cannot"),
    ],
)
def test_what_cannot_be_carried_out_is_named(
    old: Wheel, arguments: list[str], message: str
) -> None:
    """An option or value that cannot be taken is refused in words that name it."""
    with pytest.raises(OptionError) as caught:
        apply(old, [*MODEL, *arguments])
    assert str(caught.value).startswith(message)


def test_a_model_is_needed(old: Wheel) -> None:
    """There is no router: the model must be named."""
    with pytest.raises(OptionError, match="--model is missing"):
        apply(old, ["--port", "0"])


def test_placing_tensors_needs_a_wheel_that_ends_the_list(old: Wheel) -> None:
    """Wheels without load_mode abort on placed tensors, so the options are refused there."""
    with pytest.raises(OptionError, match="invalid argument: --cpu-moe"):
        apply(old, [*MODEL, "--cpu-moe"])
    assert "--override-tensor" not in _entries(old)


def test_placements_add_up() -> None:
    """Every option that places tensors adds to one list."""
    params = _old_params()
    params.load_mode = 0
    wheel = Wheel(_module(CommonParams=lambda: params))
    apply(wheel, [*MODEL, "-ot", "a=CPU,b=CPU", "-ncmoe", "2"])
    experts = r"\.ffn_(up|down|gate|gate_up)_(ch|)exps=CPU"
    assert rf"a=CPU,b=CPU,blk\.0{experts},blk\.1{experts}" == wheel.get("tensor_buft_overrides")


@pytest.mark.parametrize(
    ("arguments", "path", "expected"),
    [
        (["-fa", "on"], "flash_attn_type", 1),
        (["-fa", "auto"], "flash_attn_type", -1),
        (["-lm", "mmap+mlock"], "load_mode", 3),
        (["-sm", "tensor"], "split_mode", 3),
        (["-ngl", "all"], "n_gpu_layers", -2),
        (["-ngl", "auto"], "n_gpu_layers", -1),
        (["--no-kv-offload"], "no_kv_offload", True),
        (["--no-repack"], "no_extra_bufts", True),
        (["--host", "127.0.0.1,::1"], "hostnames", ["127.0.0.1", "::1"]),
        (["-a", "one,two"], "model_alias", {"one", "two"}),
        (["--spec-draft-n-max", "5"], "speculative.draft.n_max", 5),
        (["--spec-ngram-map-k-size-n", "4"], "speculative.ngram_map_k.size_n", 4),
        (["--spec-ngram-mod-n-match", "8"], "speculative.ngram_mod.n_match", 8),
        (["-md", "draft.gguf"], "speculative.draft.mparams.path", "draft.gguf"),
        (["--reasoning-format", "deepseek-legacy"], "reasoning_format", 2),
        (["--reasoning-budget", "0"], "sampling.reasoning_budget_tokens", 0),
        (["--rope-scale", "4"], "rope_freq_scale", 0.25),
        (["-ot", r"blk\.0\.=CPU"], "tensor_buft_overrides", r"blk\.0\.=CPU"),
        (["--cache-ram", "0"], "cache_ram_mib", 0),
        (["--reasoning", "off"], "default_template_kwargs", {"enable_thinking": "false"}),
        (["--timeout", "5"], "timeout_read", 5),
    ],
)
def test_the_installed_wheel_takes_the_value(
    new: Wheel, arguments: list[str], path: str, expected: object
) -> None:
    """Each kind of value ends up in the real parameters."""
    apply(new, [*MODEL, *arguments])
    assert expected == new.get(path)


def test_several_types_of_drafting(new: Wheel) -> None:
    """The newer wheels take a list of types."""
    apply(new, [*MODEL, "--spec-type", "ngram-mod,ngram-map-k4v"])
    names = [member.name for member in new.listed("speculative.types")]
    prefix = "COMMON_SPECULATIVE_TYPE_"
    assert [f"{prefix}NGRAM_MOD", f"{prefix}NGRAM_MAP_K4V"] == names


def test_an_unknown_buffer_is_named(new: Wheel) -> None:
    """A placement on a device that the wheel does not have is refused."""
    with pytest.raises(OptionError, match="unknown buffer type in a=NOWHERE"):
        apply(new, [*MODEL, "-ot", "a=NOWHERE"])


def test_a_value_out_of_range_is_refused(new: Wheel) -> None:
    """A number that the library cannot hold is an error of the option, not a traceback."""
    with pytest.raises(OptionError, match="-c does not take"):
        apply(new, [*MODEL, "-c", str(2**40)])


def test_the_help_reads_back_as_the_options(new: Wheel) -> None:
    """The package's own reader of help texts finds every option, with or without a value."""
    entries = _entries(new)
    options = supported(new)
    assert set(options) <= set(entries)
    wrong = {n for n, o in options.items() if bool(o.metavar) != entries[n].takes_value}
    assert wrong == set()


def test_the_help_tells_how_to_switch_a_thing_off(new: Wheel) -> None:
    """Flags that turn one thing on and off share an entry."""
    entries = _entries(new)
    assert entries["--warmup"].negatives == ("--no-warmup",)
    assert entries["--kv-offload"].long == "kv-offload"
    assert entries["--rerank"].names == ("--rerank", "--reranking")


def test_the_help_lists_only_what_the_wheel_has(old: Wheel, new: Wheel) -> None:
    """Each generation lists its own names."""
    before, after = _entries(old), _entries(new)
    assert {"--draft-max", "--mmap", "--no-mmap"} <= set(before)
    assert {"--spec-draft-n-max", "--load-mode"} <= set(after)
    assert {"--draft-max", "--mmap", "--device"} & set(after) == set()
    assert {"--spec-draft-n-max", "--load-mode", "--device"} & set(before) == set()


def test_the_help_tells_what_level_four_is(old: Wheel, new: Wheel) -> None:
    """Level 4 is debugging in old wheels and trace in new ones."""
    assert "4: debug" in _entries(old)["--verbosity"].about
    assert "4: trace" in _entries(new)["--verbosity"].about


@pytest.mark.parametrize(
    ("wheel", "info", "expected"),
    [
        ("0.2.12", {"build_number": 8156, "commit": "3769fe6eb"}, "8156 (3769fe6eb)"),
        ("2026.10.11549", {"build_number": 0, "commit": "unknown"}, "11549 (unknown)"),
        ("2026.4.8672.1", {"build_number": 0, "commit": "unknown"}, "8672 (unknown)"),
        ("0.2.14", {"build_number": 0, "commit": "unknown"}, "0 (unknown)"),
        ("0.2.14", {}, "0 (unknown)"),
    ],
)
def test_the_version_names_the_build(wheel: str, info: dict[str, object], expected: str) -> None:
    """The number comes from the wheel's build, or else from the wheel's own version."""
    module = _module(__version__=wheel, BUILD_INFO=info)
    expected = f"version: {expected}\nwheel: xllamacpp {wheel}\n"
    assert expected == embedded_server.version_text(module)


def _device(name: str, kind: str) -> dict[str, Any]:
    mib = 1024 * 1024
    return {
        "name": name,
        "description": "A device",
        "memory_free": 5 * mib + 7,
        "memory_total": 9 * mib,
        "type": SimpleNamespace(name=f"GGML_BACKEND_DEVICE_TYPE_{kind}"),
    }


def test_devices_are_listed_as_llama_server_does() -> None:
    """GPUs are listed with their memory in MiB, processors are not."""
    devices = [_device("CUDA0", "GPU"), _device("CPU", "CPU"), _device("Vulkan0", "IGPU")]
    assert embedded_server.devices_text(_module(get_device_info=lambda: devices)) == (
        "Available devices:\n"
        "  CUDA0: A device (9 MiB, 5 MiB free)\n"
        "  Vulkan0: A device (9 MiB, 5 MiB free)\n"
    )


def test_no_devices_are_listed_as_none() -> None:
    """Without a GPU the list says so."""
    module = _module(get_device_info=lambda: [_device("CPU", "CPU")])
    assert embedded_server.devices_text(module) == "Available devices:\n  (none)\n"


def test_physical_cores_count_siblings_once(tmp_path: Path) -> None:
    """Two logical processors of one core count as one."""
    for number, siblings in enumerate(("5", "a", "5", "a")):
        folder = tmp_path / f"cpu{number}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings").write_text(f"{siblings}\n", encoding="ascii")
    assert embedded_server.physical_cores(tmp_path) == 2


@pytest.mark.parametrize(("logical", "expected"), [(3, 3), (16, 8), (None, 4)])
def test_physical_cores_are_guessed_where_the_kernel_is_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logical: int | None, expected: int
) -> None:
    """Up to four processors count as cores, more than that as two for each core."""
    monkeypatch.setattr(os, "cpu_count", lambda: logical)
    assert expected == embedded_server.physical_cores(tmp_path)


def test_a_folder_without_a_wheel_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The installed wheel never stands in for the one that was asked for."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert embedded_server.main(["--llmperf-wheel", str(tmp_path), "--version"]) == 1
    assert f"no xllamacpp can be imported from {tmp_path}" in capsys.readouterr().err


def test_the_folder_of_the_wheel_needs_a_value(capsys: pytest.CaptureFixture[str]) -> None:
    """``--llmperf-wheel`` alone is an error."""
    assert embedded_server.main(["--llmperf-wheel"]) == 1
    assert "needs a value" in capsys.readouterr().err


LATE = """
import os, runpy, threading, time
end = runpy.run_path({program!r}, run_name="a test")["_let_log_end"]
def write():
    for number in range(4):
        time.sleep(0.05)
        os.write(2, b"line %d\\n" % number)
threading.Thread(target=write, daemon=True).start()
end()
os._exit(1)
"""


def test_a_log_that_is_still_written_is_waited_for(tmp_path: Path) -> None:
    """The library logs from a thread of its own, and its last lines say why a start failed."""
    log = tmp_path / "log"
    with log.open("wb") as stderr:
        code = LATE.format(program=embedded_server.__file__)
        done = subprocess.run([sys.executable, "-c", code], stderr=stderr, check=False)
    assert done.returncode == 1
    assert log.read_text("utf-8").splitlines()[-1] == "line 3"
