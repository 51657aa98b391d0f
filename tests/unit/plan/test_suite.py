"""Suite files: what they say, and what is said about their mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_llmperf.errors import PlanError
from pytest_llmperf.metrics import METRICS
from pytest_llmperf.plan.config import BuildEntry, Case, CorpusPass, Turn, Workload
from pytest_llmperf.plan.model import Model, PresetSpec, SynthSpec
from pytest_llmperf.plan.options import from_flag
from pytest_llmperf.plan.suite import Suite, load_suite

SHIPPED = Path(__file__).parents[3] / "suites" / "llmperf.toml"

MODEL = """\
[models.tiny]
synth = {}
"""
"""Two lines, so that what a test adds begins on line 3."""


def load(folder: Path, text: str) -> Suite:
    """Return the suite of a file with this text."""
    path = folder / "suite.toml"
    path.write_text(text, "utf-8")
    return load_suite(path)


def mistake(folder: Path, text: str) -> str:
    """Return what is said about a file with this text, from the line number on."""
    with pytest.raises(PlanError) as caught:
        load(folder, text)
    said = str(caught.value)
    assert "\n" not in said
    start = f"{folder / 'suite.toml'}:"
    assert said.startswith(start)
    return said.removeprefix(start)


# -- what is read -----------------------------------------------------------------------------


def test_every_section_is_read(tmp_path: Path) -> None:
    """Models, builds, configs, workloads and tolerances become frozen values."""
    suite = load(
        tmp_path,
        f"""
[models.tiny]
synth = {{ layers = 2, kv-heads = 1, quant = "Q4_0" }}
[models.real]
file = "real.gguf"
sha256 = "{"AB" * 32}"
help = "a real one"
[models.small]
from = "real"
quantize = "Q4_K"
sha256 = "{"CD" * 32}"

[builds.mine]
source = "./build/bin"
label = "mine-fast"
options = {{ threads = 4 }}
env = {{ GGML_CUDA_DISABLE_GRAPHS = "1" }}
help = "without graphs"

[configs.cpu]
model = "tiny"
gpu = false
marks = ["long_running"]
help = "small"
reference = "nobody"
[configs.cpu.options]
ctx-size = 4096
[configs.cpu.tolerances]
decode_tps = 0.1

[workloads.two]
turns = [{{ prompt = 8, generate = 4 }}, {{ prompt = 2, generate = 2 }}]
help = "two turns"

[tolerances]
ttft_ms = 0
""",
    )
    assert suite.path == tmp_path / "suite.toml"
    assert suite.models == {
        "tiny": Model("tiny", synth=SynthSpec(layers=2, kv_heads=1, quant="Q4_0")),
        "real": Model("real", file="real.gguf", sha256="ab" * 32, help="a real one"),
        "small": Model("small", source="real", quantize="Q4_K", sha256="cd" * 32),
    }
    assert suite.builds == {
        "mine": BuildEntry(
            "mine",
            "./build/bin",
            label="mine-fast",
            options={"threads": 4},
            env={"GGML_CUDA_DISABLE_GRAPHS": "1"},
            help="without graphs",
        )
    }
    config = suite.configs["cpu"]
    assert (config.name, config.model, config.gpu, config.marks) == (
        "cpu",
        "tiny",
        False,
        ("long_running",),
    )
    assert (config.options, config.tolerances) == ({"ctx-size": 4096}, {"decode_tps": 0.1})
    assert (config.help, config.reference) == ("small", "nobody")
    assert suite.workloads == {"two": Workload("two", (Turn(8, 4), Turn(2, 2)), "two turns")}
    assert suite.tolerances == {"ttft_ms": 0.0}


def test_a_preset_is_read(tmp_path: Path) -> None:
    """``synth`` takes the name of a shape instead of its numbers."""
    suite = load(
        tmp_path, '[models.big]\nsynth = { preset = "llama-1b", quant = "Q8_0", layers = 2 }\n'
    )
    assert suite.models["big"].synth == PresetSpec("llama-1b", quant="Q8_0", layers=2)


def test_a_projector_must_be_as_wide_as_its_model(tmp_path: Path) -> None:
    """It is refused at the line that names it, and taken once its width is set."""
    text = '[models.m]\nsynth = { preset = "llama-10m" }\nprojector = "eyes"\n\n[models.eyes]\n'
    said = mistake(tmp_path, text + 'synth = { preset = "vision-tiny" }\n')
    assert "3: projector `eyes` makes tokens 256 wide and model `m` reads 512" in said
    suite = load(tmp_path, text + 'synth = { preset = "vision-tiny", embedding = 512 }\n')
    assert suite.models["m"].projector == "eyes"


def test_requests_at_once_are_read(tmp_path: Path) -> None:
    """``parallel`` of a workload is how many are sent at once; one by one without it."""
    turns = "turns = [{ prompt = 8, generate = 4 }]\n"
    suite = load(tmp_path, f"[workloads.a]\n{turns}[workloads.b]\n{turns}parallel = 4\n")
    assert (suite.workloads["a"].parallel, suite.workloads["b"].parallel) == (1, 4)


@pytest.mark.parametrize(
    ("turn", "keys", "read"),
    [
        ("", "", {}),
        (", depth = 32768", "limit = 600", {"turns": (Turn(8, 4, 32768),), "limit": 600.0}),
        ("", "limit = 0.5", {"limit": 0.5}),
        (", depth = 0", 'tool = "llama-bench"', {"tool": "llama-bench"}),
        (", depth = 9", 'tool = "llama-bench"', {"tool": "llama-bench", "turns": (Turn(8, 4, 9),)}),
        (", depth = 9", "parallel = 2", {"turns": (Turn(8, 4, 9),), "parallel": 2}),
        ("", 'tool = "llama-server"\napi = "completion"', {}),
        ("", 'api = "chat"', {"api": "chat"}),
        ("", 'api = "chat"\nthinking = true', {"api": "chat", "thinking": True}),
        ("", 'api = "chat"\nthinking = false', {"api": "chat", "thinking": False}),
        ("", 'api = "chat"\nimage = 224', {"api": "chat", "image": 224}),
        ("", 'api = "chat"\nparallel = 2', {"api": "chat", "parallel": 2}),
    ],
)
def test_how_a_workload_is_asked_is_read(
    tmp_path: Path, turn: str, keys: str, read: dict[str, object]
) -> None:
    """Each key, and those that go together; what is left out has its default."""
    text = f"[workloads.w]\nturns = [{{ prompt = 8, generate = 4{turn} }}]\n{keys}\n"
    values: dict[str, object] = {"name": "w", "turns": (Turn(8, 4),), **read}
    assert load(tmp_path, text).workloads["w"] == Workload(**values)  # type: ignore[arg-type]  # names of fields


def test_a_model_that_drafts_is_read_inherited_and_taken_back(tmp_path: Path) -> None:
    """It is a name in ``[models]``, like the model that it drafts for."""
    text = (
        f"{MODEL}[models.small]\nfile = 'small.gguf'\n[configs.a]\nmodel = 'tiny'\n"
        "draft = 'small'\n[configs.b]\nextends = 'a'\n[configs.c]\nextends = 'a'\ndraft = ''\n"
    )
    configs = load(tmp_path, text).configs
    assert [configs[name].draft for name in "abc"] == ["small", "small", ""]


def test_a_pass_is_read(tmp_path: Path) -> None:
    """All that it says becomes one frozen value."""
    suite = load(
        tmp_path,
        """
