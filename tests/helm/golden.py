"""What `helm template` makes of the chart, pinned: a diff shows what a change does to a cluster.

`python -m tests.helm.golden` (in `make chart`) writes the files again.
"""

from pathlib import Path

from tests.helm.chart import VALUES_FILES, template

FOLDER = Path(__file__).parent / "golden"
# No Secret is drawn, as that would be another one each time.
SETS = ('auth.secretName="release-secrets"',)
VALUES: dict[str, tuple[Path, ...]] = {
    "default": (),
    **{file.stem.removeprefix("values-"): (file,) for file in VALUES_FILES},
}


def rendered(values: tuple[Path, ...]) -> str:
    done = template(*SETS, values=values)
    assert done.code == 0, done.stderr
    # What is empty in a template leaves its indentation behind.
    return "".join(f"{line.rstrip()}\n" for line in done.stdout.splitlines())


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.glob("*.yaml"):
        old.unlink()
    for name, values in VALUES.items():
        (FOLDER / f"{name}.yaml").write_text(rendered(values))


if __name__ == "__main__":
    main()
