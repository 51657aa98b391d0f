"""The script that builds llama.cpp by its number, against a repository that stands in for it."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from pytest_llmperf.build.build import parse_version
from pytest_llmperf.build.spec import parse_spec

SCRIPT = Path(__file__).parents[3] / "scripts" / "build_llama.sh"
NEEDED = ("bash", "git", "flock")
pytestmark = pytest.mark.skipif(
    not all(shutil.which(name) for name in NEEDED), reason=f"one of {', '.join(NEEDED)} is missing"
)

PROJECT = """\
cmake_minimum_required(VERSION 3.14)
project(stand-in C)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
set(CMAKE_LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
add_library(llama SHARED llama.c)
target_compile_definitions(llama PRIVATE
    NUMBER=${LLAMA_BUILD_NUMBER} COMMIT="${LLAMA_BUILD_COMMIT}")
foreach(name llama-server llama-bench llama-perplexity llama-quantize)
    add_executable(${name} main.c)
    target_link_libraries(${name} llama)
endforeach()
"""
LIBRARY = """\
#include <stdio.h>
void tell(void) { fprintf(stderr, "version: 0.6.0-dev (build %d, commit %s)\\n", NUMBER, COMMIT); }
"""
PROGRAM = "void tell(void); int main(void) { tell(); return 0; }\n"

# Stands in for cmake: writes down what it was asked and makes the programs, or fails as told.
CMAKE = """\
#!/bin/sh
echo "cmake $*" >> "$CALLS"
[ -n "${CMAKE_SAYS:-}" ] && { echo "$CMAKE_SAYS"; exit 1; }
case $1 in
--build)
    mkdir -p "$2/bin"
    for name in ${MAKES:-llama-server llama-bench llama-perplexity llama-quantize}; do
        cp "$2/program" "$2/bin/$name"
    done ;;