[passes.wiki]
corpus = "wiki.test.raw"
context = 1024
batch = 256
ubatch = 1
chunks = 40
path = "server"
marks = ["long_running"]
help = "slowly"
""",
    )
    assert suite.passes == {
        "wiki": CorpusPass(
            "wiki", "wiki.test.raw", 1024, 256, 1, 40, "server", ("long_running",), "slowly"
        )
    }


@pytest.mark.parametrize(
    ("given", "sizes"),
    [
        ("", (512, 512, 512)),
        ("context = 128", (128, 128, 128)),
        ("context = 2048", (2048, 2048, 512)),
        ("batch = 256", (512, 256, 256)),
        ("ubatch = 1", (512, 512, 1)),
        ("context = 2048\nbatch = 1024\nubatch = 1024", (2048, 1024, 1024)),
        ("context = 32", (32, 32, 32)),
    ],
)
def test_sizes_of_a_pass_follow_from_the_larger_ones(
    tmp_path: Path, given: str, sizes: tuple[int, int, int]
) -> None:
    """One batch a chunk, in physical batches of 512 at most; the whole text, by whom it may be."""
    one = load(tmp_path, f"[passes.p]\ncorpus = 'a.txt'\n{given}\n").passes["p"]
    assert (one.context, one.batch, one.ubatch) == sizes
    assert (one.chunks, one.path, one.marks, one.help) == (None, "auto", (), "")


def test_an_empty_file_is_an_empty_suite(tmp_path: Path) -> None:
    """Every section may be left out."""
    suite = load(tmp_path, "")
    assert not suite.models
    assert not suite.builds
    assert not suite.passes
    assert suite.cases() == []


def test_the_shipped_suite_loads() -> None:
    """The suite file of this repository has no mistake; its configs inherit what they should."""
    suite = load_suite(SHIPPED)
    assert {"short", "medium", "long", "multi_turn"} <= set(suite.workloads)
    assert {"cpu", "cpu-kv-q8", "c7", "fit-nobatch"} <= set(suite.configs)
    assert suite.configs["c2b"].options["n-cpu-moe"] == 36
    assert suite.configs["c2b"].options["cache-type-k"] == "q8_0"
    assert suite.configs["c2b"].gpu


def test_the_shipped_configs_use_options_that_exist() -> None:
    """An unknown option passes for a fork's, so a slip of the pen would come out late."""
    for config in load_suite(SHIPPED).configs.values():
        assert [name for name in config.options if from_flag(f"--{name}") is None] == []


# -- options ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "options"),
    [
        ("threads = 2", {"threads": 2}),
        ("temp = 0.5", {"temp": 0.5}),
        ('flash-attn = "on"', {"flash-attn": "on"}),
        ("jinja = true", {"jinja": True}),
        ("mmap = false", {"mmap": False}),
        ("no-mmap = true", {"mmap": False}),
        ("no-mmap = false", {"mmap": True}),
        ("no-host = true", {"no-host": True}),
        ("n-gpu-layers = 99", {"gpu-layers": 99}),
        ("draft-max = 8", {"draft": 8}),
        ('override-tensor = ["a=CPU", "b=CPU"]', {"override-tensor": ("a=CPU", "b=CPU")}),
        ("fork-only = true", {"fork-only": True}),
        ('cache-type-k = "turbo3"', {"cache-type-k": "turbo3"}),
    ],
)
def test_options_get_their_long_names(
    tmp_path: Path, written: str, options: dict[str, object]
) -> None:
    """Synonyms and `no-` forms are turned into one name; unknown options pass for forks."""
    suite = load(tmp_path, f'{MODEL}[configs.c]\nmodel = "tiny"\noptions = {{ {written} }}\n')
    assert suite.configs["c"].options == options


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("port = 8080", "`port` is not for a config: every server gets a free port of its own"),
        ('host = "0.0.0.0"', "`host` is not for a config: servers listen on 127.0.0.1"),
        ('model = "a.gguf"', "`model` is not for a config: name it with the config's key `model`"),
        ('api-key = "x"', "`api-key` is not for a config: every server gets a random key"),
        ('log-file = "x"', "`log-file` is not for a config: every server's log is kept"),
        ("--threads = 2", "`--threads`: write option names without dashes"),
        ("jinja = 1", "`jinja` is a flag: write true or false"),
        ('jinja = "on"', "`jinja` is a flag: write true or false"),
        ('no-mmap = ["a"]', "`no-mmap` is a flag: write true or false"),
        ("threads = true", "`threads` takes a value, not true"),
        ("threads = 1979-05-27", "`threads` must be a string, a number, true, false or a list"),
        ("override-tensor = [1]", "`override-tensor` must be a string, a number, true, false"),
        ("fork-only = { a = 1 }", "`fork-only` must be a string, a number, true, false"),
        (
            "gpu-layers = 1\nn-gpu-layers = 2",
            "`n-gpu-layers` is set twice, under two names: keep one",
        ),
        ("mmap = true\nno-mmap = true", "`no-mmap` is set twice, under two names: keep one"),
    ],
)
@pytest.mark.parametrize("table", ["configs.c", "builds.b"])
def test_a_mistake_in_an_option_has_its_line(
    tmp_path: Path, table: str, written: str, said: str
) -> None:
    """Options of configs and of builds are checked alike."""
    last = 4 + written.count("\n") + 1
    head = f'{MODEL}[{table}]\n{"model" if table == "configs.c" else "source"} = "tiny"\n'
    assert mistake(tmp_path, f"{head}[{table}.options]\n{written}\n").startswith(
        f"{last + 1}: {said}"
    )


