"""What hkdfast can use but does not need: the extras of its own metadata, so that pyproject.toml is their only list."""

import re
from importlib import metadata

# Modules whose name is not that of the package that brings them.
PACKAGES = {"PIL": "pillow", "flash_attn": "flash-attn", "pytest_benchmark": "pytest-benchmark"}


def extras():
    """{extra: {package: installed version or None}} of the installed hkdfast; empty if it is not installed."""
    try:
        requirements = metadata.requires("hkdfast") or ()
    except metadata.PackageNotFoundError:
        return {}
    found = {}
    for requirement in requirements:
        name = re.match(r"[\w.-]+", requirement).group()
        extra = re.search(r"extra\s*==\s*[\"']([\w.-]+)[\"']", requirement)
        if extra and name != "hkdfast":
            found.setdefault(extra.group(1), {})[name] = version(name)
    return found


def version(package):
    """The installed version of a package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def hint(error):
    """How to install what an ImportError misses, " (pip install 'hkdfast[hf]')", or nothing if no extra brings it."""
    package = PACKAGES.get((error.name or "").split(".")[0], (error.name or "").split(".")[0])
    for extra, packages in extras().items():
        if package in packages:
            return f" (pip install 'hkdfast[{extra}]')"
    return ""