*)
    for word; do
        case $word in -DLLAMA_BUILD_NUMBER=*) number=${word#*=} ;; esac
    done
    mkdir -p "$4"
    printf '#!/bin/sh\\n[ "$1" = --version ] && echo "version: %s (abc)" >&2 || echo "%s"\\n' \\
        "${NUMBER:-$number}" "${DEVICES:-(none)}" > "$4/program"
    chmod +x "$4/program" ;;
esac
sleep "${CMAKE_TAKES:-0}"
"""


class Machine:
    """A machine with a repository in the place of llama.cpp's, and a cache folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cache = folder / "cache" / "llama.cpp"
        self.calls = folder / "calls.txt"
        self.programs = folder / "bin"
        self.programs.mkdir()
        self.repository = folder / "origin"
        self.repository.mkdir()
        for name, text in {
            "CMakeLists.txt": PROJECT,
            "llama.c": LIBRARY,
            "main.c": PROGRAM,
        }.items():
            (self.repository / name).write_text(text, "utf-8")
        self.git("init", "--quiet", "--initial-branch=master")
        self.git("add", ".")
        for number in (9093, 11434):
            self.git("commit", "--quiet", "--allow-empty", "--message", f"change {number}")
            self.git("tag", f"b{number}")
        self.git("tag", "v0.7.0")
        self.git("tag", "b99999x")

    def git(self, *arguments: str) -> str:
        """Run git in the repository, with nothing of the user's configuration."""
        who = ("-c", "user.name=somebody", "-c", "user.email=somebody@example.org")
        return subprocess.run(
            ["git", *who, "-C", str(self.repository), *arguments],  # noqa: S607  found on PATH
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"},
        ).stdout.strip()

    def program(self, name: str, text: str) -> None:
        """Put a program in front of the PATH."""
        (self.programs / name).write_text(text, "utf-8")
        (self.programs / name).chmod(0o755)

    def start(self, *arguments: str, **env: str) -> subprocess.Popen[str]:
        """Start the script."""
        return subprocess.Popen(
            [str(SCRIPT), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                "PATH": f"{self.programs}:{os.environ['PATH']}",
                "HOME": str(self.folder),
                "LLMPERF_CACHE": str(self.cache.parent),
                "LLAMA_CPP_REPOSITORY": self.repository.as_uri(),
                "GIT_CONFIG_GLOBAL": os.devnull,
                "CALLS": str(self.calls),
                **env,
            },
        )

    def build(self, *arguments: str, **env: str) -> tuple[int, str, str]:
        """Run the script; return its status, and what it printed on stdout and stderr."""
        process = self.start(*arguments, **env)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    def asked(self) -> str:
        """Return what cmake was asked."""
        return self.calls.read_text("utf-8") if self.calls.exists() else ""

    def left(self) -> list[str]:
        """Return the folders of the cache."""
        if not self.cache.is_dir():
            return []
        return sorted(path.name for path in self.cache.iterdir() if path.is_dir())


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """Return a machine without a GPU, whose cmake is a stand-in."""
    machine = Machine(tmp_path)
    machine.program("cmake", CMAKE)
    machine.program("nvidia-smi", "#!/bin/sh\nexit 9\n")
    return machine


def test_a_build_knows_its_number_and_commit(tmp_path: Path) -> None:
    """With a real cmake and a shallow clone, the built server tells the number that was asked."""
    if not shutil.which("cmake") or not shutil.which("cc"):
        pytest.skip("cmake or a C compiler is missing")
    machine = Machine(tmp_path)
    status, out, err = machine.build("11434", "cpu")
    assert status == 0, err
    folder = Path(out.strip())
    assert folder == machine.cache / "b11434-cpu" / "bin"
    told = subprocess.run(
        [str(folder / "llama-server")], capture_output=True, text=True, check=True
    )
    commit = machine.git("rev-parse", "--short=9", "b11434")
    assert parse_version(told.stderr) == (11434, commit)
    assert {path.name for path in folder.iterdir()} >= {
        "llama-bench",
        "llama-perplexity",
        "llama-quantize",
        "libllama.so",
    }
    assert machine.left() == ["b11434-cpu"]
    assert commit in (folder.parent / "build.txt").read_text("utf-8")


def test_what_is_printed_is_a_build_spec(machine: Machine) -> None:
    """Standard output is one line, which --llmperf-build reads as a path."""
    status, out, _ = machine.build("11434")
    assert status == 0
    assert parse_spec(out.rstrip("\n"), {}, Path("/")).kind == "path"


def test_latest_is_the_highest_number(machine: Machine) -> None:
    """`latest` compares numbers, not letters, and passes over tags that are no build's."""
    status, out, err = machine.build("latest")
    assert (status, out) == (0, f"{machine.cache}/b11434-cpu/bin\n"), err


def test_a_build_is_made_once(machine: Machine) -> None:
    """A second call takes the folder that is there, since a rebuilt binary has another hash."""
    first = machine.build("9093")
    asked = machine.asked()
    assert machine.build("b9093")[:2] == first[:2]
    assert machine.asked() == asked


def test_who_may_not_write_to_the_cache_folder_takes_what_is_there(machine: Machine) -> None:
    """On a machine that several users share; what is not there says who must let them."""
    first = machine.build("9093")
    for number in ("9093", "11434"):
        lock = machine.cache / f"b{number}-cpu.lock"
        lock.unlink(missing_ok=True)
        # Not to be opened for writing, whoever runs this.
        lock.mkdir()
    assert machine.build("9093")[:2] == first[:2]
    status, out, err = machine.build("11434")
    assert (status, out) == (1, "")
    assert err == (
        f"build_llama: cannot write to {machine.cache}: let all who build on this machine write "
        "there, or set LLMPERF_CACHE\n"
    )


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["11434", "cpu", "more"],
        ["0"],
        ["-1"],
        ["b"],
        ["master"],
        ["11434;id"],
        ["../11434"],
        ["$(id)"],
        ["11434", "rocm"],
        ["11434", "cpu]"],
        ["11434", "$(id)"],
    ],
)
def test_nonsense_is_refused(machine: Machine, arguments: list[str]) -> None:
    """What is no number or backend ends with 2, before anything is fetched or built."""
    status, out, err = machine.build(*arguments)
    assert (status, out) == (2, "")
    assert err
    assert machine.left() == []
    assert machine.asked() == ""


@pytest.mark.parametrize(
    "env",
    [
        {"LLAMA_BUILD_JOBS": "0"},
        {"LLAMA_BUILD_JOBS": "2; id"},
        {"LLAMA_CUDA_ARCHITECTURES": "90; -DX=1"},
        {"LLAMA_CUDA_ARCHITECTURES": "native"},
    ],
)
def test_nonsense_in_variables_is_refused(machine: Machine, env: dict[str, str]) -> None:
    """A variable that is no number or list of architectures ends with 2 and is named."""
    status, out, err = machine.build("11434", "cuda", **{"LLAMA_CUDA_ARCHITECTURES": "90", **env})
    assert (status, out) == (2, "")
    assert next(iter(env)) in err


def test_a_number_that_is_not_tagged_leaves_nothing(machine: Machine) -> None:
    """A missing tag is named, and no half-made folder stays."""
    status, out, err = machine.build("11435")
    assert (status, out) == (1, "")
    assert "no tag b11435" in err
    assert machine.left() == []


