"""Compiles fuzz_kernels.cc with AddressSanitizer and UBSan, and runs it.

    python tests/stress/fuzz_kernels.py --count 100000
    CXX=clang++ python tests/stress/fuzz_kernels.py --libfuzzer 3600

The second runs for so many seconds under libFuzzer, which looks for choices that reach new code.
Ends with an error at the first bad access, undefined operation, leak, or bit that does not come
back. Needs a C++ compiler with the sanitizers (CXX, else c++), and the FFI headers of the jaxlib
that pyproject.toml pins for the build.
"""

import argparse
import importlib.util
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[2]
SANITIZERS = "address,undefined,float-divide-by-zero"
X86 = "-mavx2 -mfma -mf16c -mpopcnt -mbmi -mbmi2"
AVX512 = f"{X86} -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vbmi2 -mavx512bf16"
SOURCES = {
    "tests/stress/fuzz_kernels.cc": "",
    "csrc/cpu/encode.cc": "",
    "csrc/cpu/spmm.cc": "",
    "csrc/cpu/kernels_portable.cc": "",
    "csrc/cpu/kernels_avx2.cc": X86,
    "csrc/cpu/kernels_avx512.cc": AVX512,
}


def build(directory: pathlib.Path, headers: str, sanitizers: str, libfuzzer: bool) -> pathlib.Path:
    x86 = platform.machine() in ("x86_64", "AMD64")
    flags = f"-std=c++17 -O1 -g -fno-omit-frame-pointer -fsanitize={sanitizers}"
    flags += " -fno-sanitize-recover=all" + " -DFLASHLLM_X86" * x86
    flags += " -fsanitize=fuzzer -DFLASHLLM_LIBFUZZER" * libfuzzer
    compiler, objects, running = os.environ.get("CXX", "c++"), [], []
    for source, more in SOURCES.items():
        if more and not x86:
            continue
        objects.append(directory / pathlib.Path(source).with_suffix(".o").name)
        command = [compiler, *flags.split(), *more.split(), "-isystem", headers, "-c"]
        running.append(subprocess.Popen([*command, ROOT / source, "-o", objects[-1]]))
        if len(running) == 2:  # at a time
            running = [p for p in running if p.wait()]
    if any(p.wait() for p in running):
        sys.exit("fuzz_kernels: the compiler fails; has it the sanitizers (libasan, libubsan)?")
    program = directory / "fuzz_kernels"
    subprocess.run([compiler, *flags.split(), *objects, "-o", program, "-pthread"], check=True)
    return program


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000, help="matrices")
    parser.add_argument("--seed", type=int, default=0, help="the first one's")
    parser.add_argument("--sanitizers", default=SANITIZERS, help="or thread")
    parser.add_argument("--libfuzzer", type=int, metavar="SECONDS", default=0, help="needs Clang")
    parser.add_argument("--headers", help="folder of xla/ffi/api (default: the jaxlib found)")
    options = parser.parse_args()
    jaxlib = importlib.util.find_spec("jaxlib")
    if options.headers is None and (jaxlib is None or jaxlib.origin is None):
        sys.exit("fuzz_kernels: no jaxlib here; pass --headers")
    headers = options.headers or str(pathlib.Path(jaxlib.origin).parent / "include")
    with tempfile.TemporaryDirectory() as directory:
        libfuzzer = options.libfuzzer > 0
        program = build(pathlib.Path(directory), headers, options.sanitizers, libfuzzer)
        if libfuzzer:
            how = ["-max_len=1024", "-len_control=0", "-print_final_stats=1", "-rss_limit_mb=4096"]
            how += [f"-max_total_time={options.libfuzzer}", f"-seed={options.seed + 1}"]
            subprocess.run([program, *how], check=True)
            return
        start = time.monotonic()
        subprocess.run([program, str(options.count), str(options.seed)], check=True)
        print(f"{options.count / (time.monotonic() - start):.0f} matrices/s")


if __name__ == "__main__":
    main()
