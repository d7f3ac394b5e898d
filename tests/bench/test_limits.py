"""What a process may use, read from files as Linux writes them."""

import os

import pytest

from foretoken.bench.limits import Limits, read_limits

GIB = 2**30
CPU = """processor : {number}
physical id : 0
core id : {core}
flags : fpu sse2 avx2 {flags}
"""


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Return what writes a machine's files and reads its limits."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)

    def write(files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return read_limits(tmp_path)

    return write


def cpuinfo(cores, flags=""):
    return "\n".join(
        CPU.format(number=number, core=core, flags=flags) for number, core in enumerate(cores)
    )


def test_two_logical_cores_may_be_one_physical(machine):
    limits = machine({"proc/cpuinfo": cpuinfo([0, 0, 1, 1, 2, 2])})
    assert (limits.num_cores, limits.num_physical_cores) == (4, 2)  # 4 and 5 are not ours
    assert limits.usable_cores == 2


@pytest.mark.parametrize(
    ("flags", "expected"), [("avx512_bf16", True), ("amx_bf16", True), ("avx512f", False)]
)
def test_bfloat16_is_a_flag_of_the_processor(machine, flags, expected):
    assert machine({"proc/cpuinfo": cpuinfo([0], flags)}).has_bfloat16 is expected


def test_bfloat16_of_arm(machine):
    assert machine({"proc/cpuinfo": "processor : 0\nFeatures : fp asimd bf16\n"}).has_bfloat16


def test_the_tightest_quota_of_the_nested_groups_counts(machine):
    limits = machine(
        {
            "proc/self/cgroup": "0::/outer/inner\n",
            "sys/fs/cgroup/outer/inner/cpu.max": "max 100000\n",
            "sys/fs/cgroup/outer/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/cpu.max": "300000 100000\n",
        }
    )
    assert limits.cpu_quota == 1.5
    assert limits.usable_cores == 1


def test_quota_and_memory_of_the_first_version(machine):
    limits = machine(
        {
            "proc/self/cgroup": "4:memory:/\n3:cpu,cpuacct:/\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{3 * GIB}\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GIB}\n",
        }
    )
    assert (limits.cpu_quota, limits.memory_bytes) == (2.0, 2 * GIB)


def test_no_quota_is_none(machine):
    files = {"proc/self/cgroup": "3:cpu:/\n", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n"}
    assert machine(files).cpu_quota is None


def test_memory_is_the_least_of_the_machine_and_its_groups(machine):
    files = {
        "proc/meminfo": "MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\n",
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": f"{4 * GIB}\n",
        "sys/fs/cgroup/memory.current": f"{3 * GIB}\n",
        "sys/fs/cgroup/memory.stat": f"anon 1\ninactive_file {2 * GIB}\n",
    }
    assert machine(files).memory_bytes == 3 * GIB  # files that are held can be given up
    assert machine({"sys/fs/cgroup/memory.max": "max\n"}).memory_bytes == 8 * GIB


def test_what_is_not_said_is_not_known(machine):
    assert machine({}) == Limits(num_cores=4)


def test_this_machine():
    limits = read_limits()
    assert 1 <= limits.usable_cores <= limits.num_cores <= os.cpu_count()