def test_a_container_takes_flags_and_a_program(tmp_path: Path) -> None:
    """As they are written; the engine knows what they mean."""
    written = 'source = "docker:llama:b1"\nrun = ["--device", "/dev/dri"]\nprogram = "/app/x"\n'
    suite = load(tmp_path, f"[builds.boxed]\n{written}")
    assert suite.builds["boxed"] == BuildEntry(
        "boxed", "docker:llama:b1", run=("--device", "/dev/dri"), program="/app/x"
    )


# -- inheritance ------------------------------------------------------------------------------


def test_a_config_inherits_and_what_it_says_itself_wins(tmp_path: Path) -> None:
    """Model, options, gpu, marks, tolerances and reference come down; help does not."""
    suite = load(
        tmp_path,
        f"""{MODEL}
[models.other]
synth = {{}}
[configs.child]
extends = "middle"
options = {{ threads = 8 }}
tolerances = {{ ttft_ms = 0.3 }}
[configs.middle]
extends = "top"
model = "other"
[configs.top]
model = "tiny"
gpu = true
marks = ["quality"]
help = "of the top"
reference = "a report"
options = {{ threads = 4, mmap = false }}
tolerances = {{ decode_tps = 0.1, ttft_ms = 0.2 }}
""",
    )
    child = suite.configs["child"]
    assert child.model == "other"
    assert child.options == {"threads": 8, "mmap": False}
    assert child.tolerances == {"decode_tps": 0.1, "ttft_ms": 0.3}
    assert (child.gpu, child.marks) == (True, ("quality",))
    assert (child.reference, child.help) == ("a report", "")
    assert list(suite.configs) == ["child", "middle", "top"]


AGAINST = f"""{MODEL}
[configs.f16]
model = "tiny"
[configs.q8]
extends = "f16"
against = "%s"
"""


@pytest.mark.parametrize(
    "value", ["f16", "old.kldref", "old.kld", "refs/old", "~/old", "/refs/old.bin", ""]
)
def test_a_config_is_compared_with_a_config_or_a_file(tmp_path: Path, value: str) -> None:
    """A file is known by its ending or by a slash; whether it is there is seen later."""
    assert load(tmp_path, AGAINST % value).configs["q8"].against == value


def test_a_config_against_itself_names_nothing(tmp_path: Path) -> None:
    """Its own answers on the baseline's build are the reference of one that names none."""
    assert load(tmp_path, AGAINST % "q8").configs["q8"].against == ""


def test_a_config_may_be_compared_with_one_further_down(tmp_path: Path) -> None:
    """The order of the file is of no matter."""
    more = "[configs.later]\nmodel = 'tiny'\n"
    assert load(tmp_path, AGAINST % "later" + more).configs["q8"].against == "later"


def test_gpus_and_exclusive_are_inherited(tmp_path: Path) -> None:
    """Until a config says otherwise, or takes back the GPU."""
    text = (
        MODEL
        + """
[configs.a]
model = "tiny"
gpu = true
gpus = 2
exclusive = false
[configs.b]
extends = "a"
[configs.c]
extends = "a"
gpus = 1
exclusive = true
[configs.d]
extends = "a"
gpu = false
[configs.e]
extends = "d"
gpu = true
[configs.f]
model = "tiny"
exclusive = true
"""
    )
    configs = load(tmp_path, text).configs
    assert {name: (one.cards, one.exclusive) for name, one in configs.items()} == {
        "a": (2, False),
        "b": (2, False),
        "c": (1, True),
        "d": (0, None),
        "e": (1, None),
        "f": (0, True),
    }


def test_against_and_budgets_are_inherited(tmp_path: Path) -> None:
    """A config's own budget wins; what is compared with the config itself is compared with none."""
    suite = load(
        tmp_path,
        f"""{MODEL}
[configs.q8]
model = "tiny"
against = "f16"
budgets = {{ kld_mean = 0.01, same_top = 95 }}
[configs.q4]
extends = "q8"
budgets = {{ kld_mean = 0.1, ppl = 20 }}
[configs.own]
extends = "q8"
against = ""
[configs.f16]
extends = "q8"
""",
    )
    assert {name: config.against for name, config in suite.configs.items()} == {
        "q8": "f16",
        "q4": "f16",
        "own": "",
        "f16": "",
    }
    assert suite.configs["q8"].budgets == {"kld_mean": 0.01, "same_top": 95.0}
    assert suite.configs["q4"].budgets == {"kld_mean": 0.1, "same_top": 95.0, "ppl": 20.0}


