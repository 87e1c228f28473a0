"""What a user did that cannot work, told without a trace."""

from __future__ import annotations

import errno

# what a user must mend: no room, no right, or a path through or to what is no folder or no file
_LASTING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR)


class UserError(ValueError):
    """Bad input: the message names what was found, what is allowed and what to do. The CLI shows it without a trace."""

    exit_code = 2  # the same command would fail again


class LostError(UserError):
    """A process, a node or a connection was lost: nothing is wrong with the input, and the same command resumes."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h; a launcher may start the run again


class ConfigError(UserError):
    """A setting that cannot work; the message names the key, the value, the limit and the way out."""


def require(ok: bool, key: str, value: object, allowed: str, way_out: str = "") -> None:
    """Raises ConfigError unless `ok`: what `key` was found to be, what it must be, and what else would help."""
    if not ok:
        raise ConfigError(f"{key} = {value}: must be {allowed}" + (f"; {way_out}" if way_out else ""))


def storage_error(fault: OSError | None, kind: type[UserError], said: str, mend: str) -> UserError:
    """What to raise where storage did not do its work, with `said` of which file and what.

    An error of `kind`, and how to `mend` it, if the same command would fail again; a LostError for what may pass, such
    as EIO, ESTALE or ENOTCONN, and where there is no `fault` to know. ENOENT may pass, too: a network file system can
    lose sight of a file. Where a path may be wrong, the caller must look at that first.
    """
    if fault is not None and fault.errno in _LASTING:
        return kind(f"{said}; {mend}")
    return LostError(
        f"{said}; this may pass: the same command resumes from the newest checkpoint, and a job of Slurm is requeued, "
        "at most launch.max_idle_restarts times without a new one"
    )
