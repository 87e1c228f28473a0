"""A trace of some steps by torch's profiler: what every operation and kernel took, for ui.perfetto.dev."""

from __future__ import annotations

from pathlib import Path

from torch.profiler import ProfilerActivity, profile, schedule

from tidar_mega import device
from tidar_mega.config import Config


class Profiler:
    """Records `log.profile_steps` steps from `log.profile_step` on, on the ranks of `log.profile_ranks`. The step
    before warms it up, so that a run which resumes behind that records nothing."""

    def __init__(self, config: Config, rank: int) -> None:
        self._first = config.log.profile_step if rank in config.log.profile_ranks else None
        self._count = config.log.profile_steps
        self._path = Path(config.run_dir) / "profile" / f"step_{self._first}_rank_{rank}.json.gz"
        self._profile: profile | None = None

    def before(self, step: int) -> None:
        """Call before each step; they count from 1."""
        if self._first is not None and step == self._first - 1:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * device.has_cuda()
            when = schedule(wait=0, warmup=1, active=self._count, repeat=1)
            self._profile = profile(activities=activities, schedule=when, record_shapes=True)
            self._profile.start()

    def after(self, step: int) -> None:
        """Call behind each step."""
        if self._profile is None:
            return
        if step < self._first + self._count - 1:
            self._profile.step()
            return
        self._profile.stop()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._profile.export_chrome_trace(str(self._path))
            print(f"trace of the last {self._count} step(s): {self._path}, for ui.perfetto.dev", flush=True)
        except (OSError, RuntimeError) as error:  # no reason to end a run; the profiler's own writer raises the latter
            print(f"{self._path}: the trace could not be written ({error})", flush=True)
        self._profile = None