def test_a_config_may_take_back_what_it_inherits(tmp_path: Path) -> None:
    """`gpu = false` and `marks = []` win over the parent's."""
    suite = load(
        tmp_path,
        f"""{MODEL}
[configs.top]
model = "tiny"
gpu = true
marks = ["quality"]
[configs.child]
extends = "top"
gpu = false
marks = []
""",
    )
    assert (suite.configs["child"].gpu, suite.configs["child"].marks) == (False, ())


def test_an_env_file_stands_between_the_parent_and_the_options(tmp_path: Path) -> None:
    """It is looked for beside the suite file; the config's own options win over it."""
    (tmp_path / "c7.env").write_text("-t 20 -c 4096 --no-mmap\n", "utf-8")
    suite = load(
        tmp_path,
        f"""{MODEL}
[configs.top]
model = "tiny"
options = {{ threads = 2, parallel = 4 }}
[configs.child]
extends = "top"
env-file = "c7.env"
options = {{ ctx-size = 8192 }}
""",
    )
    assert suite.configs["child"].options == {
        "threads": 20,
        "parallel": 4,
        "ctx-size": 8192,
        "mmap": False,
    }


def test_a_mistake_in_an_env_file_names_that_file(tmp_path: Path) -> None:
    """The line is the .env file's, not the suite file's."""
    (tmp_path / "c7.env").write_text("\n--nonsense\n", "utf-8")
    with pytest.raises(PlanError, match=r"c7\.env:2: unknown flag --nonsense"):
        load(tmp_path, f'{MODEL}[configs.c]\nmodel = "tiny"\nenv-file = "c7.env"\n')


# -- mistakes ---------------------------------------------------------------------------------

