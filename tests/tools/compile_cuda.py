"""What the compiler made of the kernels of hkdfast._cuda: prints a table. Fails if an instantiation is missing, keeps
data in local memory (a stack, a spill), has static shared memory or too many registers for a block of 512 threads, if a
fast one lacks its bulk and 16-byte accesses, or if it has more than LIMITS allow between its sweeps, where a row waits.

    python tests/tools/compile_cuda.py                    for the architectures it was built for
    python tests/tools/compile_cuda.py sm_90a sm_100      for these, as CI does

Dynamic shared memory is the plan's: csrc/cuda/layout.h keeps it within the limit, which tests/ops/test_cuda.py tests.
"""

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # where hkdfast is not installed

from hkdfast import DIVERGENCES

KINDS = ("any", "narrow", "wide")  # in the order of csrc/cuda/layout.h
SYSTEM_SHARED, MAX_REGISTERS = 1024, 65536 // 512
FAST = {  # instructions of the fast kinds
    "bulk copy": r"UBLKCP",
    "16 bytes from shared memory": r"LDS\.128",
    "8 or 16 bytes to global memory": r"STG\.E\.(64|128)",
}
# What a kernel has from the end of its first sweep over a row to the beginning of its last one, in order of addresses:
# the sums of the row are joined and its constants computed there, and nothing of the row is loaded or stored.
BETWEEN = {
    "instructions": r"",
    "shuffles": r"\bSHFL\b",
    "double": r"\bD(ADD|FMA|MUL|SETP|MNMX)\b",  # arithmetic of doubles
    "sends": r"\bSTAS\b",  # stores to other blocks
    "block": r"\bBAR\.",  # barriers of a block
    "cluster": r"\bUCGABAR_WAIT\b",  # barriers of a cluster
    "memory": r"\bMEMBAR\.\w+\.GPU\b",  # waits until all stores are seen by the whole GPU
}
# The most of each, of the fast kinds; some per cent above the counts in benchmarks/speed/NOTES.md, for other compilers.
LIMITS = {
    "one reduction": {"instructions": 3000, "shuffles": 240, "double": 245, "sends": 7, "block": 2},
    "two reductions": {"instructions": 3600, "shuffles": 290, "double": 290, "sends": 14, "block": 4},
    "one reduction, law": {"instructions": 5300, "shuffles": 415, "double": 620, "sends": 21, "block": 6},
    "two reductions, law": {"instructions": 5850, "shuffles": 460, "double": 660, "sends": 28, "block": 8},
}  # 0 where none is named


