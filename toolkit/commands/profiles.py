"""`toolkit profiles`."""

from toolkit.commands.listing import group

profiles = group("profiles")