CONFIG = MODEL + '[configs.c]\nmodel = "tiny"\n'
WORKLOAD = "[workloads.w]\nturns = "
CORPUS = "[passes.p]\ncorpus = 'a.txt'\n"
BUDGET = CONFIG + "[configs.c.budgets]\n"
ASKED = WORKLOAD + "[{ prompt = 1, generate = 2 }]\n"
EYES = MODEL + "[models.eyes]\nsynth = { preset = 'vision-tiny' }\n"
NEITHER = "1: llama-bench takes one turn of `depth`, `prompt` and `generate`, and nothing else"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        # the file
        ("[models.tiny]\nsynth = {}\n\n[models.tiny]\n", "4: not valid TOML: Cannot declare"),
        ("[models.tiny\n", "1: not valid TOML: "),
        ("[models.tiny]\nfile = 'a\n", "2: not valid TOML: "),
        ("a = [1,\n\n", "2: not valid TOML: "),
        (
            "\n[modles.tiny]\nsynth = {}\n",
            "2: unknown key `modles` in the suite file (nearest: models): it takes models, builds,",
        ),
        ("x = 1\n", "1: unknown key `x` in the suite file: it takes"),
        ("models = 1\n", "1: `models` must be a table"),
        ("tolerances = 1\n", "1: `tolerances` must be a table"),
        ("[models]\ntiny = 1\n", "2: `models.tiny` must be a table"),
        ("[configs]\nc = 1\n", "2: `configs.c` must be a table"),
        ('[configs]\n"a b" = {}\n', "2: `a b` is no name for [configs]: use letters, digits, `.`"),
        ('[configs."-c"]\n', "1: `-c` is no name for [configs]"),
        ('[models."a/b"]\n', "1: `a/b` is no name for [models]"),
        ('[models]\n"a\\n" = {}\n', "1: `a\\n` is no name for [models]"),
        ("[workloads.a-b]\n", "1: `a-b` is no name for [workloads]: use letters, digits, `.` and"),
        # models
        ("[models.m]\nfiel = 1\n", "2: unknown key `fiel` in [models.m] (nearest: file): it takes"),
        ("[models.m]\nfile = 1\n", "2: `file` must be a string, not 1"),
        ("[models.m]\nhelp = 'x'\n", "1: model `m` needs one of `file`, `synth`, and `from` with"),
        ("[models.m]\nfile = 'a'\nsynth = {}\n", "1: model `m` needs one of `file`, `synth`, and"),
        ("[models.m]\nfrom = 1\n", "2: `from` must be a string, not 1"),
        ("[models.m]\nfrom = 'a'\nquantize = 4\n", "3: `quantize` must be a string, not 4"),
        ("[models.m]\nfrom = 'a'\n", "1: model `m` has `from` and lacks `quantize`: name one of"),
        (
            "[models.m]\nfrom = 'm'\nquantize = 'Q4_K'\n",
            "2: model `m` is from `m`, which is no other model: there are none",
        ),
        (
            MODEL + "[models.m]\nfrom = 'tini'\nquantize = 'Q4_K'\n",
            "4: model `m` is from `tini`, which is no other model (nearest: tiny): there are tiny",
        ),
        (
            MODEL + "[models.m]\nfrom = 'tiny'\nquantize = 'Q4_K'\n",
            '4: model `m` is from `tiny`, which is made in Q8_0: set quant = "F16" in its `synth`',
        ),
        (
            MODEL + "[models.a]\nfrom = 'b'\nquantize = 'Q4_K'\n"
            "[models.b]\nfrom = 'tiny'\nquantize = 'Q8_0'\n",
            "4: model `a` is from `b`, itself quantized from `tiny`: quantize from `tiny`, or the",
        ),
        ("[models.m]\nfile = 'a'\nsha256 = 'ab'\n", "1: `sha256` of model `m` must be 64"),
        ("[models.m]\nsynth = true\n", "2: `synth` must be a table, not True"),
        ("[models.m]\nsynth = { layer = 1 }\n", "2: unknown key `layer` in [models.m.synth]"),
        ("[models.m]\nsynth = { kv_heads = 1 }\n", "2: unknown key `kv_heads` in [models.m.synth]"),
        ("[models.m.synth]\nseed = 1\nkv-heads = 1.5\n", "3: `kv-heads` must be a whole number"),
        ("[models.m.synth]\nseed = true\n", "2: `seed` must be a whole number, not True"),
        ("[models.m.synth]\nquant = 8\n", "2: `quant` must be a string, not 8"),
        ("[models.m]\nsynth = { layers = 0 }\n", "1: `layers` must be a whole number of at least"),
        ("[models.m]\nsynth = { preset = 'llama' }\n", "1: no preset `llama` (nearest: llama-"),
        ("[models.m.synth]\npreset = 1\n", "2: `preset` must be a string, not 1"),
        (
            "[models.m.synth]\npreset = 'llama-1b'\nheads = 4\n",
            "3: unknown key `heads` in [models.m.synth]",
        ),
        ("[models.m]\nfile = 'a'\nprojector = 1\n", "3: `projector` must be a string, not 1"),
        (
            EYES + "[models.m]\nfile = 'a'\nprojector = 'eye'\n",
            "7: model `m` has the projector `eye`, which is no model (nearest: eyes): give its",
        ),
        (
            MODEL + "projector = 'tiny'\n",
            "3: model `tiny` is its own projector: name the model that makes tokens of images",
        ),
        (
            MODEL + "[models.m]\nfile = 'a'\nprojector = 'tiny'\n",
            "5: projector `tiny` of model `m` is a text model: name a model of the preset vision-",
        ),
        (EYES + "projector = 'tiny'\n", "5: model `eyes` is a projector itself: name a projector"),
        # builds
        ("[builds.b]\nsrc = 'x'\n", "2: unknown key `src` in [builds.b]"),
        ("[builds.b]\nhelp = 'x'\n", '1: lacks `source`, such as source = "pypi:xllamacpp=='),
        ("[builds.b]\nsource = 1\n", "2: `source` must be a string, not 1"),
        ("[builds.b]\nsource = 'x'\nlabel = 1\n", "3: `label` must be a string, not 1"),
        ("[builds.b]\nsource = 'x'\nenv = 1\n", "3: `env` must be a table, not 1"),
        ("[builds.b]\nsource = 'x'\n[builds.b.env]\nA = 1\n", "4: `A` must be a string, not 1"),
        ("[builds.b]\nsource = 'x'\nrun = ['-v']\n", "3: `run` is for a source `docker:IMAGE`"),
        ("[builds.b]\nsource = 'x'\nprogram = 'p'\n", "3: `program` is for a source `docker:"),
        ("[builds.b]\nsource = 'docker:x'\nrun = '-v'\n", "3: `run` must be a list, not '-v'"),
        ("[builds.b]\nsource = 'docker:x'\nrun = [1]\n", "3: `run` must hold strings, not 1"),
        ("[builds.b]\nsource = 'docker:x'\nprogram = 1\n", "3: `program` must be a string, not 1"),
        # configs
        (CONFIG + "gpu_s = true\n", "5: unknown key `gpu_s` in [configs.c] (nearest: gpus)"),
        (CONFIG + "exclusiv = true\n", "5: unknown key `exclusiv` in [configs.c] (nearest: ex"),
        (CONFIG + "gpus = true\n", "5: `gpus` must be int, not True"),
        (CONFIG + "gpu = true\ngpus = 0\n", "6: `gpus` must be at least 1, not 0"),
        (CONFIG + "gpus = 2\n", "5: `gpus` is for a config with gpu = true"),
        (CONFIG + "exclusive = 1\n", "5: `exclusive` must be true or false, not 1"),
        (CONFIG + "exclusive = false\n", "5: exclusive = false is for a config with gpu = true"),
        (CONFIG + "gpu = 1\n", "5: `gpu` must be true or false, not 1"),
        (CONFIG + "marks = 'gpu'\n", "5: `marks` must be a list, not 'gpu'"),
        (CONFIG + "marks = [1]\n", "5: `marks` must hold strings, not 1"),
        (CONFIG + "options = 1\n", "5: `options` must be a table, not 1"),
        (CONFIG + "env-file = 1\n", "5: `env-file` must be a string, not 1"),
        (CONFIG + "tolerances = 1\n", "5: `configs.c.tolerances` must be a table"),
        (MODEL + "[configs.c]\nhelp = 'x'\n", "3: lacks `model`, a name in [models]"),
        (MODEL + "[configs.c.options]\nthreads = 1\n", "3: lacks `model`, a name in [models]"),
        (
            MODEL + "[configs.c]\nmodel = 'tini'\n",
            "4: no model `tini` (nearest: tiny): there are tiny",
        ),
        ("[configs.c]\nmodel = 'tiny'\n", "2: no model `tiny`: there are none"),
        (CONFIG + "extends = 1\n", "5: `extends` must be a string, not 1"),
        (CONFIG + "extends = 'd'\n", "5: extends `d`, which is no config"),
        (CONFIG + "extends = 'c'\n", "5: extends itself by way of c -> c"),
        (
            CONFIG + "extends = 'd'\n[configs.d]\nextends = 'c'\n",
            "7: extends itself by way of c -> d -> c",
        ),
        (CONFIG + "draft = 1\n", "5: `draft` must be a string, not 1"),
        (CONFIG + "draft = 'tini'\n", "5: no model `tini` (nearest: tiny): there are tiny"),
        (
            EYES + "[configs.c]\nmodel = 'eyes'\n",
            "6: `eyes` is a projector, which no server runs by itself: name it in the key `proj",
        ),
        (EYES + "[configs.c]\nmodel = 'tiny'\ndraft = 'eyes'\n", "7: `eyes` is a projector, which"),
        (
            CONFIG + "[configs.c.options]\nmodel-draft = 'a.gguf'\n",
            "6: `model-draft` is not for a config: name it in [models], and in the config's key `d",
        ),
        (
            CONFIG + "[configs.c.options]\nmmproj = 'a.gguf'\n",
            "6: `mmproj` is not for a config: name it in [models], and in the key `projector` of",
        ),
        # workloads
        ("[workloads.w]\nturn = []\n", "2: unknown key `turn` in [workloads.w] (nearest: turns)"),
        ("[workloads.w]\nhelp = 'x'\n", "1: lacks `turns`, such as [{ prompt = 64, generate = 64"),
        (WORKLOAD + "[]\n", "1: lacks `turns`"),
        (WORKLOAD + "1\n", "2: `turns` must be a list, not 1"),
        (WORKLOAD + "[1]\n", "2: `workloads.w.turns` must be a table"),
        (WORKLOAD + "[{ prompt = 1, generat = 2 }]\n", "2: unknown key `generat` in [workloads.w."),
        (WORKLOAD + "[{ generate = 2 }]\n", "2: `prompt` of a turn must be a whole number"),
        (WORKLOAD + "[{ prompt = 0, generate = 2 }]\n", "2: `prompt` of a turn must be a whole"),
        (WORKLOAD + "[{ prompt = 1 }]\n", "2: `generate` of a turn must be a whole number"),
        (
            WORKLOAD + "[{ prompt = 1, generate = 1 }]\n",
            "2: `generate` of a turn must be a whole number of tokens, at least 2",
        ),
        (WORKLOAD + "[{ prompt = true, generate = 2 }]\n", "2: `prompt` of a turn must be a whole"),
        (WORKLOAD + "[{ prompt = 1, generate = 2.0 }]\n", "2: `generate` of a turn must be a"),
        (
            WORKLOAD + "[{ prompt = 1, generate = 2 }]\nparallel = 0\n",
            "3: `parallel` must be a whole number of requests, at least 1, not 0",
        ),
        (
            WORKLOAD + "[{ prompt = 1, generate = 2 }]\nparallel = true\n",
            "3: `parallel` must be a whole number of requests, at least 1, not True",
        ),
        (
            WORKLOAD + "[{ prompt = 1, generate = 2 }]\nparallel = 2.5\n",
            "3: `parallel` must be a whole number of requests, at least 1, not 2.5",
        ),
        (
            "[workloads.launch]\nturns = [{ prompt = 1, generate = 2 }]\n",
            "1: `launch` is taken: it stands for what a start alone shows",
        ),
        (
            WORKLOAD + "[{ prompt = 1, generate = 2, depth = -1 }]\n",
            "2: `depth` must be a whole number of tokens, at least 0, not -1",
        ),
        (WORKLOAD + "[{ prompt = 1, generate = 2, depth = true }]\n", "2: `depth` must be a whole"),
        (WORKLOAD + "[{ prompt = 1, generate = 2, depth = 1.5 }]\n", "2: `depth` must be a whole"),
        (
            WORKLOAD + "[{ prompt = 1, generate = 2, depth = 8 }, { prompt = 1, generate = 2 }]\n",
            "1: has `depth` among several turns: it goes with a single one",
        ),
        (ASKED + "limit = 0\n", "3: `limit` must be a number of seconds above 0, not 0"),
        (ASKED + "limit = -1\n", "3: `limit` must be a number of seconds above 0, not -1"),
        (ASKED + "limit = inf\n", "3: `limit` must be a number of seconds above 0, not inf"),
        (ASKED + "limit = nan\n", "3: `limit` must be a number of seconds above 0, not nan"),
        (ASKED + "limit = true\n", "3: `limit` must be a number of seconds above 0, not True"),
        (ASKED + "limit = '9 s'\n", "3: `limit` must be a number of seconds above 0, not '9 s'"),
        (ASKED + "api = 'chats'\n", "3: `api` must be one of completion, chat, not 'chats'"),
        (ASKED + "api = 1\n", "3: `api` must be a string, not 1"),
        (ASKED + "tool = 'bench'\n", "3: `tool` must be one of llama-server, llama-bench, not 'b"),
        (ASKED + "tool = true\n", "3: `tool` must be a string, not True"),
        (ASKED + "api = 'chat'\nthinking = 'on'\n", "4: `thinking` must be true or false, not 'on"),
        (ASKED + "api = 'chat'\nimage = 0\n", "4: `image` must be a whole number of pixels, at le"),
        (
            ASKED + "api = 'chat'\nimage = '9x9'\n",
            "4: `image` must be a whole number of pixels, at",
        ),
        (ASKED + "thinking = false\n", '1: `thinking` is for the chat template: set api = "chat"'),
        (ASKED + "image = 64\n", '1: `image` goes with a message: set api = "chat"'),
        (
            WORKLOAD + "[{ prompt = 1, generate = 2, depth = 8 }]\napi = 'chat'\n",
            "1: `depth` is counted in tokens before a prompt of tokens: leave `api` out",
        ),
        (ASKED + "tool = 'llama-bench'\napi = 'chat'\n", NEITHER),
        (ASKED + "tool = 'llama-bench'\nthinking = true\n", NEITHER),
        (ASKED + "tool = 'llama-bench'\nimage = 64\n", NEITHER),
        (ASKED + "tool = 'llama-bench'\nparallel = 2\n", NEITHER),
        (
            WORKLOAD + "[{ prompt = 1, generate = 2 }, { prompt = 1, generate = 2 }]\n"
            "tool = 'llama-bench'\n",
            NEITHER,
        ),
        # passes
        (
            "[passes.p]\ncorpora = 'a'\n",
            "2: unknown key `corpora` in [passes.p] (nearest: corpus): it takes corpus, context,",
        ),
        ("[passes.a-b]\n", "1: `a-b` is no name for [passes]: use letters, digits, `.` and `_`"),
        (
            "[passes.launch]\ncorpus = 'a.txt'\n",
            "1: `launch` is taken: it stands for what a start alone shows",
        ),
        (
            "[passes.p]\nhelp = 'x'\n",
            '1: lacks `corpus`, a text file such as "wiki.test.raw"',
        ),
        ("[passes.p]\ncorpus = ''\n", "1: lacks `corpus`, a text file"),
        ("[passes.p]\ncorpus = 1\n", "2: `corpus` must be a string, not 1"),
        (CORPUS + "context = 31\n", "3: `context` must be 32 tokens at least, not 31"),
        (CORPUS + "context = 0\n", "3: `context` must be a whole number, at least 1, not 0"),
        (CORPUS + "batch = 1.5\n", "3: `batch` must be a whole number, at least 1, not 1.5"),
        (CORPUS + "ubatch = true\n", "3: `ubatch` must be a whole number, at least 1, not True"),
        (CORPUS + "chunks = '4'\n", "3: `chunks` must be a whole number, at least 4, not '4'"),
        (CORPUS + "chunks = 0\n", "3: `chunks` must be a whole number, at least 4, not 0"),
        (
            CORPUS + "batch = 1024\n",
            "1: needs ubatch <= batch <= context, not 512, 1024, 512",
        ),
        (
            CORPUS + "batch = 64\nubatch = 128\n",
            "1: needs ubatch <= batch <= context, not 128, 64, 512",
        ),
        (CORPUS + "ubatch = 513\n", "1: needs ubatch <= batch <= context, not 513, 512, 512"),
        (CORPUS + "path = 'api'\n", "3: `path` must be one of auto, tool, server, not 'api'"),
        (CORPUS + "path = true\n", "3: `path` must be a string, not True"),
        (CORPUS + "marks = 'gpu'\n", "3: `marks` must be a list, not 'gpu'"),
        (CORPUS + "help = 1\n", "3: `help` must be a string, not 1"),
        ("passes = 1\n", "1: `passes` must be a table"),
        (
            WORKLOAD + "[{ prompt = 1, generate = 2 }]\n[passes.w]\ncorpus = 'a.txt'\n",
            "3: `w` is a workload already: choose another name",
        ),
        # against
        (
            CONFIG + "against = 'd'\n[configs.x]\nextends = 'c'\n",
            "5: against `d`, which is no config and no file: a file of recorded distributions ends",
        ),
        (CONFIG + "against = 'old.gguf'\n", "5: against `old.gguf`, which is no config and no"),
        (CONFIG + "against = '.kldref'\n", "5: against `.kldref`, which is no config and no file"),
        (
            CONFIG + "against = 'cc'\n",
            "5: against `cc`, which is no config (nearest: c) and no file",
        ),
        (CONFIG + "against = 1\n", "5: `against` must be a string, not 1"),
        # budgets
        (CONFIG + "budgets = 1\n", "5: `configs.c.budgets` must be a table"),
        (
            BUDGET + "kld_men = 1\n",
            "6: `kld_men` has no budget (nearest: kld_mean): there are ppl, kld_mean, kld_p999,",
        ),
        (BUDGET + "decode_tps = 1\n", "6: `decode_tps` has no budget: there are ppl, kld_mean"),
        (BUDGET + "kld_mean = 0\n", "6: `kld_mean` must be a number of nat above 0, not 0"),
        (BUDGET + "ppl = -1\n", "6: `ppl` must be a number of ppl above 0, not -1"),
        (BUDGET + "same_top = '95 %'\n", "6: `same_top` must be a number of % above 0, not '95"),
        (BUDGET + "same_top = true\n", "6: `same_top` must be a number of % above 0, not True"),
        (BUDGET + "kld_p999 = nan\n", "6: `kld_p999` must be a number of nat above 0, not nan"),
        (BUDGET + "ppl = inf\n", "6: `ppl` must be a number of ppl above 0, not inf"),
        # tolerances
        ("[tolerances]\ndecode_tp = 0.1\n", "2: no metric `decode_tp` (nearest: decode_tps): "),
        ("[tolerances]\ndecode_tps = 1\n", "2: `decode_tps` must be a fraction from 0 to below 1"),
        ("[tolerances]\ndecode_tps = -0.1\n", "2: `decode_tps` must be a fraction"),
        ("[tolerances]\ndecode_tps = nan\n", "2: `decode_tps` must be a fraction"),
        ("[tolerances]\ndecode_tps = '5 %'\n", "2: `decode_tps` must be a fraction"),
        ("[tolerances]\ndecode_tps = true\n", "2: `decode_tps` must be a fraction"),
        (
            CONFIG + "[configs.c.tolerances]\ndecode_tps = 5\n",
            "6: `decode_tps` must be a fraction from 0 to below 1 (0.05 is 5 %), not 5",
        ),
    ],
)
def test_a_mistake_names_file_line_and_mend(tmp_path: Path, text: str, said: str) -> None:
    """The first mistake is told in one line that says what would be right."""
    assert mistake(tmp_path, text).startswith(said)


