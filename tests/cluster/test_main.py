"""The command line up to where real work begins: usage, exit codes, one line of help on stderr."""

import io
import os
import subprocess
import sys

import pytest

from cluster.main import main


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """The exit code and what stderr says, in one line."""
    try:
        code = main(arguments)
    except SystemExit as exit_of_argparse:
        assert isinstance(exit_of_argparse.code, int)
        code = exit_of_argparse.code
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1, err
    return code, err


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        (("serve", "--expert-groups", "0"), "'0'"),
        (("serve", "--expert-groups", "five"), "'five'"),
        (("serve", "--port", "70000"), "'70000'"),
        (("serve", "--dtype", "float8"), "'float8'"),
        (("serve", "--config", "/nowhere.yaml"), "/nowhere.yaml"),
        (("generate",), "TEXT"),
        (("generate", "x", "--token-ids", "1"), "--token-ids"),
        (("generate", "x", "--temperature", "-1"), "-1"),
        (("generate", "x", "--temperature", "nan"), "nan"),
        (("generate", "x", "--top-p", "1.5"), "1.5"),
        (("generate", "x", "--seed", "-3"), "-3"),
        (("generate", "x", "--max-tokens", "0"), "0"),
        (("generate", "--token-ids", "1,two"), "'1,two'"),
        (("generate", "--token-ids", "1,-2"), "-2"),
        (("generate", "x", "--endpoint", "nowhere"), "'nowhere'"),
        (("generate", "x", "--local", "--session", "tea"), "--session"),
        (("generate", "x", "--local", "--endpoint", "here:1"), "--endpoint here:1"),
        (("generate", "x", "--model", "/models/mine"), "--model /models/mine"),
        (("generate", "x", "--endpoint", "here:70000"), "'here:70000'"),
        (("generate", "\udcff"), r"'\udcff' is not UTF-8"),
        (("generate", "x", "--session", "\udcff"), r"'\udcff' is not UTF-8"),
        (("session", "list", "--cache-salt", "\udcff"), r"'\udcff' is not UTF-8"),
        (("session", "show", "\udcff"), r"'\udcff' is not UTF-8"),
        (("bench", "kv", "--plot", "/nowhere/curves.svg"), "/nowhere"),
        (("bench", "serve", "--pairs", "0"), "0"),
        (("session",), "WHAT"),
        (("session", "show"), "NAME"),
        (("session", "pin", "tea"), "--for"),
        (("session", "pin", "tea", "--for", "soon"), "'soon'"),
        (("session", "list", "--max", "0"), "0"),
        (("kv", "evict", "--tier", "ram"), "--bytes"),
        (("kv", "evict", "--tier", "tape", "--bytes", "1"), "'tape'"),
        (("kv", "evict", "--tier", "ram", "--bytes", "1kg"), "'1kg'"),
        (("scale",), "experts|attention"),
        (("scale", "experts"), "--replicas"),
        (("scale", "experts", "--replicas", "0"), "0"),
        (("scale", "experts", "--replicas", "1", "--group", "-1"), "-1"),
        (("scale", "attention", "--replicas", "many"), "'many'"),
        (("drain",), "ACTOR"),
        (("frobnicate",), "'frobnicate'"),
        ((), "VERB"),
    ],
)
def test_a_wrong_flag_is_a_usage_error_that_names_the_value(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], value: str
) -> None:
    code, err = told(capsys, *arguments)
    assert code == 2
    assert value in err


@pytest.mark.parametrize("verb", [("generate", "-"), ("generate", "-", "--local"), ("chat",)])
@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_a_prompt_on_stdin_that_is_not_text(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    verb: tuple[str, ...],
    errors: str,
) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(b"\xff\xfe\n"), encoding="utf-8", errors=errors)
    monkeypatch.setattr("sys.stdin", stdin)
    assert told(capsys, *verb) == (2, "model1: what came on stdin is not UTF-8\n")


def test_a_reader_of_stdout_that_has_gone_is_not_complained_about() -> None:
    verb = "Verb('', lambda _: None, lambda _: print('something short'))"
    code = (
        "import sys; from cluster import main; from cluster.flags import Verb; "
        f"main.VERBS['say'] = {verb}; sys.exit(main.main(['say']))"
    )
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, env=environment
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


def test_a_wrong_environment_variable_is_a_usage_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODEL1_GATEWAY__PRT", "1")
    code, err = told(capsys, "serve")
    assert code == 2
    assert "MODEL1_GATEWAY__PRT" in err


@pytest.mark.parametrize(
    "verb",
    [
        *("", "demo", "serve", "generate", "chat", "status", "train"),
        *("bench serve", "bench model", "bench fp8", "session", "session export", "kv"),
        *("scale", "scale experts", "drain"),
    ],
)
def test_help_fits_a_screen(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([*verb.split(), "--help"])
    assert len(capsys.readouterr().out.splitlines()) <= 24
