"""Two CPU processes, really: ``accelerate launch --cpu --num_processes 2`` starts one and says nothing."""

import os
import subprocess
import sys
from pathlib import Path


def two_processes(module: str, call: str, folder: Path) -> None:
    """Run ``call`` of a test module (``t``; ``sys.argv[1]`` is ``folder``) in both; an error where there is one."""
    script = folder.with_name("launched.py")
    script.write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        f"import accelerate, conftest, {module} as t\n{call}\n"
        "assert accelerate.PartialState().num_processes == 2\n"
    )
    # --multi_gpu chooses the launcher of several processes, the variable keeps them on the CPU.
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    ended = subprocess.run(
        [sys.executable, *launch, "--mixed_precision", "no", "--main_process_port", "0", str(script), str(folder)],
        capture_output=True,
        text=True,
        timeout=290,
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