def cuobjdump():
    """CUDA's own, or the one that comes with Triton."""
    places = [Path("/usr/local/cuda/bin/cuobjdump")]
    triton = importlib.util.find_spec("triton")
    if triton:
        places.append(Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump")
    return shutil.which("cuobjdump") or next((str(path) for path in places if path.exists()), None)


def expected():
    """(divergence, kind, law) of every kernel there should be, the divergence as C++ spells it but in lower case."""
    names = [divergence.replace("_", "") for divergence in DIVERGENCES]
    return {(name, kind, law) for name in names for kind in KINDS for law in ("", "law")} | {("decode", "any", "law")}


def described(name):
    """(divergence, kind, law) of a kernel's mangled name."""
    divergence, kind, law = re.search(r"rows_kernelINS\d_\d+(\w+?)ELNS_4KindE(\d)ELb([01])E", name).groups()
    return divergence.lower(), KINDS[int(kind)], "law" if law == "1" else ""


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
    """{(arch, kernel): [(address, instruction), ...]}"""
    found, arch, kernel = {}, None, None
    for line in subprocess.run([tool, "-sass", module], capture_output=True, text=True, check=True).stdout.splitlines():
        if match := re.search(r"arch = (\w+)", line):
            arch, kernel = match.group(1), None
        elif match := re.search(r"Function : (\S+)", line):
            kernel = match.group(1)
            found[arch, kernel] = []
        elif kernel and (match := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", line)):
            found[arch, kernel].append((int(match[1], 16), match[2]))
    return found


def sweeps(code):
    """The innermost loops over words, as (first, last) instruction: a jump backward closes them, and they have an
    exponential for each of eight words."""
    place = {address: i for i, (address, _) in enumerate(code)}
    loops = []
    for end, (address, text) in enumerate(code):
        target = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        if target and int(target[1], 16) <= address:
            loops.append((place[int(target[1], 16)], end))
    inner = [(a, b) for a, b in loops if not any((a, b) != (c, d) and a <= c and d <= b for c, d in loops)]
    return [(a, b) for a, b in inner if sum("MUFU.EX2" in text for _, text in code[a : b + 1]) >= 8]


def between(code):
    """{name: how many instructions of BETWEEN there are from the first sweep to the last, outside of sweeps}"""
    found = sweeps(code)
    texts = []
    if found:
        inside = {i for a, b in found for i in range(a, b + 1)}
        texts = [code[i][1] for i in range(found[0][1] + 1, found[-1][0]) if i not in inside]
    return {name: sum(bool(re.search(pattern, text)) for text in texts) for name, pattern in BETWEEN.items()}


def limits(divergence, law):
    reductions = "one reduction" if divergence in ("forwardkl", "reversekl") else "two reductions"
    return LIMITS[", ".join(filter(None, (reductions, law)))]


def faults(usage, code, fast, most):
    if usage["STACK"] or usage["LOCAL"]:
        yield f"{usage['STACK']} bytes of stack, {usage['LOCAL']} of local memory"
    if usage["SHARED"] > SYSTEM_SHARED:
        yield f"{usage['SHARED'] - SYSTEM_SHARED} bytes of static shared memory"
    if usage["REG"] > MAX_REGISTERS:
        yield f"more than {MAX_REGISTERS} registers"
    text = "\n".join(text for _, text in code)
    if re.search(r"\b(STL|LDL)\b", text):
        yield "accesses of local memory"
    if not fast:
        return
    for what, pattern in FAST.items():
        if not re.search(pattern, text):
            yield f"no {what}"
    # four bytes by each lane at a distance of 16 meet in the banks of shared memory, four lanes at a time
    found = sweeps(code)
    if len(found) < 2:
        yield "no loops over words found"
    if any(re.search(r"\b(LDS|STS)\b(?!\.128)", text) for a, b in found for _, text in code[a : b + 1]):
        yield "narrow accesses of shared memory in a sweep"
    counts = between(code)
    if not counts["sends"]:
        yield "no reduction found between the sweeps"
    for name, count in counts.items():
        if count > most.get(name, 0):
            yield f"between the sweeps {count} {name} ({BETWEEN[name] or 'any'}), LIMITS allow {most.get(name, 0)}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archs", nargs="*", help="architectures that have to be there, default: those that are")
    wanted = parser.parse_args().archs
    spec = importlib.util.find_spec("hkdfast._cuda")
    if spec is None:
        sys.exit("hkdfast._cuda is not built: pip install -e . where nvcc is")
    tool = cuobjdump()
    if tool is None:
        sys.exit("no cuobjdump: install the CUDA toolkit or Triton")
    usage, code = resources(tool, spec.origin), instructions(tool, spec.origin)
    wrong = []
    for arch in wanted or sorted({arch for arch, _ in usage}) or ["any architecture"]:
        there = {described(kernel) for one, kernel in usage if one == arch}
        wrong += [f"{arch}: no kernel for {', '.join(filter(None, kernel))}" for kernel in sorted(expected() - there)]
    print("arch     divergence       kind   law  registers stack local instructions, between the sweeps:", *BETWEEN)
    for (arch, kernel), used in sorted(usage.items(), key=lambda item: (item[0][0], described(item[0][1]))):
        divergence, kind, law = described(kernel)
        numbers = "{REG:9} {STACK:5} {LOCAL:5}".format(**used)
        counts = " ".join(f"{count:5}" for count in between(code[arch, kernel]).values()) if kind != "any" else ""
        print(f"{arch:8} {divergence:16} {kind:6} {law:4} {numbers} {len(code[arch, kernel]):12}  {counts}".rstrip())
        fast = kind != "any"
        found = faults(used, code[arch, kernel], fast, limits(divergence, law) if fast else {})
        wrong += [f"{arch} {divergence}, {kind}, {law}: {fault}" for fault in found]
    sys.exit("\n".join(wrong) or 0)


if __name__ == "__main__":
    main()