def test_a_missing_file_says_how_to_name_another(tmp_path: Path) -> None:
    """There is no line to point at, but an option to use."""
    path = tmp_path / "gone.toml"
    with pytest.raises(PlanError) as caught:
        load_suite(path)
    assert str(caught.value) == (
        f"{path}: there is no such suite file: give another with --llmperf-suite=FILE"
    )


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None) -> None:
    """A folder, or bytes that are no text, are no suite file."""
    path = tmp_path / "suite.toml"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(PlanError, match=r"suite\.toml: cannot read the suite file: "):
        load_suite(path)


@given(st.lists(st.integers(0, 7), min_size=8, max_size=8))
def test_every_web_of_extends_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, parents: list[int]
) -> None:
    """Configs that lead to themselves are a mistake; all others load, in any order."""
    text = MODEL + "".join(
        f"[configs.c{name}]\nmodel = 'tiny'\nextends = 'c{parent}'\n"
        for name, parent in enumerate(parents)
    )
    text += "[configs.root]\nmodel = 'tiny'\n"
    folder = tmp_path_factory.mktemp("web", numbered=True)
    # Each of the eight has a parent among the eight, so following them ends in a cycle.
    assert "extends itself by way of" in mistake(folder, text)
    # Where every parent stands further down the file, there is none.
    forward = text
    for name, parent in enumerate(parents):
        if parent <= name:
            forward = forward.replace(
                f"[configs.c{name}]\nmodel = 'tiny'\nextends = 'c{parent}'",
                f"[configs.c{name}]\nmodel = 'tiny'\nextends = 'root'",
            )
    assert len(load(folder, forward).configs) == 9


