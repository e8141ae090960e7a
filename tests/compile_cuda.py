"""What the compiler made of the kernels of hkdfast._cuda: prints a table. Fails if one keeps data in local memory (a
stack, a spill) or has static shared memory, or if a fast one lacks its 16-byte and bulk accesses.

    python tests/compile_cuda.py
"""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

FAST = {  # instructions of the instances for plain tiles
    "bulk copy": r"UBLKCP",
    "16 bytes from shared memory": r"LDS\.128",
    "16 bytes to global memory": r"STG\.E\.128",
}


def cuobjdump():
    """CUDA's own, or the one that comes with Triton."""
    places = [Path("/usr/local/cuda/bin/cuobjdump")]
    triton = importlib.util.find_spec("triton")
    if triton:
        places.append(Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump")
    return shutil.which("cuobjdump") or next((str(path) for path in places if path.exists()), None)


def described(name):
    """(divergence, tiles, law) of a kernel's mangled name."""
    divergence, plain, purified = re.search(r"rows_kernelINS\d_\d+(\w+?)ELb([01])ELb([01])E", name).groups()
    return divergence, "plain" if plain == "1" else "any", "law" if purified == "1" else ""


def resources(tool, module):
    """{(arch, kernel): {"REG": 96, "STACK": 0, ...}}"""
    found, arch, kernel = {}, None, None
    for line in subprocess.run(
        [tool, "-res-usage", module], capture_output=True, text=True, check=True
    ).stdout.splitlines():
        if match := re.search(r"arch = (\w+)", line):
            arch = match.group(1)
        elif match := re.search(r"Function (\S*rows_kernel\S*):", line):
            kernel = match.group(1)
        elif kernel and "REG:" in line:
            found[arch, kernel] = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
            kernel = None
    return found


def instructions(tool, module):
    """{(arch, kernel): text}"""
    found, arch, kernel = {}, None, None
    for line in subprocess.run([tool, "-sass", module], capture_output=True, text=True, check=True).stdout.splitlines():
        if match := re.search(r"arch = (\w+)", line):
            arch, kernel = match.group(1), None
        elif match := re.search(r"Function : (\S+)", line):
            kernel = match.group(1)
            found[arch, kernel] = []
        elif kernel:
            found[arch, kernel].append(line)
    return {key: "\n".join(lines) for key, lines in found.items()}


def faults(usage, text, plain):
    if usage["STACK"] or usage["LOCAL"]:
        yield f"{usage['STACK']} bytes of stack, {usage['LOCAL']} of local memory"
    if usage["SHARED"] > 1024:  # of static shared memory, where the system keeps 1 KiB
        yield f"{usage['SHARED']} bytes of static shared memory"
    if re.search(r"\b(STL|LDL)\b", text):
        yield "accesses of local memory"
    if plain:
        for what, pattern in FAST.items():
            if not re.search(pattern, text):
                yield f"no {what}"


def main():
    spec = importlib.util.find_spec("hkdfast._cuda")
    if spec is None:
        sys.exit("hkdfast._cuda is not built: pip install -e . where nvcc is")
    tool = cuobjdump()
    if tool is None:
        sys.exit("no cuobjdump: install the CUDA toolkit or Triton")
    usage, text = resources(tool, spec.origin), instructions(tool, spec.origin)
    failed = not usage
    print("arch     divergence       tiles law  registers stack local instructions")
    for (arch, kernel), used in sorted(usage.items(), key=lambda item: (item[0][0], described(item[0][1]))):
        divergence, tiles, law = described(kernel)
        code = text[arch, kernel]
        count = len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", code, re.M))
        wrong = list(faults(used, code, tiles == "plain"))
        failed = failed or bool(wrong)
        numbers = "{REG:9} {STACK:5} {LOCAL:5}".format(**used)
        print(f"{arch:8} {divergence:16} {tiles:5} {law:4} {numbers} {count:12}", *wrong)
    sys.exit(failed)


if __name__ == "__main__":
    main()
