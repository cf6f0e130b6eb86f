import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_regenerating_the_protos_changes_nothing(tmp_path: Path) -> None:
    # -o: take the environment as it is, the tests run in it already.
    subprocess.run(
        [
            *("make", "--silent", "-o", ".venv/.installed-dev", "protos"),
            f"BIN={Path(sys.executable).parent}",
            f"PROTO_OUT={tmp_path}",
        ],
        cwd=ROOT,
        check=True,
        stdin=subprocess.DEVNULL,
    )
    committed = {path.name: path.read_text() for path in (ROOT / "protos").glob("*_pb2*.py*")}
    generated = {path.name: path.read_text() for path in (tmp_path / "protos").iterdir()}
    assert sorted(committed) == sorted(generated)
    assert [name for name in generated if generated[name] != committed[name]] == []
