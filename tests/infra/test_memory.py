import subprocess
import sys

SCRIPT = """
import resource, sys
from infra.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
import torch
torch.set_num_threads(1)
for _ in range(20):
    torch.ones(2**24).sum()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(2**24).sum()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how):
    return int(subprocess.run([sys.executable, "-c", SCRIPT, how], check=True, capture_output=True, text=True).stdout)


def test_freed_memory_is_used_again_without_page_faults():
    assert faults("keep") * 20 < faults("give back")
