"""Functions that engines run in other processes."""

import os
import time

from curation.errors import UserError


def pieces(item):
    """Three of each item."""
    for k in range(3):
        yield item, k


def seen(piece):
    time.sleep(0.05)
    return piece, os.getpid()


def refuse(piece):
    if piece == ("b", 1):
        raise UserError("piece b 1 is no good")
    return piece
