"""The command line as a process: what it prints to, and how it ends."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

import den.support.progress
from den.recipes.den import train
from den.support.progress import Progress, progress
from den.support.terminal import UNREAD, complain, ended, standard_streams
from den.train.folder import read_metrics
from tests.small_runs import cut_sets, small_config


def run(code: str, shell: str = "") -> subprocess.CompletedProcess:
    """A process of Python that runs `code`, under a shell that has redirected its streams."""
    words = f'exec "{sys.executable}" -c "$CODE" {shell}'
    return subprocess.run(["bash", "-c", words], capture_output=True, text=True, env={**os.environ, "CODE": code})


def test_the_entry_point_is_there_before_anything_heavy():
    heavy = "{'torch', 'numpy', 'tyro', 'matplotlib', 'tqdm'}"
    assert run(f"import sys, den.cli; print({heavy} & set(sys.modules))").stdout.strip() == "set()"


@pytest.mark.parametrize("module", ["den.commands", "tyro", "torch"])
def test_an_interrupt_during_imports_is_one_line(module):
    code = f"""
import builtins, os, signal, sys
plain = builtins.__import__
def interrupted(name, *rest, **named):
    if name == {module!r}:
        os.kill(os.getpid(), signal.SIGINT)
    return plain(name, *rest, **named)
from den.cli import main
builtins.__import__ = interrupted
sys.exit(main(["info"]))
"""
    done = run(code)
    assert (done.returncode, done.stderr, done.stdout) == (130, "den: interrupted\n", "")


HELP = "import sys; from den.cli import main; sys.exit(main(['--help']))"


@pytest.mark.parametrize(
    ("shell", "status", "words"),
    [
        ("> >(exec >&-; sleep 0.01)", UNREAD, ""),
        ("| head -n 1; exit ${PIPESTATUS[0]}", UNREAD, ""),
        (">&-", 0, ""),
        ("2>&-", 0, ""),
        ("<&-", 0, ""),
        ("<&- >&- 2>&-", 0, ""),
        ("> /dev/full", 2, "den: error: [Errno 28] No space left on device\n"),
    ],
)
def test_whatever_the_streams_are_connected_to(shell, status, words):
    lines = "import sys; from den.support.terminal import ended; sys.exit(ended(lambda: print('x\\n' * 100_000) or 0))"
    for code in (HELP, lines) if "head" not in shell else (lines,):
        done = run(code, shell)
        assert done.stderr == words
        if ">(" not in shell or code is lines:  # a reader that is about to go may take a little text
            assert done.returncode == status


def test_the_files_that_are_opened_are_not_taken_for_streams(tmp_path):
    code = f"""
import os
from den.support.terminal import standard_streams
with standard_streams():
    with open({str(tmp_path / "file")!r}, "w") as file:
        assert file.fileno() > 2
        print("to nobody", flush=True)
        os.write(2, b"to nobody")
        file.write("own")
"""
    assert run(code, "<&- >&- 2>&-").returncode == 0
    assert (tmp_path / "file").read_text() == "own"


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [("ascii", "1.00 +- 0.10, delta dense, ?"), ("latin-1", "1.00 ± 0.10, delta dense, ?"), ("utf-8", None)],
)
def test_what_stdout_cannot_encode_is_spelt(monkeypatch, encoding, expected):
    text, stream = "1.00 ± 0.10, Δ dense, 語", io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    with standard_streams():
        print(text, end="")
    assert stream.buffer.getvalue().decode(encoding) == (expected or text)
    assert stream.errors == "strict"  # as it was


class Gone(io.StringIO):
    """A stream whose reader has gone, on a terminal or not."""

    def __init__(self, terminal: bool, error: Exception) -> None:
        super().__init__()
        self.terminal, self.error = terminal, error

    def isatty(self):
        return self.terminal

    def write(self, text):
        raise self.error


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("error", [BrokenPipeError(32, "gone"), OSError(28, "full"), ValueError("closed")])
def test_a_stderr_that_takes_nothing_ends_no_work(monkeypatch, terminal, error):
    monkeypatch.setattr("den.support.progress.SECONDS", 0)
    monkeypatch.setattr(sys, "stderr", Gone(terminal, error))
    assert list(progress(range(5), "work")) == [0, 1, 2, 3, 4]
    bar = Progress(3, "work")
    bar.update()
    bar.note("loss 1")
    bar.update()
    bar.close()
    assert bar.done == 2
    complain("error: nobody hears it")


@pytest.mark.parametrize("terminal", [False, True])
def test_training_goes_on_without_a_stderr_and_draws_no_bar_in_a_log(tmp_path, monkeypatch, capsys, terminal):
    cut_sets(monkeypatch)
    monkeypatch.setattr("den.support.progress.SECONDS", 0)
    train(small_config(tmp_path / "log", "den", progress=True))
    told = capsys.readouterr().err
    assert "\r" not in told
    assert "stage 1 estimator: 5 of 5 updates, loss " in told
    monkeypatch.setattr(sys, "stderr", Gone(terminal, BrokenPipeError(32, "gone")))
    train(small_config(tmp_path / "gone", "den", progress=True))
    losses = [[line["train"]["loss"] for line in read_metrics(tmp_path / name)] for name in ("log", "gone")]
    assert losses[0] == losses[1]


def test_all_progress_is_told_in_one_place():
    sources = Path(den.support.progress.__file__).parent.rglob("*.py")
    assert [path.name for path in sources if "tqdm" in path.read_text(encoding="utf-8")] == ["progress.py"]


@pytest.mark.parametrize("stream", [None, "closed"])
def test_without_a_stderr_the_work_goes_on(monkeypatch, stream):
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", stream and closed)
    assert list(progress(range(3), "work")) == [0, 1, 2]


def test_a_log_gets_a_line_now_and_then_and_no_bar(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("den.support.progress.time.monotonic", lambda: now[0])
    with Progress(4000, "stage 1 estimator", unit="update") as bar:
        for _ in range(130):
            now[0] += 1
            bar.note("loss 0.500", refresh=False)
            bar.update()
    told = capsys.readouterr().err.splitlines()
    assert told == [f"stage 1 estimator: {n} of 4,000 updates, loss 0.500" for n in (60, 120, 130)]


def test_short_work_and_hidden_work_tell_a_log_nothing(capsys):
    for shown in (True, False):
        assert list(progress(range(50), "work", shown=shown)) == list(range(50))
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(2, "work") as bar:
        bar.update()
        bar.note("loss 0.5")
        bar.update()
    assert "\r" in terminal.getvalue()
    assert "loss 0.5" in terminal.getvalue()


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (ValueError("op: x must be 1,\n got 2"), 2, "den: error: op: x must be 1, got 2\n"),
        (FileNotFoundError(2, "No such file", "a"), 2, "den: error: [Errno 2] No such file: 'a'\n"),
        (KeyboardInterrupt(), 130, "den: interrupted\n"),
        (BrokenPipeError(), 141, ""),
    ],
)
def test_every_end_has_its_status_and_at_most_a_line(capsys, error, status, words):
    def fail():
        raise error

    assert ended(fail) == status
    assert capsys.readouterr().err == words
