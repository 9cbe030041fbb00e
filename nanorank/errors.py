"""
A user's mistake is a UserError: one line on stderr and exit status 2.
A bug keeps its traceback.

    if __name__ == "__main__":
        with user_errors(__file__):
            main()
"""
import contextlib
import errno
import os
import sys

from configurator import UserError, one_line

__all__ = ["UserError", "one_line", "user_errors", "is_disk_error"]


def is_disk_error(error):
    """Whether the disk is full, over quota or broken: no fault of the command."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


@contextlib.contextmanager
def user_errors(script):
    """Turns a UserError, or a file that the system refuses, into one line and an exit status.

    The status is 2, or 1 where the disk is at fault and the same command can go on later.
    """
    try:
        yield
    except (UserError, OSError) as error:
        message = one_line(error)
        if is_disk_error(error):
            message += "; once that is mended the same command goes on"
        print(f"{os.path.basename(script)}: {message}", file=sys.stderr, flush=True)
        raise SystemExit(1 if is_disk_error(error) else 2) from None
