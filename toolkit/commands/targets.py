"""`toolkit targets`."""

from toolkit.commands.listing import group

targets = group("targets")
