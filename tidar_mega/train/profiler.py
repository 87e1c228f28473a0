"""A trace of some steps by torch's profiler: what every operation and kernel took, for ui.perfetto.dev."""

from __future__ import annotations

from pathlib import Path

from torch.profiler import ProfilerActivity, profile, schedule

from tidar_mega import device
from tidar_mega.config import Config, require
from tidar_mega.parallel.mesh import Mesh


class Profiler:
    """Records `log.profile_steps` steps from `log.profile_step` on, on the ranks of `log.profile_ranks`. The step
    before warms it up, so that a run which resumes behind that records nothing."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        """Raises ConfigError for a rank that there is not."""
        log, rank = config.log, mesh.rank
        ok = log.profile_step is None or max(log.profile_ranks, default=-1) < mesh.world_size
        require(ok, "log.profile_ranks", log.profile_ranks, f"below the number of ranks ({mesh.world_size})")
        self._first = log.profile_step if rank in log.profile_ranks else None
        self._count = log.profile_steps
        self._path = Path(config.run_dir) / "profile" / f"step_{self._first}_rank_{rank}.json.gz"
        self._profile: profile | None = None

    def before(self, step: int) -> None:
        """Call before each step; they count from 1."""
        if self._first is not None and step == self._first - 1:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * device.has_cuda()
            when = schedule(wait=0, warmup=1, active=self._count)
            self._profile = profile(activities=activities, schedule=when, record_shapes=True)
            self._profile.start()

    def after(self, step: int) -> None:
        """Call behind each step."""
        if self._profile is not None and step < self._first + self._count - 1:
            self._profile.step()
        else:
            self.close(step)

    def close(self, step: int) -> None:
        """Writes what was recorded until `step`, the last of this process; does nothing if nothing is."""
        recorded, self._profile = self._profile, None
        if recorded is None:
            return
        recorded.stop()
        if step < self._first:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            recorded.export_chrome_trace(str(self._path))
            print(f"trace of steps {self._first} to {step}: {self._path}, for ui.perfetto.dev", flush=True)
        except (OSError, RuntimeError) as error:  # no reason to end a run; the profiler's own writer raises the latter
            print(f"{self._path}: the trace could not be written ({error})", flush=True)
