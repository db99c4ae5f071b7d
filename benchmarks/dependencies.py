"""Sizes and licences of the packages that llm2clip installs, as Markdown tables.

    make licences

The packages must be installed in this environment, and pip-licenses must be on the PATH. The development tools of the
extras `dev`, `docs` and `peers` are not counted.
"""

import json
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from llm2clip.tools.doctor import DEVELOPER_EXTRAS
from shared import print_header, print_row

TORCH = re.compile(r"torch$|triton$|nvidia-|cuda-")  # PyTorch and its GPU libraries
COPYLEFT = re.compile(r"GPL|General Public|MPL|Mozilla|EPL|CDDL|EUPL", re.IGNORECASE)
# Names of licences in classifiers -> SPDX identifiers
SPDX = {
    "Apache Software License": "Apache-2.0", "Apache License 2.0": "Apache-2.0", "Apache 2.0 License": "Apache-2.0",
    "Apache 2.0": "Apache-2.0", "Apache License, Version 2.0": "Apache-2.0", "MIT License": "MIT",
    "BSD License": "BSD", "BSD": "BSD", "BSD 3-Clause": "BSD-3-Clause", "3-Clause BSD License": "BSD-3-Clause",
    "BSD-3-Clause License": "BSD-3-Clause", "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0", "ISC License (ISCL)": "ISC",
    "GNU Lesser General Public License v3 (LGPLv3)": "LGPL-3.0",
}  # fmt: skip


def find_installed(requirements: Iterable[str], extra: str = "") -> set[str]:
    """Return the names of the installed packages that the requirements need, directly or indirectly."""
    packages: set[str] = set()
    visited: set[tuple[str, str]] = set()
    pending = [(line, extra) for line in requirements]
    while pending:
        line, parent_extra = pending.pop()
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": parent_extra}):
            continue
        name = canonicalize_name(requirement.name)
        for child_extra in ("", *requirement.extras):
            if (name, child_extra) in visited:
                continue
            visited.add((name, child_extra))
            packages.add(name)
            pending += [(child, child_extra) for child in metadata.requires(name) or []]
    return packages


def measure_size(package: str) -> int:
    """Return the size of a package's files on disk in bytes."""
    paths = [Path(str(file.locate())) for file in metadata.files(package) or []]
    return sum(512 * path.stat().st_blocks for path in paths if path.is_file())


def read_licences(pip_licenses: str, packages: Iterable[str]) -> dict[str, str]:
    """Return the licence of each package according to pip-licenses."""
    command = [pip_licenses, "--python", sys.executable, "--from", "mixed", "--format", "json", "--with-system"]
    entries = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    licences: dict[str, str] = {canonicalize_name(entry["Name"]): entry["License"] for entry in entries}
    return {package: SPDX.get(licences[package], licences[package]) for package in packages}


def main(pip_licenses: str = "pip-licenses") -> None:
    lines = metadata.requires("llm2clip") or []
    core = find_installed(lines)
    extras = set(metadata.metadata("llm2clip").get_all("Provides-Extra") or []) - {*DEVELOPER_EXTRAS}
    all_packages = core.union(*(find_installed(lines, extra) for extra in extras))
    print_header("install", "packages", "size", "size without PyTorch")
    for name, packages in (("core", core), ("all extras for users", all_packages)):
        sizes = {package: measure_size(package) for package in packages}
        without_torch = sum(size for package, size in sizes.items() if not TORCH.match(package))
        print_row(name, len(packages), *(f"{size / 1e6:,.0f} MB" for size in (sum(sizes.values()), without_torch)))

    by_licence = defaultdict(list)
    for package, licence in read_licences(pip_licenses, all_packages).items():
        by_licence[licence].append(package)
    print()
    print_header("licence", "core", "extras", "packages")
    for licence, packages in sorted(by_licence.items(), key=lambda item: -len(item[1])):
        num_core = len(core.intersection(packages))
        is_listed = COPYLEFT.search(licence) or len(packages) < 3
        names = ", ".join(sorted(packages)) if is_listed else ""
        print_row(licence, num_core, len(packages) - num_core, names)


if __name__ == "__main__":
    main(*sys.argv[1:])