# -- cases ------------------------------------------------------------------------------------


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    """Two configs, two workloads and two passes."""
    return load(
        tmp_path,
        MODEL
        + "".join(f"[passes.{name}]\ncorpus = 'a.txt'\n" for name in ("wiki", "code"))
        + "".join(f"[configs.{name}]\nmodel = 'tiny'\n" for name in ("a", "b"))
        + "".join(
            f"[workloads.{name}]\nturns = [{{ prompt = 1, generate = 2 }}]\n"
            for name in ("short", "long")
        ),
    )


def ids(cases: list[Case]) -> list[str]:
    """Return the ids of cases."""
    return [case.id for case in cases]


def test_cases_are_configs_times_workloads_configs_outermost(suite: Suite) -> None:
    """So that the tests of one server stand next to each other, in the order asked for."""
    assert ids(suite.cases(["b", "a"], ["long", "short"])) == [
        "b-long",
        "b-short",
        "a-long",
        "a-short",
    ]


def test_no_configs_means_all_of_them(suite: Suite) -> None:
    """In the order of the file."""
    assert ids(suite.cases(None, ["short"])) == ["a-short", "b-short"]


@pytest.mark.parametrize("workloads", [None, []])
def test_no_workloads_means_the_start_alone(suite: Suite, workloads: list[str] | None) -> None:
    """One case a config."""
    assert suite.cases(["a"], workloads) == [Case(suite.configs["a"], None)]