def test_a_failed_build_leaves_its_log_alone(machine: Machine) -> None:
    """A build that fails shows its last lines and leaves no folder that a later call would take."""
    status, out, err = machine.build("11434", CMAKE_SAYS="no compiler")
    assert (status, out) == (1, "")
    assert "no compiler" in err
    assert machine.left() == []
    assert "no compiler" in (machine.cache / "b11434-cpu.log").read_text("utf-8")


@pytest.mark.parametrize(
    ("env", "told"),
    [
        ({"NUMBER": "1"}, "calls itself: version: 1 (abc)"),
        ({"NUMBER": "114345"}, "calls itself"),
        ({"MAKES": "llama-server"}, "made no llama-bench"),
    ],
)
def test_a_build_that_is_another_is_not_kept(
    machine: Machine, env: dict[str, str], told: str
) -> None:
    """What tells another number, or lacks a program, is an error and not kept."""
    status, out, err = machine.build("11434", **env)
    assert (status, out) == (1, "")
    assert told in err
    assert machine.left() == []


def test_cuda_is_built_for_the_gpus_that_are_here(machine: Machine) -> None:
    """The GPUs' compute capabilities become architectures, each once, and part of the name."""
    machine.program("nvidia-smi", "#!/bin/sh\nprintf '12.0\\n8.6\\n8.6\\n[N/A]\\n'\n")
    status, out, err = machine.build("11434", DEVICES="CUDA0: a GPU")
    assert status == 0, err
    assert out == f"{machine.cache}/b11434-cuda-86-120/bin\n"
    assert "-DGGML_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=86;120" in machine.asked()


def test_a_cuda_build_without_a_gpu_needs_to_be_told(machine: Machine) -> None:
    """Without GPU it says what to name; with the variable it builds."""
    status, _, err = machine.build("11434", "cuda")
    assert status == 1
    assert "LLAMA_CUDA_ARCHITECTURES" in err
    assert machine.build("11434", "cuda", LLAMA_CUDA_ARCHITECTURES="90")[0] == 0


def test_a_cuda_build_that_sees_no_gpu_is_no_build(machine: Machine) -> None:
    """A server that would silently run on the CPU is refused on a machine with a GPU."""
    machine.program("nvidia-smi", "#!/bin/sh\necho 9.0\n")
    status, out, err = machine.build("11434", "cuda")
    assert (status, out) == (1, "")
    assert "sees no GPU" in err
    assert machine.left() == []


def test_compilers_are_counted_by_cores_and_memory(machine: Machine) -> None:
    """The build is always given a number of compilers, from one to the number of cores."""
    assert machine.build("11434")[0] == 0
    jobs = int(machine.asked().split("--parallel ")[1].split()[0])
    assert 1 <= jobs <= len(os.sched_getaffinity(0))
    assert machine.build("9093", LLAMA_BUILD_JOBS="7")[0] == 0
    assert "--parallel 7 " in machine.asked()


def test_arguments_for_cmake_are_passed_on_as_words(machine: Machine) -> None:
    """LLAMA_CMAKE_ARGS is split at blanks and never read as shell."""
    assert machine.build("11434", LLAMA_CMAKE_ARGS="-DA=1  -DB=$(id)")[0] == 0
    assert "-DA=1 -DB=$(id)\n" in machine.asked()


def test_two_at_once_build_once(machine: Machine) -> None:
    """The second of two calls waits for the first and takes what it made."""
    first = machine.start("11434", CMAKE_TAKES="1")
    while not machine.asked() and first.poll() is None:
        time.sleep(0.02)
    status, out, err = machine.build("11434")
    assert first.communicate(timeout=60)[0] == out
    assert status == 0
    assert "waiting for it" in err
    assert machine.asked().count("--build") == 1


def test_leftovers_of_a_killed_build_are_removed(machine: Machine) -> None:
    """What a killed build left behind goes with the next one; that of another build stays."""
    for name in (".building-b11434-cpu-abcdef", ".building-b9093-cpu-abcdef"):
        (machine.cache / name).mkdir(parents=True)
    assert machine.build("11434")[0] == 0
    assert machine.left() == [".building-b9093-cpu-abcdef", "b11434-cpu"]


def test_a_repository_that_is_not_there_is_told(machine: Machine) -> None:
    """`latest` without a repository names the variable for a mirror."""
    status, out, err = machine.build("latest", LLAMA_CPP_REPOSITORY=str(machine.folder / "none"))
    assert (status, out) == (1, "")
    assert "LLAMA_CPP_REPOSITORY" in err
