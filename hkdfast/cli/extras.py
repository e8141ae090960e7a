"""Optional dependencies, read from the installed metadata, so that pyproject.toml has the only list of extras."""

import re
from importlib import metadata

# {module: package} where the names differ
PACKAGES = {"PIL": "pillow", "flash_attn": "flash-attn", "pytest_benchmark": "pytest-benchmark"}


def extras():
    """{extra: {package: installed version or None}} of the installed hkdfast; {} if it is not installed."""
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
    """How to install a missing package, e.g. " (pip install 'hkdfast[hf]')"; "" if no extra contains it."""
    package = PACKAGES.get((error.name or "").split(".")[0], (error.name or "").split(".")[0])
    for extra, packages in extras().items():
        if package in packages:
            return f" (pip install 'hkdfast[{extra}]')"
    return ""