def test_passes_follow_the_workloads_of_a_config(suite: Suite) -> None:
    """Configs are outermost all the same."""
    cases = suite.cases(["b", "a"], ["short"], ["code", "wiki"])
    assert ids(cases) == ["b-short", "b-code", "b-wiki", "a-short", "a-code", "a-wiki"]
    assert cases[1] == Case(suite.configs["b"], corpus_pass=suite.passes["code"])


@pytest.mark.parametrize("workloads", [None, []])
def test_passes_without_workloads_start_nothing_alone(
    suite: Suite, workloads: list[str] | None
) -> None:
    """One case a config and pass."""
    assert ids(suite.cases(None, workloads, ["wiki"])) == ["a-wiki", "b-wiki"]


def test_an_unknown_pass_is_refused(suite: Suite) -> None:
    """With the nearest one and all there are; a workload is none."""
    with pytest.raises(PlanError, match=r"no pass `wki` \(nearest: wiki\): there are wiki, code$"):
        suite.cases(["a"], None, ["wki"])
    with pytest.raises(PlanError, match=r"no pass `short`: there are wiki, code$"):
        suite.cases(["a"], None, ["short"])


def test_an_unknown_config_is_refused(suite: Suite) -> None:
    """With the nearest one and all there are."""
    with pytest.raises(PlanError, match=r"suite\.toml: no config `c`: there are a, b$"):
        suite.cases(["c"])


def test_an_unknown_workload_is_refused(suite: Suite) -> None:
    """With the nearest one and all there are."""
    with pytest.raises(
        PlanError, match=r"no workload `shrt` \(nearest: short\): there are short, long$"
    ):
        suite.cases(["a"], ["shrt"])


def test_an_unknown_name_in_an_empty_suite_says_so(tmp_path: Path) -> None:
    """There is nothing to list."""
    with pytest.raises(PlanError, match=r"no config `c`: there are no configs$"):
        load(tmp_path, "").cases(["c"])
    with pytest.raises(PlanError, match=r"no pass `p`: there are no passes$"):
        load(tmp_path, "").cases([], None, ["p"])


@given(st.sampled_from(list(METRICS)), st.floats(0, 1, exclude_max=True))
def test_every_metric_takes_any_fraction(
    tmp_path_factory: pytest.TempPathFactory, name: str, fraction: float
) -> None:
    """A tolerance from 0 to below 1 comes through unchanged."""
    folder = tmp_path_factory.mktemp("fraction", numbered=True)
    assert load(folder, f"[tolerances]\n{name} = {fraction!r}\n").tolerances == {name: fraction}


def test_a_template_file_lies_beside_the_suite_file(tmp_path: Path) -> None:
    """In configs and builds; one that is not there is a mistake with its full path."""
    (tmp_path / "my.jinja").write_text("{{ messages }}")
    option = 'options = { chat-template-file = "my.jinja" }'
    text = (
        f'{MODEL}[configs.c]\nmodel = "tiny"\n{option}\n[builds.b]\nsource = "embedded"\n{option}\n'
    )
    suite = load(tmp_path, text)
    wanted = {"chat-template-file": str(tmp_path / "my.jinja")}
    assert suite.configs["c"].options == suite.builds["b"].options == wanted
    said = mistake(tmp_path, text.replace("my.jinja", "no.jinja", 1))
    assert said == f"5: no such file {tmp_path / 'no.jinja'}"
